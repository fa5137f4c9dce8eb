"""Calibration: choose the budget that meets a target on one half of a dataset, and report it on the other half."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm

from hf_visual_perceiver.data.images import ImageDataset
from hf_visual_perceiver.evaluation.cascade import search_thresholds
from hf_visual_perceiver.evaluation.evaluate import Measurement, Row, measure_budgets, plain
from hf_visual_perceiver.inference.loading import config_from_dict
from hf_visual_perceiver.modeling import Budget, ElasticConfig
from hf_visual_perceiver.utils.files import read_json, write_json


KINDS = ("macs", "ms", "accuracy_drop")
# With fewer images, a 95 % interval is wider than about 8 points at 70 % accuracy.
FEW_IMAGES = 500


@dataclass(frozen=True)
class Target:
    """The bound that a budget has to meet.

    Attributes:
        kind: `"macs"`: at most this fraction of the full network's multiply-accumulates; `"ms"`: at most this many
            milliseconds per image; `"accuracy_drop"`: at most this many percentage points below the full network.
        value: The bound.

    Raises:
        ValueError: If the kind is unknown or the bound is out of range.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Expected the target's kind to be one of {', '.join(KINDS)}, got {self.kind!r}.")
        if self.kind == "macs" and not 0 < self.value <= 1:
            raise ValueError(
                f"Expected a target of MACs in (0, 1], a fraction of the full network's, got {self.value}."
            )
        if self.kind == "ms" and not 0 < self.value < math.inf:
            raise ValueError(f"Expected a target of more than 0 ms per image, got {self.value}.")
        if self.kind == "accuracy_drop" and not 0 <= self.value <= 100:
            raise ValueError(f"Expected a drop in accuracy of 0 to 100 percentage points, got {self.value}.")

    @classmethod
    def from_options(
        cls, target_macs: float | None = None, target_ms: float | None = None, max_accuracy_drop: float | None = None
    ) -> "Target":
        """Create the target from the one option that is given.

        Raises:
            ValueError: If none is given, or more than one.
        """
        given = {
            kind: value
            for kind, value in zip(KINDS, (target_macs, target_ms, max_accuracy_drop), strict=True)
            if value is not None
        }
        if len(given) != 1:
            names = ", ".join(f"{kind} {value:g}" for kind, value in given.items()) or "none"
            raise ValueError(
                f"Expected exactly one of --target-macs, --target-ms and --max-accuracy-drop, got {names}."
            )
        return cls(*next(iter(given.items())))

    def __str__(self) -> str:
        forms = {
            "macs": f"at most {self.value:g} of the MACs of the full network",
            "ms": f"at most {self.value:g} ms per image",
            "accuracy_drop": f"at most {self.value:g} points below the full network",
        }
        return forms[self.kind]


@dataclass(frozen=True)
class Calibration:
    """The result of `calibrate`: the chosen budget, its results, and the curve that it was chosen from.

    Attributes:
        target: The target that was asked for.
        budget: The chosen budget.
        chosen_on: The budget's results on the half that it was chosen on; optimistic, because it was chosen there.
        achieved: Its results on the held-out half.
        full: The full network's results on the held-out half.
        accuracy_interval: 95 % interval (Wilson) of the accuracy in `achieved`.
        drop: Percentage points of accuracy below the full network, on the held-out half.
        drop_interval: 95 % interval of `drop`, paired, as both ran on the same images.
        met: Whether the target also holds on the held-out half.
        curve: All measured budgets, on the half that the budget was chosen on.
    """

    target: Target
    budget: Budget
    chosen_on: Row
    achieved: Row
    full: Row
    accuracy_interval: tuple[float, float]
    drop: float
    drop_interval: tuple[float, float]
    met: bool
    curve: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return plain(self)


def reference_row(rows: Sequence[Row]) -> Row:
    """The row of the full network."""
    row = next((row for row in rows if row.budget == Budget()), None)
    if row is None:
        raise ValueError("Expected a row of the full network as the reference, got none.")
    return row


def target_value(row: Row, reference: Row, kind: str) -> float:
    """A row's value in the target's units: a fraction of the reference's MACs, ms per image, or points of accuracy."""
    values = {
        "macs": row.macs / reference.macs,
        "ms": row.ms_per_image,
        "accuracy_drop": 100 * (reference.accuracy - row.accuracy),
    }
    return values[kind]


def meets(row: Row, reference: Row, target: Target) -> bool:
    """Whether a row meets a target, up to rounding."""
    return target_value(row, reference, target.kind) <= target.value + 1e-9


