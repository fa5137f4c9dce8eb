"""A run's curves: training loss, and validation accuracy at every budget. accelerate's trackers get the same values live."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_visual_perceiver.modeling import Budget, family_of
from hf_visual_perceiver.training.recipe import TIMM
from hf_visual_perceiver.utils.files import written_aside


# The loss that a step minimises, and its two parts where smaller budgets learn from the full network.
LOSSES = {"loss": "loss", "full_loss": "full", "student_loss": "students"}


def step_names(ladder: Sequence[Budget], knobs: Mapping[str, str]) -> dict[int, str]:
    """Names of a ladder's steps 1, 2, ..., which recipes and logs call K: short names of the budgets.

    If each step is a number of queries, that is its name, also at the last, the full network.

    Example:
        >>> from hf_visual_perceiver import DynamicVisionTransformerConfig, VisualPerceiverConfig
        >>> config = VisualPerceiverConfig(num_queries=3)
        >>> step_names(config.ladder(), config.knobs)
        {1: 'K=1', 2: 'K=2', 3: 'K=3'}
        >>> config = DynamicVisionTransformerConfig()
        >>> step_names(config.ladder(), config.knobs)
        {1: 'exit=1', 2: 'exit=2', 3: 'full'}
    """
    numbers = [f"K={K}" for K in range(1, len(ladder) + 1)]
    names = [budget.short(knobs) for budget in ladder]
    return dict(enumerate(numbers if "K" in knobs and names[:-1] == numbers[:-1] else names, start=1))


def recipe_step_names(recipe: Mapping[str, Any]) -> dict[int, str]:
    """`step_names` of the network of a recipe, of which only `architecture` and `config` are read.

    Example:
        >>> recipe_step_names({"architecture": "lookupvit_nano_patch4_32", "config": {"max_compressed_size": 4}})
        {1: 'grid=2', 2: 'grid=3', 3: 'full'}
        >>> recipe_step_names({"architecture": "timm/resnet18", "config": {}})
        {1: 'full'}
    """
    architecture = recipe["architecture"]
    if architecture.startswith(TIMM):
        return step_names([Budget()], {})
    config = family_of(architecture).create_config(architecture, **recipe["config"])
    return step_names(config.ladder(), config.knobs)


def in_words(name: str) -> str:
    """A budget's name for running text.

    Example:
        >>> in_words("K=8"), in_words("full")
        ('K = 8', 'the full network')
    """
    return "the full network" if name == "full" else name.replace("=", " = ")


def plot_curves(entries: list[dict[str, Any]], path: str | Path) -> None:
    """Plot a run's log: training loss on the left, validation accuracy at every budget on the right.

    Args:
        entries: Lines of log.jsonl; lines without a loss or accuracy are skipped, and the list may be empty.
        path: A .png, .svg or .pdf file.

    Raises:
        ValueError: If matplotlib does not know the file's format.
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_losses(left, entries)
    _plot_accuracies(right, entries)
    for axes, title in ((left, "training loss"), (right, "validation accuracy (%)")):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.set_xlim(0, max((entry["step"] for entry in entries), default=1))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(alpha=0.3)
        if len(axes.get_legend_handles_labels()[1]):
            axes.legend(fontsize=8)
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=160)


def _plot_losses(axes: Axes, entries: list[dict[str, Any]]) -> None:
    shown: list[float] = []
    for number, (key, name) in enumerate(LOSSES.items()):
        points = [(e["step"], e[key]) for e in entries if math.isfinite(e.get(key, math.nan))]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        if key == "loss":
            axes.plot(steps, values, color=f"C{number}", alpha=0.22, linewidth=0.8)
        axes.plot(steps, smoothed(values), f"C{number}{'o' if len(points) == 1 else '-'}", label=name)
        shown += values
    if len(shown) >= 20:
        # An outlier must not flatten the rest of the curve.
        low, high = np.quantile(shown, (0.01, 0.99))
        top = min(max(shown), high + 0.5 * (high - low))
        margin = 0.05 * (top - min(shown)) or 0.1
        axes.set_ylim(min(shown) - margin, top + margin)


def _plot_accuracies(axes: Axes, entries: list[dict[str, Any]]) -> None:
    lines: dict[int, list[tuple[int, float]]] = {}
    names = {}
    for entry in entries:
        if "validation_accuracy" in entry:
            lines.setdefault(entry["K"], []).append((entry["step"], 100 * entry["validation_accuracy"]))
            names[entry["K"]] = entry.get("budget", f"K={entry['K']}")  # earlier versions logged K alone
    # Only the dark part of viridis: its yellow end is hard to see on white.
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.82, len(lines)))
    for K, color in zip(sorted(lines), colors, strict=True):
        axes.plot(*zip(*lines[K], strict=True), color=color, marker="o", markersize=3, label=in_words(names[K]))


def smoothed(values: tuple[float, ...]) -> list[float]:
    """Exponential moving average over about a fortieth of the values, with bias correction for the first ones.

    Example:
        >>> smoothed((2.0, 2.0, 2.0))
        [2.0, 2.0, 2.0]
    """
    decay = 1 - 1 / max(len(values) / 40, 1)
    total, weight, result = 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        result.append(total / weight)
    return result
