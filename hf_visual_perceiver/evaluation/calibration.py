"""Calibration: the operating point (K, t) that meets a target, chosen on one half of a set and reported on the other."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy.stats import binomtest, norm

from hf_visual_perceiver.data.images import ImageDataset
from hf_visual_perceiver.evaluation.evaluate import Measurement, OperatingPoint, Row, measure_points
from hf_visual_perceiver.modeling import VisualPerceiverConfig, VisualPerceiverForImageClassification, count_macs
from hf_visual_perceiver.utils.files import write_json


KINDS = ("macs", "ms", "accuracy_drop")
SEARCHES = ("queries", "threshold", "both")
# Below this a 95 % interval is wider than about 8 points at 70 % accuracy.
FEW_IMAGES = 500


@dataclass(frozen=True)
class Target:
    """What an operating point has to meet.

    Attributes:
        kind: `"macs"`, at most this fraction of the network's multiply-accumulates with all queries; `"ms"`, at most
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
            raise ValueError(f"Expected a target of MACs in (0, 1], a fraction of all queries', got {self.value}.")
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
            "macs": f"at most {self.value:g} of the MACs of all queries",
            "ms": f"at most {self.value:g} ms per image",
            "accuracy_drop": f"at most {self.value:g} points below all queries",
        }
        return forms[self.kind]


@dataclass(frozen=True)
class Calibration:
    """An operating point, what it is expected to do, and the curve that it was chosen from.

    Attributes:
        target: What was asked for.
        point: What was chosen.
        chosen_on: What the point did on the images that it was chosen on; too good, because it was chosen there.
        achieved: What it did on the other images.
        full: What all queries did on the other images.
        accuracy_interval: 95 % (Wilson) around the accuracy of `achieved`.
        drop: Percentage points of accuracy below all queries, on the other images.
        drop_interval: 95 %, paired: both ran on the same images.
        met: Whether the target also holds on the other images.
        curve: All points measured on the images that it was chosen on.
    """

    target: Target
    point: OperatingPoint
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
        return asdict(self)


def reference_row(rows: Sequence[Row]) -> Row:
    """The row of all queries: of those without a threshold, the one with the most."""
    fixed = [row for row in rows if row.dqs_threshold is None]
    if not fixed:
        raise ValueError("Expected a row without a threshold among the rows, as the reference; got none.")
    return max(fixed, key=lambda row: row.queries_mean)


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


def choose_operating_point(rows: Sequence[Row], target: Target) -> Row:
    """The row to run: for a cost, the most accurate that is cheap enough; for a drop, the cheapest accurate enough.

    Ties go to the cheaper one in MACs, or the more accurate one.

    Args:
        rows: Measured operating points, that of all queries among them.
        target: What to meet.

    Raises:
        ValueError: If no row meets the target; the message says which comes nearest.

    Example:
        >>> def row(K, accuracy, macs):
        ...     return Row(K, None, K, 0.0, K, K, macs, accuracy, 0.01, macs, macs)
        >>> rows = [row(8, 0.6, 1.0), row(32, 0.72, 5.0), row(64, 0.74, 10.0)]
        >>> choose_operating_point(rows, Target("macs", 0.5)).num_active_queries
        32
        >>> choose_operating_point(rows, Target("accuracy_drop", 0.5)).num_active_queries
        64
    """
    reference = reference_row(rows)
    fitting = [row for row in rows if meets(row, reference, target)]
    if not fitting:
        nearest = min(rows, key=lambda row: target_value(row, reference, target.kind))
        raise ValueError(
            f"Expected a target that can be met, got {target}; of what was measured, {nearest.point} comes nearest "
            f"with {target_value(nearest, reference, target.kind):.3g}."
        )
    if target.kind == "accuracy_drop":
        return min(fitting, key=lambda row: (row.macs, -row.accuracy))
    return min(fitting, key=lambda row: (-row.accuracy, row.macs))


