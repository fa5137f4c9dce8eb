"""A run's curves: training loss, and validation accuracy at every K."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from .files import written_aside


FONT_SIZE = 8.5
INK, MUTED = "#333333", "#8a8a8a"
# The dark part of viridis: its yellow end is lost on white.
BUDGET_COLORS: Colormap = LinearSegmentedColormap.from_list(
    "budgets", matplotlib.colormaps["viridis"]([i / 255 * 0.82 for i in range(256)])
)
# What a step minimises, and its two parts when it has several subsets of the queries.
LOSSES = {"loss": ("loss", "#31688e"), "full_loss": ("full", "#440154"), "student_loss": ("students", "#2a9d5c")}


def plot_curves(entries: list[dict[str, Any]], path: str | Path) -> None:
    """Plot a run's log: training loss on the left, validation accuracy at every K on the right.

    Args:
        entries: Lines of log.jsonl; those of neither kind are left out, and there may be none at all.
        path: A .png, .svg or .pdf.

    Raises:
        ValueError: If matplotlib does not know the file's format.
    """
    figure = Figure(figsize=(10, 3.8), layout=ConstrainedLayoutEngine(w_pad=0.12, wspace=0.05))
    left, right = figure.subplots(1, 2)
    _style(left, "training loss")
    _style(right, "validation accuracy (%)")
    labels = {left: _plot_losses(left, entries), right: _plot_accuracies(right, entries)}
    for axes in (left, right):
        axes.set_xlim(0, max((entry["step"] for entry in entries), default=1))
    figure.draw_without_rendering()  # the labels' places depend on the size of the panels
    for axes, ends in labels.items():
        label_ends(axes, ends)
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=160)


def _plot_losses(axes: Axes, entries: list[dict[str, Any]]) -> list[tuple[float, float, str, str]]:
    ends: list[tuple[float, float, str, str]] = []
    shown: list[float] = []
    for key, (name, color) in LOSSES.items():
        points = [(e["step"], e[key]) for e in entries if math.isfinite(e.get(key, math.nan))]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        smooth = smoothed(values)
        if key == "loss":
            axes.plot(steps, values, color=color, alpha=0.22, linewidth=0.8)
        (line,) = axes.plot(steps, smooth, color=color, linewidth=1.8)
        if len(points) == 1:  # a line of one point would not show
            line.set(marker="o", clip_on=False)
        ends.append((steps[-1], smooth[-1], name, color))
        shown += values
    if not ends:
        _say(axes, "no training steps logged yet")
    elif len(shown) >= 20:
        # A step that went wrong must not flatten all the others.
        shown.sort()
        low, high = shown[len(shown) // 100], shown[-1 - len(shown) // 100]
        top = min(shown[-1], high + 0.5 * (high - low))
        margin = 0.05 * (top - shown[0]) or 0.1
        axes.set_ylim(shown[0] - margin, top + margin)
    # A single loss needs no name beside that of the panel.
    return ends if len(ends) > 1 else []


def _plot_accuracies(axes: Axes, entries: list[dict[str, Any]]) -> list[tuple[float, float, str, str]]:
    lines: dict[int, list[tuple[int, float]]] = {}
    for entry in entries:
        if "validation_accuracy" in entry:
            lines.setdefault(entry["K"], []).append((entry["step"], 100 * entry["validation_accuracy"]))
    if not lines:
        _say(axes, "not evaluated yet")
    ends = []
    for K, color in zip(sorted(lines), budget_colors(len(lines)), strict=True):
        steps, values = zip(*lines[K], strict=True)
        axes.plot(steps, values, color=color, linewidth=1.6, marker="o", markersize=3.2, clip_on=False)
        ends.append((steps[-1], values[-1], f"K = {K}", color))
    return ends


def budget_colors(count: int) -> list[str]:
    """Colours of `count` budgets in order, from dark (few queries) to light."""
    places = [0.0] if count == 1 else [i / (count - 1) for i in range(count)]
    return [matplotlib.colors.to_hex(BUDGET_COLORS(place)) for place in places]


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a fortieth of the values, without a bias to the first of them.

    Example:
        >>> smoothed([2.0, 2.0, 2.0])
        [2.0, 2.0, 2.0]
    """
    decay = 1 - 1 / max(len(values) / 40, 1)
    total, weight, result = 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        result.append(total / weight)
    return result


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The nearest places, in the least squares' sense, that are in the same order and at least `gap` apart.

    Labels that would overlap are pooled in a block centred on where they belong; a block that meets another is joined to it.

    Example:
        >>> spread([1.0, 1.0, 9.0], gap=2.0)
        [0.0, 2.0, 9.0]
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    blocks: list[tuple[float, int]] = []  # where the first label of a block belongs, and how many it holds
    for i in order:
        start, count = places[i], 1
        while blocks and blocks[-1][0] + blocks[-1][1] * gap > start:
            before, number = blocks.pop()
            # The mean of where each label would have the block begin.
            start = (before * number + (start - number * gap) * count) / (number + count)
            count += number
        blocks.append((start, count))
    result = [0.0] * len(places)
    for i, place in zip(order, (start + n * gap for start, count in blocks for n in range(count)), strict=True):
        result[i] = place
    return result


def label_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write (x, y, text, colour) to the right of the panel at the lines' ends, none over another.

    The figure has to be laid out before.
    """
    heights = [axes.transData.transform((x, y))[1] * 72 / axes.figure.dpi for x, y, _, _ in ends]
    for (x, y, text, color), height, place in zip(ends, heights, spread(heights, 1.25 * FONT_SIZE), strict=True):
        axes.annotate(
            text,
            (x, y),
            xytext=(1.025, place - height),
            textcoords=("axes fraction", "offset points"),
            fontsize=FONT_SIZE,
            color=color,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3},
        )


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=FONT_SIZE + 1.5, color=INK)
    axes.set_xlabel("step", fontsize=FONT_SIZE, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(labelsize=FONT_SIZE, colors=INK, length=0)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bdbdbd")


def _say(axes: Axes, text: str) -> None:
    axes.set_yticks([])
    axes.set_xticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=FONT_SIZE, color=MUTED)
