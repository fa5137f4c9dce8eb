"""Accuracy, cost and time of a checkpoint at every budget, in one pass over a dataset.

Reading results does not need the packages that measuring needs (extra `cli`); the Space relies on this.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_visual_perceiver.evaluation.confusion import Confusion
from hf_visual_perceiver.inference.cascade import top_probability
from hf_visual_perceiver.modeling import Budget, ElasticConfig, ElasticModel
from hf_visual_perceiver.utils.conditions import measurement_conditions
from hf_visual_perceiver.utils.console import tracked
from hf_visual_perceiver.utils.files import read_json


if TYPE_CHECKING:
    from hf_visual_perceiver.data.images import ImageDataset


logger = logging.getLogger(__name__)

# Results from before there were several families do not contain these; they are all of the Visual Perceiver.
FORMER_UNIT, FORMER_KNOBS = "queries", {"K": "num_active_queries", "t": "dqs_threshold"}


@dataclass(frozen=True)
class Row:
    """The summary of one budget's results."""

    budget: Budget
    used_mean: float  # usage per image, in the evaluation's `unit`, such as queries
    used_std: float
    used_min: int
    used_max: int
    macs: float  # mean per image
    accuracy: float
    standard_error: float
    ms_per_image: float  # median over batches
    relative_time: float  # relative to the full network on the same batch, median over batches


@dataclass(frozen=True)
class Measurement:
    """The results of one budget on each of n images.

    Attributes:
        budget: The budget.
        predictions: (n,) predicted class indices.
        labels: (n,) true class indices.
        used: (n,) how much each image used, such as the number of queries.
        macs: (n,) multiply-accumulates of each image.
        confidence: (n,) top probability.
        seconds: Time per image, one value per batch.
        reference_seconds: The full network's time per image on the same batches.
        logits: (n, labels) if they were asked for.
    """

    budget: Budget
    predictions: np.ndarray
    labels: np.ndarray
    used: np.ndarray
    macs: np.ndarray
    confidence: np.ndarray
    seconds: np.ndarray
    reference_seconds: np.ndarray
    logits: np.ndarray | None = None

    @property
    def correct(self) -> np.ndarray:
        """(n,) bool: which images were classified correctly."""
        return self.predictions == self.labels

    def row(self) -> Row:
        """The summary over images; times are medians over batches."""
        from hf_visual_perceiver.evaluation.metrics import Accuracy

        score = Accuracy(keep_in_memory=True).compute(predictions=self.predictions, references=self.labels)
        return Row(
            budget=self.budget,
            used_mean=float(self.used.mean()),
            used_std=float(self.used.std()),
            used_min=int(self.used.min()),
            used_max=int(self.used.max()),
            macs=float(self.macs.mean()),
            accuracy=score["accuracy"],
            standard_error=score["standard_error"],
            ms_per_image=1000 * float(np.median(self.seconds)),
            relative_time=float(np.median(self.seconds / self.reference_seconds)),
        )