def candidate_points(
    config: VisualPerceiverConfig, search: str = "queries", target: Target | None = None
) -> list[OperatingPoint]:
    """What calibration tries: budgets K, thresholds t, or thresholds at several K; all queries are always among them.

    With a target of MACs, the largest K that meets it is tried too.

    Example:
        >>> [p.num_active_queries for p in candidate_points(VisualPerceiverConfig(num_queries=8))]
        [1, 2, 3, 4, 5, 6, 7, 8]
    """
    if search not in SEARCHES:
        raise ValueError(f"Expected the search to be one of {', '.join(SEARCHES)}, got {search!r}.")
    Q = config.num_queries
    points = [OperatingPoint(Q)]
    if search in ("queries", "both"):
        # Each K up to 8, then steps of about an eighth.
        budgets, K = [], 1
        while K < Q:
            budgets.append(K)
            K += max(1, K // 8)
        if target is not None and target.kind == "macs":
            full = count_macs(config, Q)
            budgets += [K for K in range(1, Q + 1) if count_macs(config, K) <= target.value * full][-1:]
        points += [OperatingPoint(K) for K in sorted(set(budgets))]
    thresholds = [round(0.5 + 0.05 * i, 2) for i in range(10)] + [0.98, 0.99]
    if search == "threshold":
        points += [OperatingPoint(None, t) for t in thresholds]
    if search == "both":
        caps = sorted({max(1, Q * eighths // 8) for eighths in (1, 2, 3, 4, 6, 8)})
        points += [OperatingPoint(K, t) for K in caps for t in thresholds[4:]]
    # Ascending K, all queries last: as a curve is read.
    return sorted(
        dict.fromkeys(points),
        key=lambda p: (p.dqs_threshold or 0, Q if p.num_active_queries is None else p.num_active_queries),
    )


def calibrate(
    model: VisualPerceiverForImageClassification,
    data: ImageDataset,
    target: Target,
    points: Sequence[OperatingPoint] | None = None,
    batch_size: int = 256,
    progress: bool = True,
) -> Calibration:
    """Choose an operating point on every other image, and report what it does on the rest.

    Args:
        model: In eval mode, on the device and in the dtype to run.
        data: Labelled images that the model was not trained on, at least two.
        target: What to meet.
        points: What to try beside all queries; `candidate_points` if None.
        batch_size: Images of a batch; matters to a target of time.
        progress: Say on stderr how far it is.

    Raises:
        ValueError: If the target cannot be met, or the data do not fit the model.

    Example:
        >>> from hf_visual_perceiver.inference.loading import default_dataset, default_model, load_model
        >>> from hf_visual_perceiver.data.images import load_images
        >>> model, data = load_model(default_model()), load_images(default_dataset(), "test").subset(slice(0, 100))
        >>> points = [OperatingPoint(4), OperatingPoint(16)]
        >>> calibrate(model, data, Target("macs", 0.1), points, progress=False).point
        OperatingPoint(num_active_queries=4, dqs_threshold=None)
    """
    if len(data) < 2:
        raise ValueError(
            f"Expected at least 2 images to calibrate on, half to choose and half to report, got {len(data)}."
        )
    everything = OperatingPoint(model.config.num_queries)
    points = candidate_points(model.config, "queries", target) if points is None else points
    # Every other image, so that both halves have all classes of a sorted set.
    halves = data.subset(slice(0, None, 2)), data.subset(slice(1, None, 2))
    measured = measure_points(model, halves[0], list(dict.fromkeys([*points, everything])), batch_size, progress)
    curve = [m.row(model) for m in measured]
    chosen = choose_operating_point(curve, target)
    others = measure_points(model, halves[1], [chosen.point, everything], batch_size, progress)
    achieved, full = (m.row(model) for m in others)
    drop, drop_interval = accuracy_drop(others[1], others[0])
    # Wilson's stays inside [0, 1] for few images.
    interval = binomtest(int(others[0].correct.sum()), len(halves[1])).proportion_ci(method="wilson")
    return Calibration(
        target=target,
        point=chosen.point,
        chosen_on=chosen,
        achieved=achieved,
        full=full,
        accuracy_interval=(float(interval.low), float(interval.high)),
        drop=drop,
        drop_interval=drop_interval,
        met=meets(achieved, full, target),
        curve=curve,
    )


def accuracy_drop(full: Measurement, point: Measurement) -> tuple[float, tuple[float, float]]:
    """Percentage points that `point` loses to `full` on the same images, and the paired 95 % interval."""
    lost = int((full.correct & ~point.correct).sum())
    won = int((~full.correct & point.correct).sum())
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


def write_operating_point(folder: str | Path, point: OperatingPoint) -> None:
    """Make a point the default of a checkpoint: `num_active_queries` and `dqs_threshold` of its config.json.

    Both loading libraries read it; all other keys stay as they are. The file is written aside and renamed.

    Raises:
        ValueError: If the folder has no readable config.json of this model, or the point is out of its range.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"Expected a model folder with a config.json to write to, got {str(folder)!r}.")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"Expected {path} to be JSON, got {error}.") from error
    if values.get("model_type") != VisualPerceiverConfig.model_type:
        raise ValueError(f"Expected a model of type visual_perceiver in {path}, got {values.get('model_type')!r}.")
    K = point.num_active_queries
    operating_point = {
        "num_active_queries": None if values["num_queries"] == K else K,
        "dqs_threshold": point.dqs_threshold,
    }
    values |= operating_point
    if "model_args" in values:  # timm's copy
        values["model_args"] |= operating_point
    VisualPerceiverConfig.from_dict(values)  # raises for what cannot be loaded
    write_json(path, values)
