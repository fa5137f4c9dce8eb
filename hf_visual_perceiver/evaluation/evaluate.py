"""Accuracy, cost and time of a checkpoint at every budget, in one pass over a dataset.

Results can be read without the packages that measuring takes (extra `cli`), as the Space does.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_visual_perceiver.evaluation.confusion import Confusion
from hf_visual_perceiver.modeling import (
    OptimizedVisualPerceiver,
    VisualPerceiverConfig,
    VisualPerceiverForImageClassification,
    VisualPerceiverModel,
    count_macs,
)
from hf_visual_perceiver.modeling.query_selection import as_number
from hf_visual_perceiver.utils.conditions import measurement_conditions
from hf_visual_perceiver.utils.console import tracked
from hf_visual_perceiver.utils.files import read_json


if TYPE_CHECKING:
    from hf_visual_perceiver.data.images import ImageDataset


logger = logging.getLogger(__name__)

# The budgets and thresholds of the paper's Tables 1 to 3.
PAPER_QUERIES = (1, 2, 4, 8, 16, 32, 48, 64)
PAPER_THRESHOLDS = (0.6, 0.65, 0.7, 0.8, 0.9, 0.99)


@dataclass(frozen=True)
class OperatingPoint:
    """A setting of the two knobs; None leaves K at all queries and t off, whatever the checkpoint's default."""

    num_active_queries: int | None = None
    dqs_threshold: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_active_queries", "dqs_threshold"):
            object.__setattr__(self, name, as_number(getattr(self, name)))

    def knobs(self, config: VisualPerceiverConfig) -> dict[str, Any]:
        """The arguments of `forward` that mean this point; to it None would be the checkpoint's default.

        Example:
            >>> OperatingPoint(8).knobs(VisualPerceiverConfig(dqs_threshold=0.8))
            {'num_active_queries': 8, 'dqs_threshold': inf}
        """
        K, t = self.num_active_queries, self.dqs_threshold
        return {
            "num_active_queries": config.num_queries if K is None else K,
            "dqs_threshold": math.inf if t is None else t,
        }

    def __str__(self) -> str:
        parts = [f"K = {self.num_active_queries}"] if self.num_active_queries is not None else []
        parts += [f"t = {self.dqs_threshold:g}"] if self.dqs_threshold is not None else []
        return ", ".join(parts) or "all queries"


@dataclass(frozen=True)
class Row:
    """What one operating point was measured to do."""

    num_active_queries: int | None
    dqs_threshold: float | None
    queries_mean: float
    queries_std: float
    queries_min: int
    queries_max: int
    macs: float  # mean per image
    accuracy: float
    standard_error: float
    ms_per_image: float  # median over batches
    relative_time: float  # to all queries on the same batch, median over batches

    @property
    def point(self) -> OperatingPoint:
        return OperatingPoint(self.num_active_queries, self.dqs_threshold)


@dataclass(frozen=True)
class Measurement:
    """What one operating point did to each of n images.

    Attributes:
        point: The setting.
        predictions: (n,) class indices.
        labels: (n,) the right ones.
        queries: (n,) active queries.
        seconds: Per image, one value for each batch.
        reference_seconds: The same of all queries on the same batches.
    """

    point: OperatingPoint
    predictions: np.ndarray
    labels: np.ndarray
    queries: np.ndarray
    seconds: np.ndarray
    reference_seconds: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """(n,) bool: which images were classified as labelled."""
        return self.predictions == self.labels

    def row(self, model: VisualPerceiverForImageClassification | OptimizedVisualPerceiver) -> Row:
        """The summary over images; times are medians over batches."""
        from hf_visual_perceiver.evaluation.metrics import Accuracy

        score = Accuracy(keep_in_memory=True).compute(predictions=self.predictions, references=self.labels)
        return Row(
            num_active_queries=self.point.num_active_queries,
            dqs_threshold=self.point.dqs_threshold,
            queries_mean=float(self.queries.mean()),
            queries_std=float(self.queries.std()),
            queries_min=int(self.queries.min()),
            queries_max=int(self.queries.max()),
            macs=mean_macs(model.config, self.queries, self.point),
            accuracy=score["accuracy"],
            standard_error=score["standard_error"],
            ms_per_image=1000 * float(np.median(self.seconds)),
            relative_time=float(np.median(self.seconds / self.reference_seconds)),
        )


