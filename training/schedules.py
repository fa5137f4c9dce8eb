"""Query schedules: how many queries a training step uses, as a function of the seed and the step alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Fixed:
    """Always the first K queries: the paper's baseline (K = Q) and specialised models (section 3.1)."""

    num_queries: int
    seed: int
    K: int

    def __call__(self, step: int) -> int:
        return self.K


@dataclass(frozen=True)
class Uniform:
    """Query Masking: one K per step for the whole batch, uniform on [1, Q] (section 2)."""

    num_queries: int
    seed: int

    def __call__(self, step: int) -> int:
        return int(np.random.default_rng((self.seed, step)).integers(1, self.num_queries + 1))


SCHEDULES: dict[str, Any] = {"fixed": Fixed, "uniform": Uniform}


def create_schedule(queries: dict[str, Any], num_queries: int, seed: int) -> Callable[[int], int]:
    """The schedule that a recipe's `queries` describes: a function from the step to K.

    Args:
        queries: `{"schedule": name, ...}` with the schedule's own arguments.
        num_queries: Q.
        seed: Of the run; the same on every process.

    Raises:
        ValueError: If the name or an argument is unknown, or K is not in [1, Q].

    Example:
        >>> schedule = create_schedule({"schedule": "uniform"}, num_queries=64, seed=0)
        >>> schedule(7) == schedule(7), 1 <= schedule(7) <= 64
        (True, True)
    """
    arguments = dict(queries)
    name = arguments.pop("schedule", None)
    if name not in SCHEDULES:
        raise ValueError(f"Expected `queries.schedule` to be one of {', '.join(SCHEDULES)}, got {name!r}.")
    allowed = set(SCHEDULES[name].__dataclass_fields__) - {"num_queries", "seed"}
    if set(arguments) != allowed:
        raise ValueError(
            f"Expected `queries` of schedule {name!r} to have the arguments {sorted(allowed)}, got {sorted(arguments)}."
        )
    K = arguments.get("K", 1)
    if isinstance(K, bool) or not isinstance(K, int) or not 1 <= K <= num_queries:
        raise ValueError(f"Expected `queries.K` to be an integer in [1, {num_queries}], got {K!r}.")
    return SCHEDULES[name](num_queries=num_queries, seed=seed, **arguments)
