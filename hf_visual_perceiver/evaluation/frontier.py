"""The best accuracy within a limit of multiply-accumulates, for several networks side by side."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from hf_visual_perceiver.evaluation.cascade import stopping_stages
from hf_visual_perceiver.evaluation.evaluate import Measurement, measure_budgets
from hf_visual_perceiver.evaluation.plots import save_figure


if TYPE_CHECKING:
    from hf_visual_perceiver.data.images import ImageDataset

# Set before anything is measured, so that nothing is fitted to the reported images.
CASCADE_THRESHOLDS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
FIXED, ADAPTIVE, CASCADE = "fixed", "adaptive", "cascade"


@dataclass(frozen=True)
class Point:
    """One setting of one network, measured on two sets of images: one to report on, one to choose settings on.

    Attributes:
        model: Name of the network.
        setting: Name of the setting, such as "K=16".
        kind: "fixed" if all images cost the same, "adaptive" if the cost depends on the image, or "cascade".
        macs: Mean multiply-accumulates per image, on the reported images.
        accuracy: Accuracy on the reported images, in [0, 1].
        standard_error: Standard error of that accuracy.
        chosen_macs: Mean multiply-accumulates per image, on the images for choosing.
        chosen_accuracy: Accuracy on the images for choosing.
    """

    model: str
    setting: str
    kind: str
    macs: float
    accuracy: float
    standard_error: float
    chosen_macs: float
    chosen_accuracy: float


def measure_points(
    name: str, model: Any, data: "ImageDataset", choosing: "ImageDataset", batch_size: int = 256, progress: bool = True
) -> list[Point]:
    """Measure all settings of a network: its fixed and adaptive budgets, and cascades of the fixed ones.

    Cascades are only measured if the model can continue from a smaller budget (`start`). A cascade stops an image at
    the first budget whose top probability reaches a threshold, which is one of CASCADE_THRESHOLDS and the same for all
    budgets.

    Args:
        name: Name of the network in the result.
        model: A model in eval mode.
        data: Labelled images to report on.
        choosing: Other labelled images, to choose settings on.
        batch_size: Number of images per batch.
        progress: Whether to show progress on stderr.

    Raises:
        ValueError: If the images do not fit the model.
    """
    config = model.config
    fixed, adaptive = config.budgets(), config.adaptive_budgets()
    reported, chosen = (
        measure_budgets(model, images, [*fixed, *adaptive], batch_size, progress) for images in (data, choosing)
    )
    ways = [
        (m.budget.short(config.knobs), ADAPTIVE if config.is_adaptive(m.budget) else FIXED, (m.correct, m.macs))
        for m in reported
    ]
    others = [(m.correct, m.macs) for m in chosen]
    if len(fixed) > 1 and hasattr(model, "start"):
        costs = np.asarray(config.count_stages(fixed), dtype=float)
        for threshold in CASCADE_THRESHOLDS:
            name_of_cascade = f"cascade at {threshold:g}"
            ways.append((name_of_cascade, CASCADE, cascaded(reported[: len(fixed)], costs, threshold)))
            others.append(cascaded(chosen[: len(fixed)], costs, threshold))
    return [
        Point(
            name,
            setting,
            kind,
            float(macs.mean()),
            float(correct.mean()),
            float(np.sqrt(correct.mean() * (1 - correct.mean()) / len(correct))),
            float(chosen_macs.mean()),
            float(chosen_correct.mean()),
        )
        for (setting, kind, (correct, macs)), (chosen_correct, chosen_macs) in zip(ways, others, strict=True)
    ]


def cascaded(stages: Sequence[Measurement], costs: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Which images a cascade classifies correctly and what each costs, (n,) each, from separate runs of its stages.

    Args:
        stages: Measurements of the fixed budgets, ascending.
        costs: (S,) cost of stopping at each stage.
        threshold: Top probability at which an image stops.
    """
    confidence = np.stack([m.confidence for m in stages], axis=1)  # (n, S)
    correct = np.stack([m.correct for m in stages], axis=1)
    stage = stopping_stages(confidence, [threshold] * (len(stages) - 1))
    return correct[np.arange(len(stage)), stage], costs[stage]


def best_point(points: Sequence[Point], macs: float) -> Point | None:
    """The most accurate setting that costs at most `macs`, both on the images for choosing; None if there is none."""
    fitting = [point for point in points if point.chosen_macs <= macs]
    return max(fitting, key=lambda point: (point.chosen_accuracy, -point.chosen_macs), default=None)


@dataclass(frozen=True)
class Frontier:
    """The measured points of several networks.

    Attributes:
        points: Points of all networks.
        limits: Limits of multiply-accumulates, one per column of the table.
        conditions: Hardware, versions, data.
    """

    points: list[Point]
    limits: list[float]
    conditions: dict[str, Any]

    def rows(self) -> list[tuple[str, str, list[Point | None]]]:
        """The best fixed settings and the best of all settings of each network, by limit: (network, which, points)."""
        rows: list[tuple[str, str, list[Point | None]]] = []
        for model in dict.fromkeys(point.model for point in self.points):
            points = [point for point in self.points if point.model == model]
            fixed = [point for point in points if point.kind == FIXED]
            rows.append((model, "fixed", [best_point(fixed, limit) for limit in self.limits]))
            if len(points) > len(fixed):
                rows.append((model, "any", [best_point(points, limit) for limit in self.limits]))
        return rows

    def table(self) -> list[list[str]]:
        """Headers and rows of the table; cells are the accuracy in percent and the setting."""
        headers = ["network", "settings", *(f"<= {limit / 1e6:g} M" for limit in self.limits)]
        cells = [
            [model, which, *("" if p is None else f"{100 * p.accuracy:.2f} ({p.setting})" for p in points)]
            for model, which, points in self.rows()
        ]
        return [headers, *cells]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "conditions": self.conditions,
            "limits": self.limits,
            "points": [asdict(point) for point in self.points],
        }


def plot_frontier(frontier: Frontier, path: str | Path) -> None:
    """Plot accuracy against mean MACs: one colour per network, lines for fixed budgets, markers for the others."""
    save_figure(frontier_figure(frontier), path)


def frontier_figure(frontier: Frontier) -> Figure:
    """The figure of `plot_frontier`."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    marks = {ADAPTIVE: "s", CASCADE: "^"}
    for number, model in enumerate(dict.fromkeys(point.model for point in frontier.points)):
        points = sorted((p for p in frontier.points if p.model == model), key=lambda p: p.macs)
        colour = f"C{number % 10}"
        fixed = [p for p in points if p.kind == FIXED]
        style = "o-" if len(fixed) > 1 else "*"
        axes.plot([p.macs / 1e6 for p in fixed], [100 * p.accuracy for p in fixed], style, color=colour, label=model)
        for kind, mark in marks.items():
            those = [p for p in points if p.kind == kind]
            if those:
                xy = [p.macs / 1e6 for p in those], [100 * p.accuracy for p in those]
                axes.plot(*xy, mark, color=colour, fillstyle="none", label=f"{model}, {kind}")
    axes.set_xscale("log")
    ticks = [limit / 1e6 for limit in frontier.limits]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("million MACs per image (mean)")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(
        f"{frontier.conditions.get('dataset')}, {frontier.conditions.get('images', 0):,} images", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