@dataclass(frozen=True)
class Evaluation:
    """The rows of a sweep and the conditions that they were measured under.

    Attributes:
        rows: One for each operating point.
        conditions: Hardware, versions, data.
        confusion: Of all queries; None in results from before it was measured.
    """

    rows: list[Row]
    conditions: dict[str, Any]
    confusion: Confusion | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        confusion = {} if self.confusion is None else {"confusion": self.confusion.counts}
        return {"conditions": self.conditions, "rows": [asdict(row) for row in self.rows], **confusion}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Evaluation":
        """The inverse of `to_dict`."""
        confusion = Confusion(values["confusion"]) if "confusion" in values else None
        return cls([Row(**row) for row in values["rows"]], values["conditions"], confusion)


def read_evaluation(path: Path) -> Evaluation:
    """Read a result that was written as JSON.

    Raises:
        ValueError: If the file is damaged.
    """
    return read_json(path, Evaluation.from_dict)


def default_points(num_queries: int) -> list[OperatingPoint]:
    """The paper's budgets that a model with Q queries has, all Q, and the paper's thresholds."""
    budgets = [*(K for K in PAPER_QUERIES if num_queries > K), num_queries]
    return [*(OperatingPoint(K) for K in budgets), *(OperatingPoint(None, t) for t in PAPER_THRESHOLDS)]


def evaluate(
    model: VisualPerceiverForImageClassification | OptimizedVisualPerceiver,
    data: "ImageDataset",
    points: Sequence[OperatingPoint] | None = None,
    batch_size: int = 256,
    progress: bool = True,
    conditions: dict[str, Any] | None = None,
) -> Evaluation:
    """Measure accuracy, active queries, MACs and time at several operating points, and what is taken for what.

    Every batch goes through all points in turn, after a warm-up on the first one, so that times are compared on the same
    images within moments of each other. Times are of the model alone, on images that are ready on its device.

    Args:
        model: In eval mode, on the device and in the dtype to measure.
        data: Images that the model has labels for.
        points: What to measure; `default_points` if None.
        batch_size: Images of a batch.
        progress: Say on stderr how far it is.
        conditions: More facts to keep with the result, such as the names of model and dataset.

    Raises:
        ValueError: If the dataset's labels are not the model's, or a point is out of the model's range.
    """
    config, all_queries = model.config, OperatingPoint(model.config.num_queries)
    points = list(dict.fromkeys(points)) if points is not None else default_points(config.num_queries)
    measured = measure_points(model, data, list(dict.fromkeys([*points, all_queries])), batch_size, progress)
    measured_under = measurement_conditions(
        model.device,
        **form_of(model),
        batch_size=batch_size,
        images=len(data),
        **(conditions or {}),
    )
    full = next(m for m in measured if m.point == all_queries)
    confusion = Confusion.of(config.label_names, full.labels, full.predictions)
    return Evaluation([m.row(model) for m in measured if m.point in points], measured_under, confusion)


def form_of(model: VisualPerceiverForImageClassification | OptimizedVisualPerceiver) -> dict[str, str]:
    """The dtype, and attention or "optimized", of a model, for the conditions of a measurement."""
    optimized = isinstance(model, OptimizedVisualPerceiver)
    form = {"form": "optimized"} if optimized else {"attention": str(model.config._attn_implementation)}
    return {"dtype": str(model.dtype).removeprefix("torch."), **form}


def measure_points(
    model: VisualPerceiverForImageClassification | OptimizedVisualPerceiver,
    data: "ImageDataset",
    points: Sequence[OperatingPoint],
    batch_size: int = 256,
    progress: bool = True,
) -> list[Measurement]:
    """What `evaluate` is made of: what every image did at each of `points`, which are taken as they come.

    Raises:
        ValueError: If `evaluate` raises it.
    """
    config = model.config
    all_labels = labels_of_model(model, data)
    all_queries = OperatingPoint(config.num_queries)
    for point in points:
        config.operating_point(point.num_active_queries, point.dqs_threshold)
    if batch_size < 1:
        raise ValueError(f"Expected a batch size of at least 1, got {batch_size}.")

    # The reference of relative times runs too, if it is not among the points.
    measured = list(dict.fromkeys([*points, all_queries]))
    predictions: dict[OperatingPoint, list[np.ndarray]] = {point: [] for point in measured}
    queries: dict[OperatingPoint, list[np.ndarray]] = {point: [] for point in measured}
    seconds: dict[OperatingPoint, list[float]] = {point: [] for point in measured}
    batches = pixel_batches(model, data, batch_size, "evaluating" if progress else None)
    for number, (indices, pixels) in enumerate(batches):
        if number == 0:
            for point in measured:
                _timed_forward(model, pixels, point)
        for point in measured:
            elapsed, logits, active = _timed_forward(model, pixels, point)
            predictions[point].append(logits.argmax(-1).cpu().numpy())
            queries[point].append(active.sum(1).cpu().numpy())
            seconds[point].append(elapsed / len(indices))

    reference = np.asarray(seconds[all_queries])
    return [
        Measurement(
            point,
            np.concatenate(predictions[point]),
            all_labels,
            np.concatenate(queries[point]),
            np.asarray(seconds[point]),
            reference,
        )
        for point in points
    ]


