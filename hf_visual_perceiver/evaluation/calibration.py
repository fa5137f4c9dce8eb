"""Calibration: the budget that meets a target, chosen on one half of a set and reported on the other."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import binomtest, norm

from hf_visual_perceiver.data.images import ImageDataset
from hf_visual_perceiver.evaluation.evaluate import Measurement, Row, measure_budgets, plain
from hf_visual_perceiver.inference.loading import config_from_dict
from hf_visual_perceiver.modeling import Budget, ElasticConfig
from hf_visual_perceiver.utils.files import read_json, write_json


KINDS = ("macs", "ms", "accuracy_drop")
# Below this a 95 % interval is wider than about 8 points at 70 % accuracy.
FEW_IMAGES = 500


@dataclass(frozen=True)
class Target:
    """What a budget has to meet.

    Attributes:
        kind: `"macs"`, at most this fraction of the network's multiply-accumulates; `"ms"`, at most
            this many milliseconds per image; `"accuracy_drop"`, at most this many percentage points below all queries.
        value: The bound.

    Raises:
        ValueError: If the kind is unknown or the bound out of its range.
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
        """The one target that is given.

        Raises:
            ValueError: If there is none, or more than one.
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
    """A budget, what it is expected to do, and the curve that it was chosen from.

    Attributes:
        target: What was asked for.
        budget: What was chosen.
        chosen_on: What the budget did on the images that it was chosen on; too good, because it was chosen there.
        achieved: What it did on the other images.
        full: What the full network did on the other images.
        accuracy_interval: 95 % (Wilson) around the accuracy of `achieved`.
        drop: Percentage points of accuracy below the full network, on the other images.
        drop_interval: 95 %, paired: both ran on the same images.
        met: Whether the target also holds on the other images.
        curve: All budgets measured on the images that it was chosen on.
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
        raise ValueError("Expected a row of the full network among the rows, as the reference; got none.")
    return row


def target_value(row: Row, reference: Row, kind: str) -> float:
    """What a row has in the target's units: a fraction of the reference's MACs, ms per image, or points of accuracy."""
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
    """The row to run: for a cost, the most accurate that is cheap enough; for a drop, the cheapest accurate enough.

    Ties go to the cheaper one in MACs, or the more accurate one.

    Args:
        rows: Rows of the measured budgets, with the full network among them.
        target: What to meet.
        knobs: Names of the knobs by their short names, for the message.

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
    """What calibration tries: `candidates` of the config; with a target of MACs, also the largest budget that meets it.

    Args:
        config: The model's config.
        search: The knobs to turn, by short or long names; none is the first that the family has.
        target: What to meet.
    """
    budgets = config.candidates(search)
    if target is not None and target.kind == "macs" and config.knob_names(search) == config.knob_names():
        budgets.append(config.budget_for(target.value))
    return sorted(dict.fromkeys(budgets), key=config.count_macs)


def calibrate(
    model: Any,
    data: ImageDataset,
    target: Target,
    budgets: Sequence[Budget] | None = None,
    batch_size: int = 256,
    progress: bool = True,
) -> Calibration:
    """Choose a budget on every other image, and report what it does on the rest.

    Args:
        model: In eval mode, on the device and in the dtype to run.
        data: Labelled images that the model was not trained on, at least two.
        target: What to meet.
        budgets: What to try beside the full network; `candidate_budgets` if None.
        batch_size: Images of a batch; matters to a target of time.
        progress: Say on stderr how far it is.

    Raises:
        ValueError: If the target cannot be met, or the data do not fit the model.

    Example:
        >>> from hf_visual_perceiver.inference.loading import default_dataset, default_model, load_model
        >>> from hf_visual_perceiver.data.images import load_images
        >>> model, data = load_model(default_model()), load_images(default_dataset(), "test").subset(slice(0, 100))
        >>> budgets = [Budget(num_active_queries=4), Budget(num_active_queries=16)]
        >>> calibrate(model, data, Target("macs", 0.1), budgets, progress=False).budget
        Budget(num_active_queries=4)
    """
    if len(data) < 2:
        raise ValueError(
            f"Expected at least 2 images to calibrate on, half to choose and half to report, got {len(data)}."
        )
    budgets = candidate_budgets(model.config, target=target) if budgets is None else budgets
    # Every other image, so that both halves have all classes of a sorted set.
    halves = data.subset(slice(0, None, 2)), data.subset(slice(1, None, 2))
    measured = measure_budgets(model, halves[0], list(dict.fromkeys([*budgets, Budget()])), batch_size, progress)
    curve = [m.row() for m in measured]
    chosen = choose_budget(curve, target, model.config.knobs)
    others = measure_budgets(model, halves[1], [chosen.budget, Budget()], batch_size, progress)
    achieved, full = (m.row() for m in others)
    drop, drop_interval = accuracy_drop(others[1], others[0])
    # Wilson's stays inside [0, 1] for few images.
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
    """The 95 % interval, in percentage points, of a difference between two accuracies on the same images.

    Wald's interval on the discordant images, half an image added to each of the four cells (Agresti & Min 2005), which SciPy
    does not have.

    Args:
        lost: Images that only the first classifies rightly.
        won: Images that only the second does.
        images: All of them.

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
    """Make a budget the default of a checkpoint: the knobs in its config.json.

    Both loading libraries read it; all other keys stay as they are. The file is written aside and renamed.

    Raises:
        ValueError: If the folder has no readable config.json of a known model, or the budget is out of its range.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"Expected a model folder with a config.json to write to, got {str(folder)!r}.")
    write_json(path, with_default(read_json(path, dict), budget, str(path)))


def with_default(values: dict[str, Any], budget: Budget, source: str = "config.json") -> dict[str, Any]:
    """The values of a config.json with another default budget, for transformers and for timm.

    Raises:
        ValueError: If they are not of a known model, or the budget is out of its range.
    """
    config = config_from_dict(values, source)
    config.resolve(**budget.kwargs)
    if config.resolve(**budget.kwargs) == config.resolve():
        budget = Budget()
    knobs = {name: budget.kwargs.get(name) for name in config.knobs.values()}
    values = {**values, **knobs}
    if "model_args" in values:  # timm's copy
        values["model_args"] = {**values["model_args"], **knobs}
    config_from_dict(values, source)  # raises for what cannot be loaded
    return values
