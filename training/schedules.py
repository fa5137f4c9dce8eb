"""Query schedules: which subsets of the queries a training step uses, as a function of the seed and the step alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import Field

from hf_visual_perceiver.modeling import QuerySubset, VisualPerceiverConfig, count_macs, count_trunk_macs
from hf_visual_perceiver.modeling.macs import count_decoder_macs
from hf_visual_perceiver.training.validation import (
    CHECKED,
    Count,
    Flag,
    Positive,
    checked_dataclass,
    require,
    validated,
)


Part = Annotated[float, Field(gt=0, le=1)]
Cosine = Annotated[float, Field(ge=-1, le=1)]


class Schedule(Protocol):
    """The subsets of every step.

    Attributes:
        distils: Whether the first subset is all queries of every image and teaches the others; if not, each subset
            learns from the labels, and an image is in one of them.
        groups: Parts that a batch is split in.
    """

    distils: bool
    groups: int

    def __call__(self, step: int) -> list[QuerySubset]: ...


@checked_dataclass(frozen=True, config=CHECKED)
class Fixed:
    """Always the first K queries: the paper's baseline (K = Q) and specialised models (section 3.1)."""

    num_queries: int
    seed: int
    K: Count

    distils = False
    groups = 1

    def __post_init__(self) -> None:
        require(self.num_queries >= self.K, "K", f"at most {self.num_queries}", self.K)

    def __call__(self, step: int) -> list[QuerySubset]:
        return [QuerySubset(self.K)]


@checked_dataclass(frozen=True, config=CHECKED)
class Uniform:
    """Query Masking: one K per step for the whole batch, uniform on [1, Q] (section 2)."""

    num_queries: int
    seed: int

    distils = False
    groups = 1

    def __call__(self, step: int) -> list[QuerySubset]:
        return [QuerySubset(int(_generator(self, step).integers(1, self.num_queries + 1)))]


@checked_dataclass(frozen=True, config=CHECKED)
class Stratified:
    """Query Masking in every step at several K: one group of the batch at Q, each other at a K of its own, p(K) ~ 1/K.

    The image's place in the batch decides its group. A step then sees all scales of K, which lowers the variance of the
    gradient as stratified sampling does, and the full network learns in every step. K is log-uniform, so that each
    doubling of the budget gets the same share. After FlexiViT's and Matryoshka's per-batch draws (Beyer et al. 2023,
    Kusupati et al. 2022), which use one draw for the whole batch.
    """

    num_queries: int
    seed: int
    groups: Annotated[int, Field(strict=True, ge=2, le=64)] = 4

    distils = False

    def __call__(self, step: int) -> list[QuerySubset]:
        drawn = _log_uniform(_generator(self, step), self.num_queries, self.groups - 1)
        return [
            QuerySubset(K, images=slice(group, None, self.groups)) for group, K in enumerate([self.num_queries, *drawn])
        ]


@checked_dataclass(frozen=True, config=CHECKED)
class Sandwich:
    """Each image with all Q queries and with those of `students` smaller budgets, which learn from the full network.

    The sandwich rule with in-place distillation of universally slimmable networks (Yu & Huang 2019): the largest network
    learns from the labels, the others from its answer. K of the students is log-uniform, p(K) ~ 1/K; with `smallest` one
    of them is always K = 1, as in that paper.
    """

    num_queries: int
    seed: int
    students: Annotated[int, Field(strict=True, ge=1, le=16)] = 2
    smallest: Flag = False

    distils = True
    groups = 1

    def __post_init__(self) -> None:
        if self.num_queries < 2:
            raise ValueError(f"Expected at least 2 queries for a sandwich, got {self.num_queries}.")

    def __call__(self, step: int) -> list[QuerySubset]:
        # Not Q itself, which is the teacher.
        drawn = _log_uniform(_generator(self, step), self.num_queries - 1, self.students - self.smallest)
        return [QuerySubset(K) for K in (self.num_queries, *([1] if self.smallest else []), *drawn)]