def pixel_batches(
    model: VisualPerceiverForImageClassification | OptimizedVisualPerceiver | VisualPerceiverModel,
    data: "ImageDataset",
    batch_size: int,
    description: str | None = None,
) -> Iterator[tuple[range, torch.Tensor]]:
    """The indices of each batch and its `pixel_values` (B, C, H, W), as the model takes them and where it is.

    With a `description`, stderr shows how far it is.
    """
    from hf_visual_perceiver.data.images import normalise, pixels_of_size

    config = model.config
    cfg = config.timm_pretrained_cfg
    batches = [range(i, min(i + batch_size, len(data))) for i in range(0, len(data), batch_size)]
    for indices in tracked(batches, description):
        pixels = pixels_of_size(data, indices, config.image_height_width, cfg["interpolation"])
        pixels = normalise(pixels, cfg["mean"], cfg["std"])
        yield indices, pixels.to(model.device, model.dtype)


def labels_of_model(
    model: VisualPerceiverForImageClassification | OptimizedVisualPerceiver, data: "ImageDataset"
) -> np.ndarray:
    """The dataset's labels as indices of the model's classes, (n,).

    Classes are matched by name. If the dataset's names are numbers (or LABEL_n) that the model does not have, they are
    taken for indices, and if the model's are LABEL_n, for the dataset's classes in their order; a warning says so.

    Raises:
        ValueError: If the dataset has a class that the model does not know, or knows twice.
    """
    names, given = model.config.label_names, data.label_names
    if given == names:
        return data.labels
    unknown = [n for n in given if n not in names]
    if not unknown:
        if twice := [n for n in given if names.count(n) > 1]:
            raise ValueError(
                f"Expected names of one class each, got {', '.join(twice[:10])}, which the model has twice."
            )
        return np.array([names.index(n) for n in given])[data.labels]
    numbers = [n.removeprefix("LABEL_") for n in given]
    if all(n.isdecimal() for n in numbers) and not all(n.isdecimal() for n in names):
        indices = np.array([int(n) for n in numbers])
    elif all(n.startswith("LABEL_") for n in names):
        indices = np.arange(len(given))
    else:
        raise ValueError(f"Expected classes among {', '.join(names)}, got {', '.join(unknown[:10])}.")
    if indices.max() >= len(names):
        raise ValueError(f"Expected labels in [0, {len(names)}), got {indices.max()}.")
    logger.warning("Classes are matched by index: the model does not have the dataset's names, such as %s.", unknown[0])
    return indices[data.labels]


def _timed_forward(
    model: VisualPerceiverForImageClassification | OptimizedVisualPerceiver, pixels: torch.Tensor, point: OperatingPoint
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Seconds, logits (B, labels) and active queries (B, Q)."""

    def synchronise() -> None:
        if pixels.device.type == "cuda":
            torch.cuda.synchronize(pixels.device)

    synchronise()
    began = time.perf_counter()
    logits, active = forward_at(model, pixels, point)
    synchronise()
    return time.perf_counter() - began, logits, active


def forward_at(model: Any, pixels: torch.Tensor, point: OperatingPoint) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, labels) and active queries (B, Q) at an operating point, whatever the checkpoint's own.

    Raises:
        ValueError: If the batch does not fit in memory; the message has a size that does.
    """
    output = output_at(model, pixels, point)
    return output.logits, output.active_queries


@torch.inference_mode()
def output_at(model: Any, pixels: torch.Tensor, point: OperatingPoint) -> Any:
    """What a model, with or without a head, returns at an operating point, whatever the checkpoint's own.

    Raises:
        ValueError: If `forward_at` raises it.
    """
    from hf_visual_perceiver.utils.memory import fitting

    run = partial(model, **point.knobs(model.config))
    with fitting(run, pixels):
        return run(pixels)


def mean_macs(config: VisualPerceiverConfig, counts: np.ndarray, point: OperatingPoint) -> float:
    """Mean over images that used `counts` queries; with selection, reading and comparing all candidates counts too."""
    K = config.num_queries if point.num_active_queries is None else point.num_active_queries
    candidates = None if point.dqs_threshold is None else K
    values, images = np.unique(counts, return_counts=True)
    macs = [count_macs(config, int(k), candidates) for k in values]
    return float(np.average(macs, weights=images))