@dataclass(frozen=True)
class Evaluation:
    """The rows of a sweep and the conditions that they were measured under.

    Attributes:
        rows: One row per budget.
        conditions: Hardware, versions, data.
        confusion: Confusion matrix of the full network; None in results of earlier versions.
        unit: The unit in which usage is counted, such as queries; see `ElasticConfig`.
        knobs: Names of the knobs, by their short names.
        int8: Accuracy of the engine with linear layers in int8, by the names of fixed budgets; see `int8_accuracy`.
    """

    rows: list[Row]
    conditions: dict[str, Any]
    confusion: Confusion | None = None
    unit: str = FORMER_UNIT
    knobs: dict[str, str] = field(default_factory=lambda: dict(FORMER_KNOBS))
    int8: dict[str, float] = field(default_factory=dict)

    def name(self, budget: Budget) -> str:
        """The name of a budget in tables."""
        return budget.short(self.knobs)

    def series(self) -> dict[str, list[Row]]:
        """Group the rows by the knobs that they set, ascending in cost; the full network joins the first group."""
        short = {name: knob for knob, name in self.knobs.items()}
        first = next(iter(self.knobs), "")
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(", ".join(short.get(name, name) for name in row.budget.kwargs) or first, []).append(row)
        return {name: sorted(rows, key=lambda row: row.macs) for name, rows in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        more: dict[str, Any] = {} if self.confusion is None else {"confusion": self.confusion.counts}
        if self.int8:
            more["int8"] = self.int8
        naming = {"unit": self.unit, "knobs": self.knobs}
        return {**naming, "conditions": self.conditions, "rows": [plain(row) for row in self.rows], **more}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Evaluation":
        """The inverse of `to_dict`; also reads results of earlier versions."""
        confusion = Confusion(values["confusion"]) if "confusion" in values else None
        naming = {key: values[key] for key in ("unit", "knobs", "int8") if key in values}
        rows = [Row(**with_budget(row)) for row in values["rows"]]
        return cls(rows, values["conditions"], confusion, **naming)


def plain(result: Any) -> dict[str, Any]:
    """Convert a dataclass to plain values; budgets become dicts of their knobs."""
    return asdict(
        result,
        dict_factory=lambda pairs: {key: value.kwargs if isinstance(value, Budget) else value for key, value in pairs},
    )


def with_budget(values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `plain` for values with a budget; also reads what earlier versions wrote for the Visual Perceiver.

    Example:
        >>> with_budget({"num_active_queries": 8, "dqs_threshold": None, "queries_mean": 8.0})
        {'budget': Budget(num_active_queries=8), 'used_mean': 8.0}
    """
    if "budget" in values:
        return {**values, "budget": Budget(**values["budget"])}
    others = {
        key.replace("queries_", "used_"): value for key, value in values.items() if key not in FORMER_KNOBS.values()
    }
    return {"budget": Budget(**{name: values[name] for name in FORMER_KNOBS.values()}), **others}


def read_evaluation(path: Path) -> Evaluation:
    """Read a result that was written as JSON.

    Raises:
        ValueError: If the file is damaged.
    """
    return read_json(path, Evaluation.from_dict)


def default_budgets(config: ElasticConfig) -> list[Budget]:
    """The budgets that are measured by default: first the fixed ones, then the adaptive ones."""
    return [*config.budgets(), *config.adaptive_budgets()]


def evaluate(
    model: Any,
    data: "ImageDataset",
    budgets: Sequence[Budget] | None = None,
    batch_size: int = 256,
    progress: bool = True,
    conditions: dict[str, Any] | None = None,
) -> Evaluation:
    """Measure accuracy, usage (such as queries per image), MACs and time at several budgets, and the confusion matrix.

    Every batch goes through all budgets in turn, after a warm-up on the first batch, so that times are compared on the
    same images within moments of each other. Times are of the model alone, on images that are already on its device.

    Args:
        model: A model in eval mode, on the device and in the dtype to measure.
        data: Images whose classes the model knows.
        budgets: Budgets to measure, regardless of the model's default; `default_budgets` if None.
        batch_size: Number of images per batch.
        progress: Whether to show progress on stderr.
        conditions: Further facts to store with the result, such as the names of model and dataset.

    Raises:
        ValueError: If the dataset's labels are not the model's, or a budget is out of the model's range.
    """
    config = model.config
    budgets = list(dict.fromkeys(budgets)) if budgets is not None else default_budgets(config)
    measured = measure_budgets(model, data, list(dict.fromkeys([*budgets, Budget()])), batch_size, progress)
    measured_under = measurement_conditions(
        model.device,
        **form_of(model),
        batch_size=batch_size,
        images=len(data),
        **(conditions or {}),
    )
    full = next(m for m in measured if m.budget == Budget())
    confusion = Confusion.of(config.label_names, full.labels, full.predictions)
    rows = [m.row() for m in measured if m.budget in budgets]
    return Evaluation(rows, measured_under, confusion, config.unit, dict(config.knobs))


def int8_accuracy(model: Any, data: "ImageDataset", batch_size: int = 256, progress: bool = True) -> dict[str, float]:
    """Accuracy of the model's engine with linear layers in int8, by the names of the fixed budgets.

    Raises:
        ImportError: If a package that the engine needs is not installed.
        ValueError: For the same reasons as in `evaluate`.
    """
    engine, config = model.optimize_for_inference(int8=True), model.config
    measured = measure_budgets(engine, data, config.budgets(), batch_size, progress)
    return {m.budget.short(config.knobs): float(m.correct.mean()) for m in measured}


def form_of(model: Any) -> dict[str, str]:
    """The model's dtype, and its attention implementation or form, for the conditions of a measurement."""
    attention = getattr(model.config, "_attn_implementation", None)
    if not isinstance(model, ElasticModel):
        form = {"form": "optimized"}
    else:
        form = {"form": "eager"} if attention is None else {"attention": str(attention)}
    return {"dtype": str(model.dtype).removeprefix("torch."), **form}


def measure_budgets(
    model: Any,
    data: "ImageDataset",
    budgets: Sequence[Budget],
    batch_size: int = 256,
    progress: bool = True,
    keep_logits: bool = False,
) -> list[Measurement]:
    """Measure every image at each of `budgets`, in the given order; `evaluate` summarises the result.

    Raises:
        ValueError: For the same reasons as in `evaluate`.
    """
    config = model.config
    all_labels = labels_of_model(model, data)
    for budget in budgets:
        config.resolve(**budget.kwargs)
    if batch_size < 1:
        raise ValueError(f"Expected a batch size of at least 1, got {batch_size}.")

    # The full network always runs, as the reference of relative times.
    measured = list(dict.fromkeys([*budgets, Budget()]))
    found: dict[Budget, list[tuple[np.ndarray, ...]]] = {budget: [] for budget in measured}
    seconds: dict[Budget, list[float]] = {budget: [] for budget in measured}
    batches = pixel_batches(model, data, batch_size, "evaluating" if progress else None)
    for number, (indices, pixels) in enumerate(batches):
        if number == 0:
            for budget in measured:
                _timed_forward(model, pixels, budget)
        for budget in measured:
            elapsed, output = _timed_forward(model, pixels, budget)
            predictions, used = output.logits.argmax(-1).cpu().numpy(), output.used.cpu().numpy()
            macs, confidence = config.count_macs(budget, output).numpy(), top_probability(output.logits).cpu().numpy()
            logits = [output.logits.float().cpu().numpy()] if keep_logits else []
            found[budget].append((predictions, used, macs, confidence, *logits))
            seconds[budget].append(elapsed / len(indices))

    reference = np.asarray(seconds[Budget()])
    return [
        Measurement(
            budget=budget,
            predictions=predictions,
            labels=all_labels,
            used=used,
            macs=macs,
            confidence=confidence,
            seconds=np.asarray(seconds[budget]),
            reference_seconds=reference,
            logits=logits[0] if logits else None,
        )
        for budget in budgets
        for predictions, used, macs, confidence, *logits in [map(np.concatenate, zip(*found[budget], strict=True))]
    ]


def pixel_batches(
    model: Any,
    data: "ImageDataset",
    batch_size: int,
    description: str | None = None,
) -> Iterator[tuple[range, torch.Tensor]]:
    """Yield the indices of each batch and its `pixel_values` (B, C, H, W), preprocessed and on the model's device.

    With a `description`, progress is shown on stderr.
    """
    from hf_visual_perceiver.data.images import normalise, pixels_of_size

    config = model.config
    cfg = config.timm_pretrained_cfg
    batches = [range(i, min(i + batch_size, len(data))) for i in range(0, len(data), batch_size)]
    for indices in tracked(batches, description):
        sized = pixels_of_size(data, indices, config.image_height_width, cfg["interpolation"])
        pixels = normalise(sized, cfg["mean"], cfg["std"])
        yield indices, pixels.to(model.device, model.dtype)


def labels_of_model(model: Any, data: "ImageDataset") -> np.ndarray:
    """Map the dataset's labels to indices of the model's classes, (n,).

    Classes are matched by name. If the dataset's names are numbers (or LABEL_n) that the model does not have, they are
    taken as class indices. If the model's names are LABEL_n, the dataset's classes are matched to them in order. Both
    cases log a warning.

    Raises:
        ValueError: If the dataset has a class that the model does not have, or has twice.
    """
    names, given = model.config.label_names, data.label_names
    if given == names:
        return data.labels
    unknown = [n for n in given if n not in names]
    if not unknown:
        if twice := [n for n in given if names.count(n) > 1]:
            raise ValueError(
                f"Expected names of one class each, got {', '.join(twice[:10])}, which occur twice in the model."
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
    logger.warning(
        "Classes are matched by index: the model does not have class names of the dataset, such as %s.", unknown[0]
    )
    return indices[data.labels]


def _timed_forward(model: Any, pixels: torch.Tensor, budget: Budget) -> tuple[float, Any]:
    """Run the model once; return the seconds and its output."""

    def synchronise() -> None:
        if pixels.device.type == "cuda":
            torch.cuda.synchronize(pixels.device)

    synchronise()
    began = time.perf_counter()
    output = output_at(model, pixels, budget)
    synchronise()
    return time.perf_counter() - began, output


@torch.inference_mode()
def output_at(model: Any, pixels: torch.Tensor, budget: Budget) -> Any:
    """Run a model, with or without a head, at a budget, regardless of its default budget.

    Raises:
        ValueError: If the batch does not fit in memory; the message names a batch size that does.
    """
    from hf_visual_perceiver.utils.memory import fitting

    run = partial(model, **model.config.resolve(**budget.kwargs))
    with fitting(run, pixels):
        return run(pixels)