def choose_budget(rows: Sequence[Row], target: Target, knobs: Mapping[str, str] | None = None) -> Row:
    """Choose a row: for a target cost, the most accurate row that meets it; for a target drop, the cheapest that does.

    Ties go to the row with fewer MACs, or to the more accurate one, respectively.

    Args:
        rows: Rows of the measured budgets, including the full network.
        target: The target to meet.
        knobs: Names of the knobs by their short names, for the error message.

    Raises:
        ValueError: If no row meets the target; the message says which comes nearest.

    Example:
        >>> def row(K, accuracy, macs):
        ...     return Row(Budget(num_active_queries=K), 8.0, 0.0, 8, 8, macs, accuracy, 0.01, macs, macs)
        >>> rows = [row(8, 0.6, 1.0), row(32, 0.72, 5.0), row(None, 0.74, 10.0)]
        >>> choose_budget(rows, Target("macs", 0.5)).budget, choose_budget(rows, Target("accuracy_drop", 0.5)).budget
        (Budget(num_active_queries=32), Budget())
    """
    reference = reference_row(rows)
    fitting = [row for row in rows if meets(row, reference, target)]
    if not fitting:
        nearest = min(rows, key=lambda row: target_value(row, reference, target.kind))
        raise ValueError(
            f"Expected a target that can be met, got {target}; of what was measured, {nearest.budget.short(knobs or {})} comes nearest "
            f"with {target_value(nearest, reference, target.kind):.3g}."
        )
    if target.kind == "accuracy_drop":
        return min(fitting, key=lambda row: (row.macs, -row.accuracy))
    return min(fitting, key=lambda row: (-row.accuracy, row.macs))


def candidate_budgets(config: ElasticConfig, search: Sequence[str] = (), target: Target | None = None) -> list[Budget]:
    """The budgets that calibration tries: the config's `candidates`; for a MACs target, also the largest that meets it.

    Args:
        config: The model's config.
        search: The knobs to vary, by short or long names; if empty, the family's first knob.
        target: The target to meet.
    """
    budgets = config.candidates(search)
    if target is not None and target.kind == "macs" and config.knob_names(search) == config.knob_names():
        budgets.append(config.budget_for(target.value))
    return sorted(dict.fromkeys(budgets), key=config.count_macs)


def stopping_budgets(
    model: Any,
    data: ImageDataset,
    target: Target,
    search: Sequence[str] = (),
    batch_size: int = 256,
    progress: bool = True,
) -> list[Budget]:
    """Thresholds for each exit of a model with early exits, found by `search_thresholds` for several mean costs.

    Empty if `search` does not name the knob of the thresholds, or the family has none.

    Args:
        model: A model in eval mode.
        data: Labelled images to search on.
        target: The target to meet; a MACs target is one of the costs.
        search: The knobs to vary, as in `candidate_budgets`.
        batch_size: Number of images per batch.
        progress: Whether to show progress on stderr.
    """
    config, stages = model.config, model.config.budgets()
    probe = config.stopping_budget([math.inf] * (len(stages) - 1))
    if probe is None or not probe.kwargs.keys() <= set(config.knob_names(search)):
        return []
    measured = measure_budgets(model, data, stages, batch_size, progress)
    confidence, correct = (
        np.stack(columns, axis=1) for columns in ([m.confidence for m in measured], [m.correct for m in measured])
    )
    costs = [config.count_macs(stage) for stage in stages]
    limits = [*np.linspace(costs[0], costs[-1], 9), *([target.value * costs[-1]] if target.kind == "macs" else [])]
    found = [search_thresholds(confidence, correct, costs, limit) for limit in limits if limit >= costs[0]]
    # Rounded down, which costs no more.
    rounded = ([math.floor(1e4 * t) / 1e4 if t <= 1 else math.inf for t in choice.thresholds] for choice in found)
    return [config.stopping_budget(thresholds) for thresholds in rounded]


