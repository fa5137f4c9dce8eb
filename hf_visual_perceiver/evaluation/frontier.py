"""The best accuracy within a limit of multiply-accumulates, for several networks side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hf_visual_perceiver.evaluation.cascade import stopping_stages
from hf_visual_perceiver.evaluation.evaluate import Measurement, measure_budgets
from hf_visual_perceiver.evaluation.plots import save_figure
from hf_visual_perceiver.inference.cascade import Cascade, top_probability


if TYPE_CHECKING:
    from hf_visual_perceiver.data.images import ImageDataset

# Set before anything is measured, so that nothing is fitted to the reported images.
CASCADE_THRESHOLDS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.997, 0.998, 0.999)
FIXED, ADAPTIVE, CASCADE = "fixed", "adaptive", "cascade"
MARKS = {ADAPTIVE: "s", CASCADE: "^"}


@dataclass(frozen=True)
class Point:
    """One setting of one network, measured on two sets of images: one to report on, one to choose settings on.

    Attributes:
        model: Name of the network.
        setting: Name of the setting, such as "K=16".
        kind: "fixed" if all images cost the same, "adaptive" if the cost depends on the image, or "cascade", which some
            images may leave mirrored.
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
    """Measure all settings of a network: its fixed and adaptive budgets, and the cascades of `cascades_of`.

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
    cascades = cascades_of(model)
    reported, chosen = (measure_settings(model, cascades, images, batch_size, progress) for images in (data, choosing))
    return [
        Point(
            name,
            setting,
            kind,
            float(macs.mean()),
            float(correct.mean()),
            float(np.sqrt(correct.mean() * (1 - correct.mean()) / len(correct))),
            float(chosen[setting][2].mean()),
            float(chosen[setting][1].mean()),
        )
        for setting, (kind, correct, macs) in reported.items()
    ]


def cascades_of(model: Any) -> dict[str, Cascade]:
    """The cascades that a network is measured with, by the names of settings.

    A cascade stops an image at the first budget whose top probability reaches a threshold of CASCADE_THRESHOLDS, which is
    the same for all budgets. Those with a mirror end at one of the budgets, and classify images that are below the threshold
    there once more, mirrored. They begin at the smallest budget if the model can continue from it (`start`); otherwise
    they have one budget only.
    """
    budgets, cascade = model.config.budgets(), "cascade to " if hasattr(model, "start") else ""
    names = [f"{cascade}{budget.short(model.config.knobs)} + mirror" for budget in budgets]
    if cascade and len(budgets) > 1:
        names.append("cascade")
    settings = [f"{name} at {threshold:g}" for threshold in CASCADE_THRESHOLDS for name in names]
    return {setting: Cascade.parse(model, setting) for setting in settings}


def measure_settings(
    model: Any, cascades: Mapping[str, Cascade], data: "ImageDataset", batch_size: int, progress: bool
) -> dict[str, tuple[str, np.ndarray, np.ndarray]]:
    """The kind of each setting, and which images it classifies correctly and what each costs: (n,) each."""
    config = model.config
    fixed = config.budgets()
    one_view = measure_budgets(model, data, fixed, batch_size, progress, keep_logits=True)
    mirrored = measure_budgets(Mirrored(model), data, fixed, batch_size, progress, keep_logits=True)
    both_views = [of_both_views(*views) for views in zip(one_view, mirrored, strict=True)]
    if adaptive := config.adaptive_budgets():
        one_view += measure_budgets(model, data, adaptive, batch_size, progress)
    found = {}
    for m in one_view:
        kind = ADAPTIVE if config.is_adaptive(m.budget) else FIXED
        found[m.budget.short(config.knobs)] = (kind, m.correct, m.macs)
    for setting, cascade in cascades.items():
        found[setting] = (CASCADE, *cascaded(cascade, one_view, both_views))
    return found


class Mirrored:
    """A model that sees the mirror images."""

    def __init__(self, model: Any):
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, pixel_values: torch.Tensor, **knobs: Any) -> Any:
        return self.model(pixel_values.flip(-1), **knobs)


def of_both_views(one: Measurement, other: Measurement) -> Measurement:
    """The measurement of the mean of both views' logits, with the MACs of one."""
    assert one.logits is not None, "measured with logits"
    assert other.logits is not None, "measured with logits"
    logits = torch.from_numpy((one.logits + other.logits) / 2)
    return replace(one, predictions=logits.argmax(-1).numpy(), confidence=top_probability(logits).numpy())