@checked_dataclass(frozen=True, config=CHECKED)
class Nested:
    """Each image with the first K queries for every K at which a block of queries ends, up to a largest K drawn anew in each step.

    Meant for a block-causal trunk, in which one pass at the largest K gives the answers of all the smaller ones, so that
    all budgets learn for the price of one (AdaPerceiver: Jajal et al. 2025). Each learns from the labels.

    Args:
        num_queries: Q.
        seed: Random seed of the run.
        block_ends: Where blocks of queries end, from the model's config.
        largest: Weights of the largest K, such as {16: 2, 64: 1}; None is always Q. Smaller ones make a step cheaper.
    """

    num_queries: int
    seed: int
    block_ends: tuple[int, ...]
    largest: Annotated[dict[int, Positive], Field(min_length=1)] | None = None

    distils = False
    groups = 1

    def __post_init__(self) -> None:
        ends = f"some of the ends of blocks, {list(self.block_ends)}"
        require(set(self.largest or ()) <= set(self.block_ends), "largest", ends, self.largest)

    def __call__(self, step: int) -> list[QuerySubset]:
        weights = self.largest or {self.num_queries: 1.0}
        shares = np.array(list(weights.values())) / sum(weights.values())
        largest = int(_generator(self, step).choice(list(weights), p=shares))
        return [QuerySubset(K) for K in self.block_ends[::-1] if largest >= K]


@checked_dataclass(frozen=True, config=CHECKED)
class SmallFirst:
    """No subset has more than K_max queries, which grows from `start` to all of them in the first `fraction` of the steps.

    By the same factor in equal times, so that each doubling of the budget gets the same share. Cheap first, as in
    EfficientTrain++ (Wang et al. 2024) and PatchDropout (Liu et al. 2023), which begin with smaller or fewer patches.
    """

    schedule: Any
    num_queries: int
    steps: int
    start: Count = 4
    fraction: Part = 0.5

    def __post_init__(self) -> None:
        require(self.start <= self.num_queries, "start", f"at most {self.num_queries}", self.start)

    @property
    def distils(self) -> bool:
        return self.schedule.distils

    @property
    def groups(self) -> int:
        return self.schedule.groups

    def __call__(self, step: int) -> list[QuerySubset]:
        progress = min(1.0, step / (self.fraction * self.steps))
        most = int(self.start * (self.num_queries / self.start) ** progress + 1e-9)
        subsets = self.schedule(step)
        if isinstance(self.schedule, Nested):
            return [subset for subset in subsets if subset.num_active_queries <= most]
        return [replace(subset, num_active_queries=min(most, subset.num_active_queries)) for subset in subsets]


@checked_dataclass(frozen=True, config=CHECKED)
class DqsTail:
    """In the last part of training, some of the smaller subsets are those that selection really keeps.

    Query Masking shows the network prefixes alone, but Dynamic Query Selection leaves any subset of the queries. From
    (1 - `fraction`) of the steps on, each student (each subset, in schedules without a teacher in the batch, that is not
    the one at all queries) is with probability `share` what selection keeps of all queries at t ~ U(`thresholds`).
    """

    schedule: Any
    num_queries: int
    seed: int
    steps: int
    fraction: Part
    share: Part
    thresholds: tuple[Cosine, Cosine]

    def __post_init__(self) -> None:
        require(self.thresholds[0] <= self.thresholds[1], "thresholds", "[low, high]", self.thresholds)
        if isinstance(self.schedule, Fixed):
            raise ValueError("Expected `queries.dqs_tail` to go with a schedule of several K, got 'fixed'.")

    @property
    def distils(self) -> bool:
        return self.schedule.distils

    @property
    def groups(self) -> int:
        return self.schedule.groups

    def __call__(self, step: int) -> list[QuerySubset]:
        subsets = self.schedule(step)
        if step < self.steps * (1 - self.fraction):
            return subsets
        # Neither the numbers of the schedule nor those of the augmentation.
        random = np.random.default_rng((self.seed, step, 2))
        # Drawn for every subset, needed or not, so that a draw does not depend on those before it.
        selects, thresholds = random.random(len(subsets)) < self.share, random.uniform(*self.thresholds, len(subsets))
        first_is_full = len(subsets) > 1
        return [
            QuerySubset(self.num_queries, float(t), subset.images) if selected and (i or not first_is_full) else subset
            for i, (subset, selected, t) in enumerate(zip(subsets, selects, thresholds, strict=True))
        ]


