"""Schedules: the budgets at which the images of a training step run, as a function of the seed and the step alone.

A budget is drawn as a step K of the config's `ladder`, counted from 1; for the Visual Perceiver, the first K queries.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import Field

from hf_visual_perceiver.modeling import Budget, ElasticConfig, Pass
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
    """The passes of every step.

    Attributes:
        distils: Whether the first pass is the full network on every image and teaches the others; if not, each pass
            learns from the labels.
        groups: Number of parts that a batch is split into.
    """

    distils: bool
    groups: int

    def __call__(self, step: int) -> list[Pass]: ...


@checked_dataclass(frozen=True, config=CHECKED)
class Fixed:
    """Always the same K: the paper's baseline (K = Q) and specialised models (section 3.1)."""

    ladder: tuple[Any, ...]
    seed: int
    K: Count

    distils = False
    groups = 1

    def __post_init__(self) -> None:
        require(len(self.ladder) >= self.K, "K", f"at most {len(self.ladder)}", self.K)

    def __call__(self, step: int) -> list[Pass]:
        return [Pass(self.ladder[self.K - 1])]


@checked_dataclass(frozen=True, config=CHECKED)
class Uniform:
    """Query Masking: one K per step for the whole batch, uniform on [1, Q] (section 2)."""

    ladder: tuple[Any, ...]
    seed: int

    distils = False
    groups = 1

    def __call__(self, step: int) -> list[Pass]:
        return [Pass(self.ladder[int(_generator(self, step).integers(len(self.ladder)))])]


@checked_dataclass(frozen=True, config=CHECKED)
class Stratified:
    """Query Masking at several K per step: one group of the batch runs at Q, each other group at its own K, p(K) ~ 1/K.

    The image's position in the batch decides its group. A step then covers all scales of K, which lowers the variance
    of the gradient as stratified sampling does, and the full network learns in every step. K is log-uniform, so that
    each doubling of the budget gets the same share. This follows FlexiViT and Matryoshka (Beyer et al. 2023, Kusupati
    et al. 2022), which use one draw for the whole batch.
    """

    ladder: tuple[Any, ...]
    seed: int
    groups: Annotated[int, Field(strict=True, ge=2, le=64)] = 4

    distils = False

    def __call__(self, step: int) -> list[Pass]:
        drawn = _log_uniform(_generator(self, step), len(self.ladder), self.groups - 1)
        return [
            Pass(self.ladder[K - 1], slice(group, None, self.groups))
            for group, K in enumerate([len(self.ladder), *drawn])
        ]


@checked_dataclass(frozen=True, config=CHECKED)
class Sandwich:
    """Each image runs with all Q queries and at `students` smaller budgets, which learn from the full network.

    This is the sandwich rule with in-place distillation of universally slimmable networks (Yu & Huang 2019): the
    largest network learns from the labels, the others from its output. The students' K is log-uniform, p(K) ~ 1/K; with
    `smallest` one of them is always K = 1, as in that paper.
    """

    ladder: tuple[Any, ...]
    seed: int
    students: Annotated[int, Field(strict=True, ge=1, le=16)] = 2
    smallest: Flag = False

    distils = True
    groups = 1

    def __post_init__(self) -> None:
        if len(self.ladder) < 2:
            raise ValueError(f"Expected at least 2 budgets for a sandwich, got {len(self.ladder)}.")

    def __call__(self, step: int) -> list[Pass]:
        # Students are drawn below Q, which is the teacher.
        drawn = _log_uniform(_generator(self, step), len(self.ladder) - 1, self.students - self.smallest)
        return [Pass(self.ladder[K - 1]) for K in (len(self.ladder), *([1] if self.smallest else []), *drawn)]