def calibrate(
    model: Any,
    data: ImageDataset,
    target: Target,
    budgets: Sequence[Budget] | None = None,
    batch_size: int = 256,
    progress: bool = True,
    search: Sequence[str] = (),
) -> Calibration:
    """Choose a budget on every other image, and report its results on the rest.

    Args:
        model: A model in eval mode, on the device and in the dtype to run.
        data: Labelled images that the model was not trained on, at least two.
        target: The target to meet.
        budgets: Budgets to try beside the full network; `candidate_budgets` and `stopping_budgets` if None.
        batch_size: Number of images per batch; it matters for a time target.
        progress: Whether to show progress on stderr.
        search: The knobs to vary if `budgets` is None, by short or long names; if empty, the family's first knob.

    Raises:
        ValueError: If the target cannot be met, or the data do not fit the model.

    Example:
        >>> from hf_visual_perceiver.inference.loading import default_dataset, default_model, load_model
        >>> from hf_visual_perceiver.data.images import load_images
        >>> model, data = load_model(default_model()), load_images(default_dataset(), "test").subset(slice(0, 100))
        >>> budgets = [Budget(num_active_queries=4), Budget(num_active_queries=16)]
        >>> calibrate(model, data, Target("macs", 0.3), budgets, progress=False).budget
        Budget(num_active_queries=4)
    """
    if len(data) < 2:
        raise ValueError(
            f"Expected at least 2 images to calibrate on, half to choose and half to report, got {len(data)}."
        )
    # Every other image, so that both halves have all classes even if the dataset is sorted by class.
    halves = data.subset(slice(0, None, 2)), data.subset(slice(1, None, 2))
    if budgets is None:
        budgets = candidate_budgets(model.config, search, target)
        budgets += stopping_budgets(model, halves[0], target, search, batch_size, progress)
    measured = measure_budgets(model, halves[0], list(dict.fromkeys([*budgets, Budget()])), batch_size, progress)
    curve = [m.row() for m in measured]
    chosen = choose_budget(curve, target, model.config.knobs)
    others = measure_budgets(model, halves[1], [chosen.budget, Budget()], batch_size, progress)
    achieved, full = (m.row() for m in others)
    drop, drop_interval = accuracy_drop(others[1], others[0])
    # Wilson's interval stays inside [0, 1] even for few images.
    interval = binomtest(int(others[0].correct.sum()), len(halves[1])).proportion_ci(method="wilson")
    return Calibration(
        target=target,
        budget=chosen.budget,
        chosen_on=chosen,
        achieved=achieved,
        full=full,
        accuracy_interval=(float(interval.low), float(interval.high)),
        drop=drop,
        drop_interval=drop_interval,
        met=meets(achieved, full, target),
        curve=curve,
    )


def accuracy_drop(full: Measurement, other: Measurement) -> tuple[float, tuple[float, float]]:
    """Percentage points that `other` loses to `full` on the same images, and the paired 95 % interval."""
    lost = int((full.correct & ~other.correct).sum())
    won = int((~full.correct & other.correct).sum())
    n = len(full.labels)
    return 100 * (lost - won) / n, paired_interval(lost, won, n)


def paired_interval(lost: int, won: int, images: int) -> tuple[float, float]:
    """The 95 % interval, in percentage points, of the difference between two accuracies on the same images.

    This is Wald's interval on the discordant images, with half an image added to each of the four cells (Agresti & Min
    2005). SciPy does not have it.

    Args:
        lost: Number of images that only the first model classifies correctly.
        won: Number of images that only the second model classifies correctly.
        images: Number of all images.

    Example:
        >>> [round(x, 2) for x in paired_interval(lost=30, won=10, images=1000)]
        [0.75, 3.24]
    """
    if min(lost, won) < 0 or lost + won > images or images < 1:
        raise ValueError(f"Expected lost + won <= images and an image, got {lost} + {won} of {images}.")
    b, c, n = lost + 0.5, won + 0.5, images + 2
    difference = (b - c) / n
    half = float(norm.ppf(0.975)) * math.sqrt(max(0.0, b + c - (b - c) ** 2 / n)) / n
    return 100 * (difference - half), 100 * (difference + half)


def write_budget(folder: str | Path, budget: Budget) -> None:
    """Make a budget the default of a checkpoint by setting the knobs in its config.json.

    Both transformers and timm read them. All other keys stay as they are, and the file is replaced atomically.

    Raises:
        ValueError: If the folder has no readable config.json of a known model, or the budget is out of range.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"Expected a model folder with a config.json to write to, got {str(folder)!r}.")
    write_json(path, with_default(read_json(path, dict), budget, str(path)))


def with_default(values: dict[str, Any], budget: Budget, source: str = "config.json") -> dict[str, Any]:
    """Return the values of a config.json with another default budget, for transformers and for timm.

    Raises:
        ValueError: If the values are not of a known model, or the budget is out of range.
    """
    config = config_from_dict(values, source)
    config.resolve(**budget.kwargs)
    if config.resolve(**budget.kwargs) == config.resolve():
        budget = Budget()
    knobs = {name: budget.kwargs.get(name) for name in config.knobs.values()}
    values = {**values, **knobs}
    if "model_args" in values:  # timm's copy
        values["model_args"] = {**values["model_args"], **knobs}
    config_from_dict(values, source)  # raises if the result cannot be loaded
    return values
