"""Exported files beside the model they are of: accuracy, agreement and time on the same batches, in turn."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from hf_visual_perceiver.data.images import ImageDataset, normalise, pixels_of_size
from hf_visual_perceiver.evaluation.evaluate import OperatingPoint, forward_at, labels_of_model
from hf_visual_perceiver.evaluation.metrics import Accuracy
from hf_visual_perceiver.export.runtime import ExportedClassifier, load_exported
from hf_visual_perceiver.modeling import VisualPerceiverConfig, VisualPerceiverForImageClassification
from hf_visual_perceiver.utils.conditions import measurement_conditions
from hf_visual_perceiver.utils.console import tracked


BUDGETS = (8, 16, 32)  # and all
THRESHOLD = 0.8
PYTORCH = "PyTorch"


@dataclass(frozen=True)
class ExportRow:
    """One form at one operating point.

    Attributes:
        form: `"PyTorch"` or the file's name.
        num_active_queries: K.
        dqs_threshold: t, or None without selection.
        megabytes: Size of the weights, or of the file.
        accuracy: Accuracy of the top label.
        standard_error: Standard error of the accuracy.
        same_answer: Share of the images with PyTorch's label.
        queries_mean: Queries that an image used.
        ms_per_image: Median over batches.
        relative_time: To PyTorch on the same batch, median over batches.
    """

    form: str
    num_active_queries: int
    dqs_threshold: float | None
    megabytes: float
    accuracy: float
    standard_error: float
    same_answer: float
    queries_mean: float
    ms_per_image: float
    relative_time: float


@dataclass(frozen=True)
class ExportComparison:
    """Rows by operating point, PyTorch's first, and the conditions of the measurement."""

    rows: list[ExportRow]
    conditions: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"conditions": self.conditions, "rows": [asdict(row) for row in self.rows]}


def compare_exports(
    model: VisualPerceiverForImageClassification,
    files: Sequence[Path],
    data: ImageDataset,
    num_active_queries: Sequence[int] | None = None,
    dqs_thresholds: Sequence[float] | None = None,
    batch_size: int = 64,
    progress: bool = True,
    conditions: dict[str, Any] | None = None,
) -> ExportComparison:
    """Measure a model and files exported from it.

    Args:
        model: In float32 on the CPU.
        files: `.onnx` or `.pt2`, of this model.
        data: Labelled images.
        num_active_queries: K; None is 8, 16, 32 and all, or the one K that the files have fixed.
        dqs_thresholds: t, with all queries (or the K that is fixed); None is 0.8 where K is not given either.
        batch_size: Images of a batch.
        progress: Say on stderr how far it is.
        conditions: More facts to keep with the result.

    Raises:
        ValueError: If a file is unreadable, of another model, or has another K fixed.
    """
    forms: dict[str, VisualPerceiverForImageClassification | ExportedClassifier] = {PYTORCH: model}
    megabytes = {PYTORCH: sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6}
    for path in files:
        exported = load_exported(path)
        check_same_model(path, exported.config, model.config)
        forms[str(path)] = exported
        megabytes[str(path)] = path.stat().st_size / 1e6
    points = comparison_points(forms, model.config.num_queries, num_active_queries, dqs_thresholds)
    labels, cfg = labels_of_model(model, data), model.config.timm_pretrained_cfg
    answers: dict[tuple[OperatingPoint, str], list[np.ndarray]] = {(p, f): [] for p in points for f in forms}
    queries: dict[tuple[OperatingPoint, str], list[float]] = {key: [] for key in answers}
    seconds: dict[tuple[OperatingPoint, str], list[float]] = {key: [] for key in answers}
    batches = [range(i, min(i + batch_size, len(data))) for i in range(0, len(data), batch_size)]
    for number, indices in enumerate(tracked(batches, "comparing" if progress else None)):
        pixels = pixels_of_size(data, indices, model.config.image_height_width, cfg["interpolation"])
        pixels = normalise(pixels, cfg["mean"], cfg["std"])
        for point in points:
            for form, classifier in forms.items():
                if number == 0:
                    forward_at(classifier, pixels, point)  # warm-up
                began = time.perf_counter()
                logits, active = forward_at(classifier, pixels, point)
                seconds[point, form].append((time.perf_counter() - began) / len(indices))
                answers[point, form].append(logits.argmax(-1).numpy())
                queries[point, form] += active.sum(1).tolist()

    rows = []
    for point in points:
        expected, reference = np.concatenate(answers[point, PYTORCH]), np.asarray(seconds[point, PYTORCH])
        for form in forms:
            given, times = np.concatenate(answers[point, form]), np.asarray(seconds[point, form])
            metric = Accuracy(keep_in_memory=True)
            score = metric.compute(predictions=given, references=labels)
            assert point.num_active_queries is not None
            rows.append(
                ExportRow(
                    form=form,
                    num_active_queries=point.num_active_queries,
                    dqs_threshold=point.dqs_threshold,
                    megabytes=megabytes[form],
                    accuracy=score["accuracy"],
                    standard_error=score["standard_error"],
                    same_answer=float((given == expected).mean()),
                    queries_mean=float(np.mean(queries[point, form])),
                    ms_per_image=1000 * float(np.median(times)),
                    relative_time=float(np.median(times / reference)),
                )
            )
    measured = measurement_conditions("cpu", batch_size=batch_size, images=len(data), **(conditions or {}))
    return ExportComparison(rows, measured | runtime_versions())


def comparison_points(
    forms: dict[str, Any], Q: int, budgets: Sequence[int] | None, thresholds: Sequence[float] | None
) -> list[OperatingPoint]:
    """What to measure, given what the files have fixed."""
    fixed: dict[str, int] = {}
    for form, classifier in forms.items():
        if isinstance(classifier, ExportedClassifier) and classifier.num_active_queries is not None:
            fixed[form] = classifier.num_active_queries
    if len(set(fixed.values())) > 1:
        raise ValueError(
            f"Expected files with the same K fixed, got {', '.join(f'{f}: {K}' for f, K in fixed.items())}."
        )
    most = next(iter(fixed.values()), Q)
    if budgets is None and thresholds is None:
        budgets, thresholds = [*(K for K in BUDGETS if most > K and not fixed), most], [THRESHOLD]
    for K in budgets or ():
        if fixed and most != K:
            raise ValueError(f"Expected K = {most}, which is fixed in {next(iter(fixed))}, got {K}.")
    return [*(OperatingPoint(K) for K in budgets or ()), *(OperatingPoint(most, t) for t in thresholds or ())]


def check_same_model(path: Path, given: VisualPerceiverConfig, expected: VisualPerceiverConfig) -> None:
    """Raise a `ValueError` if a file is of a model of another shape, or with other labels."""
    for name in ("label_names", "timm_model_args"):
        if getattr(given, name) != getattr(expected, name):
            raise ValueError(f"Expected {path} to be an export of the model; its {name} is another.")


def runtime_versions() -> dict[str, str]:
    """Versions of the runtimes that are installed."""
    found = {}
    for package in ("onnxruntime", "openvino"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