@checked_dataclass(frozen=True, config=CHECKED)
class Nested:
    """Each image runs at every K at which a block of queries ends, up to a largest K that is drawn in each step.

    This is meant for a block-causal trunk, in which one pass at the largest K also gives the logits of all smaller
    ones, so that all budgets learn for the price of one (AdaPerceiver: Jajal et al. 2025). Each learns from the labels.

    Args:
        ladder: Budgets, ascending.
        seed: Random seed of the run.
        block_ends: The K at which blocks end, from the model's config (`nested_steps`).
        largest: Weights for drawing the largest K, such as {16: 2, 64: 1}; None always uses Q. A smaller largest K
            makes a step cheaper.
    """

    ladder: tuple[Any, ...]
    seed: int
    block_ends: tuple[int, ...]
    largest: Annotated[dict[int, Positive], Field(min_length=1)] | None = None

    distils = False
    groups = 1

    def __post_init__(self) -> None:
        ends = f"some of the ends of blocks, {list(self.block_ends)}"
        require(set(self.largest or ()) <= set(self.block_ends), "largest", ends, self.largest)

    def __call__(self, step: int) -> list[Pass]:
        weights = self.largest or {len(self.ladder): 1.0}
        shares = np.array(list(weights.values())) / sum(weights.values())
        largest = int(_generator(self, step).choice(list(weights), p=shares))
        return [Pass(self.ladder[K - 1]) for K in self.block_ends[::-1] if largest >= K]


@checked_dataclass(frozen=True, config=CHECKED)
class SmallFirst:
    """Caps every pass at a K_max, which grows from `start` to the full network in the first `fraction` of the steps.

    K_max grows exponentially, so that each doubling of the budget takes the same time. Training starts with cheap
    passes, as in EfficientTrain++ (Wang et al. 2024) and PatchDropout (Liu et al. 2023), which start with smaller or
    fewer patches.
    """

    schedule: Any
    ladder: tuple[Any, ...]
    steps: int
    start: Count = 4
    fraction: Part = 0.5

    def __post_init__(self) -> None:
        require(self.start <= len(self.ladder), "start", f"at most {len(self.ladder)}", self.start)

    @property
    def distils(self) -> bool:
        return self.schedule.distils

    @property
    def groups(self) -> int:
        return self.schedule.groups

    def __call__(self, step: int) -> list[Pass]:
        progress = min(1.0, step / (self.fraction * self.steps))
        most = int(self.start * (len(self.ladder) / self.start) ** progress + 1e-9)
        drawn = [(self.ladder.index(p.budget) + 1, p.images) for p in self.schedule(step)]
        if isinstance(self.schedule, Nested):
            drawn = [(K, images) for K, images in drawn if most >= K]
        return [Pass(self.ladder[min(most, K) - 1], images) for K, images in drawn]


@checked_dataclass(frozen=True, config=CHECKED)
class DqsTail:
    """Makes some of the smaller passes adaptive in the last part of training.

    Query Masking trains the network on prefixes of the queries only, but Dynamic Query Selection may keep any subset.
    In the last `fraction` of the steps, each student (in schedules without a teacher in the batch, each pass that is
    not the full network) runs with probability `share` at a threshold ~ U(`thresholds`) instead; `knob` is the
    threshold's name.
    """

    schedule: Any
    ladder: tuple[Any, ...]
    seed: int
    steps: int
    fraction: Part
    share: Part
    thresholds: tuple[Cosine, Cosine]
    knob: str = "dqs_threshold"

    def __post_init__(self) -> None:
        require(self.thresholds[0] <= self.thresholds[1], "thresholds", "[low, high]", self.thresholds)
        if isinstance(self.schedule, Fixed):
            raise ValueError("Expected `budgets.dqs_tail` to go with a schedule of several K, got 'fixed'.")

    @property
    def distils(self) -> bool:
        return self.schedule.distils

    @property
    def groups(self) -> int:
        return self.schedule.groups

    def __call__(self, step: int) -> list[Pass]:
        passes = self.schedule(step)
        if step < self.steps * (1 - self.fraction):
            return passes
        # The 2 keeps this random stream apart from those of the schedule and of the augmentation.
        random = np.random.default_rng((self.seed, step, 2))
        # Drawn for every pass, needed or not, so that the draws do not depend on which passes are adaptive.
        selects, thresholds = random.random(len(passes)) < self.share, random.uniform(*self.thresholds, len(passes))
        first_is_full = len(passes) > 1
        return [
            Pass(Budget(**{self.knob: float(t)}), p.images) if selected and (i or not first_is_full) else p
            for i, (p, selected, t) in enumerate(zip(passes, selects, thresholds, strict=True))
        ]