SCHEDULES: dict[str, Any] = {
    "fixed": Fixed,
    "uniform": Uniform,
    "stratified": Stratified,
    "sandwich": Sandwich,
    "nested": Nested,
}


def create_schedule(
    queries: dict[str, Any], num_queries: int, seed: int, steps: int = 1, block_ends: Sequence[int] | None = None
) -> Schedule:
    """The schedule that a recipe's `queries` describes: a function from the step to its subsets of the queries.

    Args:
        queries: `{"schedule": name, ...}` with the schedule's own arguments, and those of `SmallFirst` and `DqsTail` as
            `small_first` and `dqs_tail`.
        num_queries: Q.
        seed: Random seed of the run; the same on every process.
        steps: Number of steps of the whole run.
        block_ends: Where blocks of queries end, for a model whose trunk is block-causal.

    Raises:
        ValueError: If the name or an argument is unknown or out of range.

    Example:
        >>> schedule = create_schedule({"schedule": "sandwich", "students": 2}, num_queries=64, seed=0)
        >>> [subset.num_active_queries for subset in schedule(7)]
        [64, 1, 22]
    """
    arguments = dict(queries)
    name, tail = arguments.pop("schedule", None), arguments.pop("dqs_tail", None)
    small_first = arguments.pop("small_first", None)
    if name not in SCHEDULES:
        raise ValueError(f"Expected `queries.schedule` to be one of {', '.join(SCHEDULES)}, got {name!r}.")
    given: dict[str, Any] = {"num_queries": num_queries, "seed": seed}
    if name == "nested":
        if block_ends is None:
            raise ValueError("Expected a model with `trunk_attention` 'block_causal' for the schedule `nested`.")
        given["block_ends"] = tuple(block_ends)
    schedule = validated(SCHEDULES[name], arguments, f"`queries` of schedule {name}", **given)
    for key, group in (("small_first", small_first), ("dqs_tail", tail)):
        if group is not None and not isinstance(group, dict):
            raise ValueError(f"Expected `queries.{key}` to be a group of keys, got {group!r}.")
    given = {"num_queries": num_queries, "steps": steps}
    if small_first is not None:
        schedule = validated(SmallFirst, small_first, "`queries.small_first`", schedule=schedule, **given)
    if tail is not None:
        schedule = validated(DqsTail, tail, "`queries.dqs_tail`", schedule=schedule, seed=seed, **given)
    return schedule


def step_macs(config: VisualPerceiverConfig, schedule: Schedule, step: int) -> float:
    """Multiply-accumulates of a step's forward, per image; training takes about three times as many.

    A subset that selection is to choose counts with all its candidates, as the number that stays is not known.
    """
    budgets = [subset.num_active_queries for subset in schedule(step)]
    largest = max(budgets)
    if config.trunk_attention == "block_causal" and len(budgets) > 1 and schedule.groups == 1:
        return count_macs(config, largest) + sum(count_decoder_macs(config, K) for K in budgets if largest != K)
    if schedule.distils:
        return count_macs(config, budgets[0]) + sum(count_trunk_macs(config, K) for K in budgets[1:])
    return sum(count_macs(config, K) for K in budgets) / len(budgets)


def describe(subsets: list[QuerySubset]) -> int | list[int | str]:
    """The subsets of a step, for a log: K, or with several a list of K and of thresholds such as "t=0.8"."""
    names = [s.num_active_queries if s.dqs_threshold is None else f"t={s.dqs_threshold:.3g}" for s in subsets]
    return names[0] if len(names) == 1 and isinstance(names[0], int) else names


def _generator(schedule: Any, step: int) -> np.random.Generator:
    return np.random.default_rng((schedule.seed, step))


def _log_uniform(random: np.random.Generator, largest: int, count: int) -> list[int]:
    """`count` draws from [1, largest] with p(K) proportional to 1 / K."""
    weights = 1 / np.arange(1, largest + 1)
    return [int(K) for K in random.choice(np.arange(1, largest + 1), size=count, p=weights / weights.sum())]
