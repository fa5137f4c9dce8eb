"""Accuracy, cost and time of a checkpoint at every budget, in one pass over a dataset.

Results can be read without the packages that measuring takes (extra `cli`), as the Space does.
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
from transformers import PreTrainedModel

from hf_visual_perceiver.evaluation.cascade import top_probability
from hf_visual_perceiver.evaluation.confusion import Confusion
from hf_visual_perceiver.modeling import Budget, ElasticConfig
from hf_visual_perceiver.utils.conditions import measurement_conditions
from hf_visual_perceiver.utils.console import tracked
from hf_visual_perceiver.utils.files import read_json


if TYPE_CHECKING:
    from hf_visual_perceiver.data.images import ImageDataset


logger = logging.getLogger(__name__)

# Results from before there were several families do not say which it is.
FORMER_UNIT, FORMER_KNOBS = "queries", {"K": "num_active_queries", "t": "dqs_threshold"}


@dataclass(frozen=True)
class Row:
    """What one budget was measured to do."""

    budget: Budget
    used_mean: float  # of what the images of a batch use different numbers of, such as queries
    used_std: float
    used_min: int
    used_max: int
    macs: float  # mean per image
    accuracy: float
    standard_error: float
    ms_per_image: float  # median over batches
    relative_time: float  # to the full network on the same batch, median over batches


@dataclass(frozen=True)
class Measurement:
    """What one budget did to each of n images.

    Attributes:
        budget: What the images might use.
        predictions: (n,) class indices.
        labels: (n,) the right ones.
        used: (n,) what each used, such as queries.
        macs: (n,) what each cost.
        confidence: (n,) its top probability.
        seconds: Per image, one value for each batch.
        reference_seconds: The same of the full network on the same batches.
    """

    budget: Budget
    predictions: np.ndarray
    labels: np.ndarray
    used: np.ndarray
    macs: np.ndarray
    confidence: np.ndarray
    seconds: np.ndarray
    reference_seconds: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """(n,) bool: which images were classified as labelled."""
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
        rows: One for each budget.
        conditions: Hardware, versions, data.
        confusion: Confusion matrix of the full network; None in results of earlier versions.
        unit: What the images use different numbers of; see `ElasticConfig`.
        knobs: The names of the knobs, by their short names.
    """

    rows: list[Row]
    conditions: dict[str, Any]
    confusion: Confusion | None = None
    unit: str = FORMER_UNIT
    knobs: dict[str, str] = field(default_factory=lambda: dict(FORMER_KNOBS))

    def name(self, budget: Budget) -> str:
        """What tables call a budget."""
        return budget.short(self.knobs)

    def series(self) -> dict[str, list[Row]]:
        """The rows by the knobs that they set, each ascending in cost; the full network is with those of the first knob."""
        short = {name: knob for knob, name in self.knobs.items()}
        first = next(iter(self.knobs), "")
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(", ".join(short.get(name, name) for name in row.budget.kwargs) or first, []).append(row)
        return {name: sorted(rows, key=lambda row: row.macs) for name, rows in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        confusion = {} if self.confusion is None else {"confusion": self.confusion.counts}
        naming = {"unit": self.unit, "knobs": self.knobs}
        return {**naming, "conditions": self.conditions, "rows": [plain(row) for row in self.rows], **confusion}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Evaluation":
        """The inverse of `to_dict`, also of what earlier versions wrote."""
        confusion = Confusion(values["confusion"]) if "confusion" in values else None
        naming = {key: values[key] for key in ("unit", "knobs") if key in values}
        rows = [Row(**with_budget(row)) for row in values["rows"]]
        return cls(rows, values["conditions"], confusion, **naming)


def plain(result: Any) -> dict[str, Any]:
    """A dataclass as plain values, budgets as the values of their knobs."""
    return asdict(
        result,
        dict_factory=lambda pairs: {key: value.kwargs if isinstance(value, Budget) else value for key, value in pairs},
    )


def with_budget(values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `plain` for what has a budget, also for what earlier versions wrote of the Visual Perceiver.

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
    """What is measured by default: budgets at which all images cost alike, then those at which each takes what it needs."""
    return [*config.budgets(), *config.adaptive_budgets()]


def evaluate(
    model: Any,
    data: "ImageDataset",
    budgets: Sequence[Budget] | None = None,
    batch_size: int = 256,
    progress: bool = True,
    conditions: dict[str, Any] | None = None,
) -> Evaluation:
    """Measure accuracy, what images use, MACs and time at several budgets, and the confusion matrix.

    Every batch goes through all budgets in turn, after a warm-up on the first one, so that times are compared on the same
    images within moments of each other. Times are of the model alone, on images that are ready on its device.

    Args:
        model: In eval mode, on the device and in the dtype to measure.
        data: Images that the model has labels for.
        budgets: What to measure, whatever the model does by default; `default_budgets` if None.
        batch_size: Images of a batch.
        progress: Say on stderr how far it is.
        conditions: More facts to keep with the result, such as the names of model and dataset.

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


def form_of(model: Any) -> dict[str, str]:
    """The dtype, and attention or "optimized", of a model, for the conditions of a measurement."""
    attention = {"attention": str(getattr(model.config, "_attn_implementation", None))}
    form = attention if isinstance(model, PreTrainedModel) else {"form": "optimized"}
    return {"dtype": str(model.dtype).removeprefix("torch."), **form}


def measure_budgets(
    model: Any, data: "ImageDataset", budgets: Sequence[Budget], batch_size: int = 256, progress: bool = True
) -> list[Measurement]:
    """What `evaluate` is made of: what every image did at each of `budgets`, which are taken as they come.

    Raises:
        ValueError: If `evaluate` raises it.
    """
    config = model.config
    all_labels = labels_of_model(model, data)
    for budget in budgets:
        config.resolve(**budget.kwargs)
    if batch_size < 1:
        raise ValueError(f"Expected a batch size of at least 1, got {batch_size}.")

    # The reference of relative times runs too, if it is not among them.
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
            found[budget].append((predictions, used, macs, confidence))
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
        )
        for budget in budgets
        for predictions, used, macs, confidence in [map(np.concatenate, zip(*found[budget], strict=True))]
    ]


def pixel_batches(
    model: Any,
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
        sized = pixels_of_size(data, indices, config.image_height_width, cfg["interpolation"])
        pixels = normalise(sized, cfg["mean"], cfg["std"])
        yield indices, pixels.to(model.device, model.dtype)


def labels_of_model(model: Any, data: "ImageDataset") -> np.ndarray:
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


def _timed_forward(model: Any, pixels: torch.Tensor, budget: Budget) -> tuple[float, Any]:
    """Seconds, and what the model returned."""

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
    """What a model, with or without a head, returns at a budget, whatever its config's own.

    Raises:
        ValueError: If the batch does not fit in memory; the message has a size that does.
    """
    from hf_visual_perceiver.utils.memory import fitting

    run = partial(model, **model.config.resolve(**budget.kwargs))
    with fitting(run, pixels):
        return run(pixels)
