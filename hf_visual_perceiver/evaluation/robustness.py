"""Accuracy and queries kept under common corruptions, at several operating points."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_visual_perceiver.data.images import ImageDataset, normalise, pixels_of_size
from hf_visual_perceiver.data.parts import evenly_spaced
from hf_visual_perceiver.evaluation.corruptions import CORRUPTIONS, SEVERITIES, Cifar10C, corrupt
from hf_visual_perceiver.evaluation.difficulty import Difficulty, measure_difficulty
from hf_visual_perceiver.evaluation.evaluate import OperatingPoint, form_of, forward_at, labels_of_model
from hf_visual_perceiver.modeling import OptimizedVisualPerceiver, VisualPerceiverForImageClassification
from hf_visual_perceiver.utils.conditions import measurement_conditions
from hf_visual_perceiver.utils.console import tracked
from hf_visual_perceiver.utils.files import read_json


BUDGETS = (8, 16, 32, 64)
THRESHOLDS = (0.7, 0.8, 0.9)
CLEAN, ALL = "clean", "all"


@dataclass(frozen=True)
class Outcome:
    """What one operating point did on the images of a cell.

    Attributes:
        num_active_queries: K; None with selection among all queries.
        dqs_threshold: t; None without selection.
        accuracy: Mean over images, and over corruptions and severities where the cell has several.
        standard_error: Standard error of `accuracy` over images, for the given corruptions.
        queries_mean: Mean number of queries used.
    """

    num_active_queries: int | None
    dqs_threshold: float | None
    accuracy: float
    standard_error: float
    queries_mean: float

    @property
    def point(self) -> OperatingPoint:
        return OperatingPoint(self.num_active_queries, self.dqs_threshold)


@dataclass(frozen=True)
class Cell:
    """The outcomes under one corruption at one severity.

    Attributes:
        corruption: Its name, `"clean"` or `"all"`.
        severity: 0 for clean images; None is the mean over the severities measured.
        outcomes: One per operating point, in the order of the result.
    """

    corruption: str
    severity: int | None
    outcomes: list[Outcome]


@dataclass(frozen=True)
class Robustness:
    """The result of `measure_robustness`.

    Attributes:
        cells: Clean images; each corruption at each severity and their mean; all corruptions at each severity and their mean.
        difficulty: For each t, on clean images.
        conditions: What was measured on what.
    """

    cells: list[Cell]
    difficulty: list[Difficulty]
    conditions: dict[str, Any]

    @property
    def points(self) -> list[OperatingPoint]:
        """The operating points, in the order of every cell's outcomes."""
        return [outcome.point for outcome in self.cells[0].outcomes]

    @property
    def full(self) -> OperatingPoint:
        """All queries, which is always measured."""
        return max((p for p in self.points if p.dqs_threshold is None), key=lambda p: p.num_active_queries or 0)

    @property
    def corruptions(self) -> list[str]:
        """The corruptions measured."""
        return [cell.corruption for cell in self.cells if cell.severity is None and cell.corruption != ALL]

    @property
    def severities(self) -> list[int]:
        """The severities measured, ascending."""
        return sorted({cell.severity for cell in self.cells if cell.severity})

    def cell(self, corruption: str, severity: int | None) -> list[Outcome]:
        """The outcomes under a corruption at a severity.

        Raises:
            ValueError: If that was not measured.
        """
        for cell in self.cells:
            if (cell.corruption, cell.severity) == (corruption, severity):
                return cell.outcomes
        measured = f"{', '.join(self.corruptions)} at {', '.join(map(str, self.severities))}"
        raise ValueError(f"Expected a corruption and severity among {measured}, got {corruption!r} at {severity}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Robustness":
        """The inverse of `to_dict`."""
        cells = [
            Cell(cell["corruption"], cell["severity"], [Outcome(**outcome) for outcome in cell["outcomes"]])
            for cell in values["cells"]
        ]
        return cls(cells, [Difficulty.from_dict(d) for d in values["difficulty"]], values["conditions"])


def read_robustness(path: Path) -> Robustness:
    """Read a result that was written as JSON.

    Raises:
        ValueError: If the file is damaged.
    """
    return read_json(path, Robustness.from_dict)


def robustness_points(
    num_queries: int, budgets: Sequence[int] = BUDGETS, thresholds: Sequence[float] = THRESHOLDS
) -> list[OperatingPoint]:
    """The budgets that a model with Q queries has, all Q, and the thresholds.

    Example:
        >>> [str(point) for point in robustness_points(32, thresholds=[0.8])]
        ['K = 8', 'K = 16', 'K = 32', 't = 0.8']
    """
    budgets = [*sorted({K for K in budgets if num_queries > K}), num_queries]
    return [*map(OperatingPoint, budgets), *(OperatingPoint(None, t) for t in sorted(set(thresholds)))]


def measure_robustness(
    model: VisualPerceiverForImageClassification | OptimizedVisualPerceiver,
    data: ImageDataset,
    points: Sequence[OperatingPoint] | None = None,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    max_images: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = True,
    conditions: dict[str, Any] | None = None,
    cifar10_c: Path | None = None,
) -> Robustness:
    """Measure accuracy and queries used on clean and corrupted images.

    Our own corruptions are applied to images of the network's size; those of CIFAR-10-C are read, then brought to that size.

    Args:
        model: In eval mode, on the device and in the dtype to measure.
        data: Images that the model has labels for.
        points: What to measure, all queries among it; `robustness_points` if None.
        corruptions: Keys of `CORRUPTIONS`, or names of files of CIFAR-10-C; None is all.
        severities: Some of 1 to 5.
        max_images: At most so many, evenly spaced in the dataset; None for all.
        seed: Random seed of the corruptions.
        batch_size: Images of a batch.
        progress: Say on stderr how far it is.
        conditions: More facts to keep with the result, such as the names of model and dataset.
        cifar10_c: Folder of the published CIFAR-10-C, to read instead of corrupting; `data` are then CIFAR-10's test images.

    Raises:
        ValueError: If the dataset's labels are not the model's, or an argument is out of its range.
    """
    config = model.config
    points = robustness_points(config.num_queries) if points is None else list(dict.fromkeys(points))
    published = None if cifar10_c is None else Cifar10C(cifar10_c, data)
    known = list(CORRUPTIONS) if published is None else published.corruptions
    corruptions = known if corruptions is None else list(dict.fromkeys(corruptions))
    severities = sorted(set(severities))
    _check(model, points, corruptions, known, severities, batch_size)
    places_in_data = evenly_spaced(len(data), max_images)
    chosen, count = data if max_images is None else data.subset(places_in_data), len(places_in_data)
    labels = labels_of_model(model, chosen)

    kinds = [(CLEAN, 0), *((c, s) for c in corruptions for s in severities)]
    right = np.zeros((len(kinds), len(points), count), dtype=bool)
    queries = np.zeros((len(kinds), len(points), count), dtype=np.int32)
    confidence = np.zeros(count)
    full = points.index(OperatingPoint(config.num_queries))
    cfg = config.timm_pretrained_cfg
    size, interpolation = config.image_height_width, cfg["interpolation"]
    batches = [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
    pieces = [(places, kind) for places in batches for kind in range(len(kinds))]
    for places, kind in tracked(pieces, "corrupting" if progress else None):
        (corruption, severity), here = kinds[kind], slice(places.start, places.stop)
        if corruption == CLEAN:  # the first kind
            images = clean = pixels_of_size(chosen, places, size, interpolation)
        elif published is not None:
            corrupted = published.images(corruption, severity).subset(places_in_data[here])
            images = pixels_of_size(corrupted, range(len(places)), size, interpolation)
        else:
            images = corrupt(clean, corruption, severity, seed, places_in_data[here].tolist())
        pixels = normalise(images, cfg["mean"], cfg["std"]).to(model.device, model.dtype)
        for number, point in enumerate(points):
            logits, active = forward_at(model, pixels, point)
            right[kind, number, here] = logits.argmax(-1).cpu().numpy() == labels[here]
            queries[kind, number, here] = active.sum(1).cpu().numpy()
            if corruption == CLEAN and number == full:
                confidence[here] = logits.float().softmax(-1).amax(-1).cpu().numpy()

    def cell(corruption: str, severity: int | None, members: list[int]) -> Cell:
        scores = right[members].mean(0)  # (points, images)
        errors = scores.std(1) / np.sqrt(count)
        used = queries[members].mean((0, 2))
        rows = zip(points, scores.mean(1).tolist(), errors.tolist(), used.tolist(), strict=True)
        return Cell(corruption, severity, [Outcome(p.num_active_queries, p.dqs_threshold, *row) for p, *row in rows])

    cells = [cell(CLEAN, 0, [0])]
    for corruption in [*corruptions, ALL]:
        members = [i for i, (name, _) in enumerate(kinds) if name == corruption or (corruption == ALL and i)]
        for severity in severities:
            cells.append(cell(corruption, severity, [i for i in members if kinds[i][1] == severity]))
        cells.append(cell(corruption, None, members))
    difficulty = [
        measure_difficulty(point.dqs_threshold, queries[0, number], confidence, right[0, full])
        for number, point in enumerate(points)
        if point.dqs_threshold is not None and point.num_active_queries is None
    ]
    measured_under = measurement_conditions(
        model.device,
        **form_of(model),
        batch_size=batch_size,
        images=count,
        images_in_split=len(data),
        seed=seed,
        corrupted_by="this package" if published is None else "CIFAR-10-C",
        **(conditions or {}),
    )
    return Robustness(cells, difficulty, measured_under)


def _check(
    model: VisualPerceiverForImageClassification | OptimizedVisualPerceiver,
    points: list[OperatingPoint],
    corruptions: list[str],
    known: list[str],
    severities: list[int],
    batch_size: int,
) -> None:
    for point in points:
        model.config.operating_point(point.num_active_queries, point.dqs_threshold)
    if OperatingPoint(model.config.num_queries) not in points:
        raise ValueError(
            f"Expected all {model.config.num_queries} queries among the points, got {', '.join(map(str, points))}."
        )
    unknown = [c for c in corruptions if c not in known]
    if unknown or not corruptions:
        raise ValueError(f"Expected corruptions among {', '.join(known)}, got {', '.join(unknown) or 'none'}.")
    if not severities or not set(severities) <= set(SEVERITIES):
        raise ValueError(f"Expected severities from 1 to 5, got {', '.join(map(str, severities)) or 'none'}.")
    if batch_size < 1:
        raise ValueError(f"Expected a batch size of at least 1, got {batch_size}.")
