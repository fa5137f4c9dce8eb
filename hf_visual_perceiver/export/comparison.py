"""Compare exported files with their model: accuracy, agreement and time, on the same batches in turn."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from hf_visual_perceiver.data.images import ImageDataset, normalise, pixels_of_size
from hf_visual_perceiver.evaluation.evaluate import labels_of_model, output_at, plain
from hf_visual_perceiver.evaluation.metrics import Accuracy
from hf_visual_perceiver.export.runtime import ExportedClassifier, load_exported
from hf_visual_perceiver.modeling import Budget, ElasticConfig
from hf_visual_perceiver.utils.conditions import measurement_conditions
from hf_visual_perceiver.utils.console import tracked


PYTORCH = "PyTorch"


@dataclass(frozen=True)
class ExportRow:
    """One form at one budget.

    Attributes:
        form: `"PyTorch"` or the file's name.
        budget: The budget.
        megabytes: Size of PyTorch's weights, or of the file.
        accuracy: Top-1 accuracy.
        standard_error: Standard error of the accuracy.
        same_answer: Share of the images that get the same label as from PyTorch.
        used_mean: Mean usage of an image, such as the number of queries.
        ms_per_image: Milliseconds per image, median over batches.
        relative_time: Time relative to PyTorch on the same batch, median over batches.
    """

    form: str
    budget: Budget
    megabytes: float
    accuracy: float
    standard_error: float
    same_answer: float
    used_mean: float
    ms_per_image: float
    relative_time: float


@dataclass(frozen=True)
class ExportComparison:
    """Rows by budget, PyTorch's first, and the conditions of the measurement."""

    rows: list[ExportRow]
    conditions: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"conditions": self.conditions, "rows": [plain(row) for row in self.rows]}


def compare_exports(
    model: Any,
    files: Sequence[Path],
    data: ImageDataset,
    budgets: Sequence[Budget] | None = None,
    batch_size: int = 64,
    progress: bool = True,
    conditions: dict[str, Any] | None = None,
) -> ExportComparison:
    """Measure a model and files exported from it.

    Args:
        model: The model, in float32 on the CPU.
        files: `.onnx` or `.pt2` files of this model.
        data: Labelled images.
        budgets: Budgets to measure, consistent with the knobs that the files fix; None is some of the config's.
        batch_size: Number of images per batch.
        progress: Whether to show progress on stderr.
        conditions: Further facts to store with the result.

    Raises:
        ValueError: If a file is unreadable, of another model, or has another budget fixed.
    """
    forms: dict[str, Any] = {PYTORCH: model}
    megabytes = {PYTORCH: sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6}
    for path in files:
        exported = load_exported(path)
        check_same_model(path, exported.config, model.config)
        forms[str(path)] = exported
        megabytes[str(path)] = path.stat().st_size / 1e6
    chosen = comparison_budgets(forms, model.config, budgets)
    labels, cfg = labels_of_model(model, data), model.config.timm_pretrained_cfg
    answers: dict[tuple[Budget, str], list[np.ndarray]] = {(p, f): [] for p in chosen for f in forms}
    used: dict[tuple[Budget, str], list[float]] = {key: [] for key in answers}
    seconds: dict[tuple[Budget, str], list[float]] = {key: [] for key in answers}
    batches = [range(i, min(i + batch_size, len(data))) for i in range(0, len(data), batch_size)]
    for number, indices in enumerate(tracked(batches, "comparing" if progress else None)):
        sized = pixels_of_size(data, indices, model.config.image_height_width, cfg["interpolation"])
        pixels = normalise(sized, cfg["mean"], cfg["std"])
        for budget in chosen:
            for form, classifier in forms.items():
                if number == 0:
                    output_at(classifier, pixels, budget)  # warm-up
                began = time.perf_counter()
                output = output_at(classifier, pixels, budget)
                seconds[budget, form].append((time.perf_counter() - began) / len(indices))
                answers[budget, form].append(output.logits.argmax(-1).numpy())
                used[budget, form] += output.used.tolist()

    rows = []
    for budget in chosen:
        expected, reference = np.concatenate(answers[budget, PYTORCH]), np.asarray(seconds[budget, PYTORCH])
        for form in forms:
            given, times = np.concatenate(answers[budget, form]), np.asarray(seconds[budget, form])
            metric = Accuracy(keep_in_memory=True)
            score = metric.compute(predictions=given, references=labels)
            rows.append(
                ExportRow(
                    form=form,
                    budget=budget,
                    megabytes=megabytes[form],
                    accuracy=score["accuracy"],
                    standard_error=score["standard_error"],
                    same_answer=float((given == expected).mean()),
                    used_mean=float(np.mean(used[budget, form])),
                    ms_per_image=1000 * float(np.median(times)),
                    relative_time=float(np.median(times / reference)),
                )
            )
    measured = measurement_conditions("cpu", batch_size=batch_size, images=len(data), **(conditions or {}))
    return ExportComparison(rows, measured | runtime_versions())


def comparison_budgets(
    forms: dict[str, Any], config: ElasticConfig, budgets: Sequence[Budget] | None = None
) -> list[Budget]:
    """The budgets to measure, given the knobs that the files fix; knobs at their full value are left out of them."""
    fixed: dict[str, Any] = {}
    for form, classifier in forms.items():
        for name, value in classifier.fixed.items() if isinstance(classifier, ExportedClassifier) else ():
            if fixed.setdefault(name, value) != value:
                raise ValueError(f"Expected files with the same {name} fixed, got {value} in {form} and {fixed[name]}.")
    adaptive = config.adaptive_budgets()
    wanted = [*config.budgets()[-4:], *adaptive[len(adaptive) // 2 :][:1]] if budgets is None else budgets
    for budget in budgets or ():
        for name, value in budget.kwargs.items():
            if fixed.get(name, value) != value:
                raise ValueError(f"Expected {name} = {fixed[name]}, which is fixed in a file, got {value}.")
    if any(isinstance(c, ExportedClassifier) and not c.inputs for c in forms.values()):
        wanted = [Budget()]
    full, chosen = config.resolve(), []
    for budget in wanted:
        knobs = {**budget.kwargs, **fixed}
        values = config.resolve(**knobs)
        chosen.append(Budget(**{name: knobs[name] for name in knobs if values[name] != full[name]}))
    return list(dict.fromkeys(chosen))


def check_same_model(path: Path, given: Any, expected: Any) -> None:
    """Raise a `ValueError` if a file is of a model with another architecture or other labels."""
    for name in ("label_names", "timm_model_args"):
        if getattr(given, name) != getattr(expected, name):
            raise ValueError(f"Expected {path} to be an export of this model, got another {name}.")


def runtime_versions() -> dict[str, str]:
    """Versions of the runtimes that are installed."""
    found = {}
    for package in ("onnxruntime", "openvino"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