SCHEDULES: dict[str, Any] = {
    "fixed": Fixed,
    "uniform": Uniform,
    "stratified": Stratified,
    "sandwich": Sandwich,
    "nested": Nested,
}


def create_schedule(
    budgets: dict[str, Any],
    ladder: Sequence[Budget],
    seed: int,
    steps: int = 1,
    block_ends: Sequence[int] | None = None,
) -> Schedule:
    """Create the schedule that a recipe's `budgets` describes: a function from the step to its passes.

    Args:
        budgets: `{"schedule": name, ...}` with the schedule's own arguments, and those of `SmallFirst` and `DqsTail` as
            `small_first` and `dqs_tail`.
        ladder: The config's ladder of budgets.
        seed: Random seed of the run; the same on every process.
        steps: Number of steps of the whole run.
        block_ends: The config's `nested_steps`.

    Raises:
        ValueError: If the name or an argument is unknown or out of range.

    Example:
        >>> from hf_visual_perceiver import VisualPerceiverConfig
        >>> config = VisualPerceiverConfig()
        >>> schedule = create_schedule({"schedule": "sandwich", "students": 2}, config.ladder(), seed=0)
        >>> [p.budget.short(config.knobs) for p in schedule(7)]
        ['full', 'K=1', 'K=22']
    """
    arguments = dict(budgets)
    name, tail = arguments.pop("schedule", None), arguments.pop("dqs_tail", None)
    small_first = arguments.pop("small_first", None)
    if name not in SCHEDULES:
        raise ValueError(f"Expected `budgets.schedule` to be one of {', '.join(SCHEDULES)}, got {name!r}.")
    given: dict[str, Any] = {"ladder": tuple(ladder), "seed": seed}
    if name == "nested":
        if block_ends is None:
            raise ValueError(
                "Expected a model that answers at several budgets in one pass (`trunk_attention` 'block_causal', or exits) for the "
                "schedule `nested`."
            )
        given["block_ends"] = tuple(block_ends)
    schedule = validated(SCHEDULES[name], arguments, f"`budgets` of schedule {name}", **given)
    for key, group in (("small_first", small_first), ("dqs_tail", tail)):
        if group is not None and not isinstance(group, dict):
            raise ValueError(f"Expected `budgets.{key}` to be a group of keys, got {group!r}.")
    given = {"ladder": tuple(ladder), "steps": steps}
    if small_first is not None:
        schedule = validated(SmallFirst, small_first, "`budgets.small_first`", schedule=schedule, **given)
    if tail is not None:
        schedule = validated(DqsTail, tail, "`budgets.dqs_tail`", schedule=schedule, seed=seed, **given)
    return schedule


def step_macs(config: ElasticConfig, schedule: Schedule, step: int) -> float:
    """Multiply-accumulates of a step's forward passes, per image; training takes about three times as many.

    A pass at a threshold counts as if it removed no queries, as their number is not known in advance.
    """
    return config.count_passes([p.budget for p in schedule(step)], shared=schedule.groups == 1)


def describe(passes: Sequence[Pass], knobs: Mapping[str, str]) -> str | list[str]:
    """The short names of a step's budgets, for the log: a string, or a list if there are several."""
    rounded = [
        Budget(**{k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in p.budget.kwargs.items()})
        for p in passes
    ]
    names = [budget.short(knobs) for budget in rounded]
    return names[0] if len(names) == 1 else names


def _generator(schedule: Any, step: int) -> np.random.Generator:
    return np.random.default_rng((schedule.seed, step))


def _log_uniform(random: np.random.Generator, largest: int, count: int) -> list[int]:
    """`count` draws from [1, largest] with p(K) proportional to 1 / K."""
    weights = 1 / np.arange(1, largest + 1)
    return [int(K) for K in random.choice(np.arange(1, largest + 1), size=count, p=weights / weights.sum())]