def cascaded(
    cascade: Cascade, one_view: Sequence[Measurement], both_views: Sequence[Measurement]
) -> tuple[np.ndarray, np.ndarray]:
    """Which images a cascade classifies correctly and what each costs, (n,) each, from separate runs of its stages.

    Args:
        cascade: The cascade.
        one_view: Measurements of its budgets, among others.
        both_views: Measurements of fixed budgets on both views; see `of_both_views`.
    """
    answers = [m for m in one_view if m.budget in cascade.stages]
    if cascade.mirror:
        answers += [m for m in both_views if m.budget == cascade.stages[-1]]
    confidence = np.stack([m.confidence for m in answers], axis=1)
    correct = np.stack([m.correct for m in answers], axis=1)
    stage = stopping_stages(confidence, cascade.thresholds)
    return correct[np.arange(len(stage)), stage], np.asarray(cascade.count_macs(), dtype=float)[stage]


def forward_at(model: Any, point: Point) -> Callable[[Any], Any]:
    """The function that classifies a batch (B, C, H, W) at one of the model's points; a cascade runs its stages.

    Args:
        model: The model that the point was measured on.
        point: One of the results of `measure_points`.
    """
    if point.kind == CASCADE:
        return Cascade.parse(model, point.setting)
    return partial(model, **model.config.resolve(**model.config.parse_budget(point.setting).kwargs))


def check_names(names: Sequence[str]) -> None:
    """Raise a `ValueError` if two networks have the same name, under which their points would be mixed up."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Expected networks of different names, got {', '.join(twice)} more than once.")


def efficient(points: Sequence[Point]) -> list[Point]:
    """The points that no cheaper or equally cheap one equals in accuracy, by cost; both on the images for choosing."""
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.chosen_macs, -point.chosen_accuracy)):
        if not found or point.chosen_accuracy > found[-1].chosen_accuracy:
            found.append(point)
    return found


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
    """Plot accuracy against mean MACs: one colour per network, a line for fixed budgets, marks for others."""
    save_figure(frontier_figure(frontier), path)


def frontier_figure(frontier: Frontier) -> Figure:
    """The figure of `plot_frontier`."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    models = dict.fromkeys(point.model for point in frontier.points)
    handles = draw_points(axes, frontier.points, {model: (f"C{i % 10}", 0) for i, model in enumerate(models)})
    ticks = [limit / 1e6 for limit in frontier.limits]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_title(frontier_title(frontier), fontsize=10)
    axes.legend(handles=handles, fontsize=8)
    return figure


def frontier_title(frontier: Frontier) -> str:
    """The reported images, for the title of a figure."""
    return f"{frontier.conditions.get('dataset')}, {frontier.conditions.get('images', 0):,} images"


def draw_points(
    axes: Axes,
    points: Sequence[Point],
    styles: Mapping[str, tuple[str, int]],
    x: Callable[[Point], float] = lambda point: point.macs / 1e6,
    label: str = "million MACs per image (mean)",
) -> list[Line2D]:
    """Draw the points of several networks, and return what belongs in the legend.

    Args:
        axes: Where to draw.
        points: Points of all networks. Of each kind, those that are `efficient` are drawn.
        styles: Colour of each network, and the number of its style among the networks of that colour.
        x: What a point's accuracy is drawn against.
        label: What `x` is.
    """
    handles, kinds = [], set()
    for model, (colour, style) in styles.items():
        own = [point for point in points if point.model == model]
        fixed = sorted(efficient([point for point in own if point.kind == FIXED]), key=x)
        static = sum(point.kind == FIXED for point in own) == 1
        form = "*PXD"[style % 4] if static else "o" + ("-", "--", ":", "-.")[style % 4]
        size = 9 if static else 5
        handles += axes.plot(*_xy(fixed, x), form, color=colour, label=model, markersize=size)
        for kind, mark in MARKS.items():
            if those := efficient([point for point in own if point.kind == kind]):
                kinds.add(kind)
                axes.plot(*_xy(those, x), mark, color=colour, fillstyle="none", label=f"{model}, {kind}")
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy (%)")
    axes.grid(alpha=0.3)
    marks: dict[str, Any] = {"color": "0.3", "linestyle": "", "fillstyle": "none"}
    return [*handles, *(Line2D([], [], marker=MARKS[kind], label=kind, **marks) for kind in MARKS if kind in kinds)]


def _xy(points: Sequence[Point], x: Callable[[Point], float]) -> tuple[list[float], list[float]]:
    return [x(point) for point in points], [100 * point.accuracy for point in points]
