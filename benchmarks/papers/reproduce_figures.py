"""Figures of the report on the paper: curves beside the paper's, similarities, galleries."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
from reproduce_measure import Selection, dqs_threshold

from hf_visual_perceiver.data.images import ImageDataset
from hf_visual_perceiver.evaluation.evaluate import Row
from hf_visual_perceiver.evaluation.plots import save_figure


@dataclass(frozen=True)
class Curve:
    """Accuracies (%) of one kind of network, measured or the paper's."""

    name: str
    x: Sequence[float]
    accuracy: Sequence[float]
    color: str
    paper: bool = False
    deviation: Sequence[float] | None = None


def plot_curves(curves: Sequence[Curve], xlabel: str, path: Path, ticks: Sequence[int] = ()) -> None:
    """Accuracy on a logarithmic axis; our curves are solid, the paper's dashed."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        axes.errorbar(
            curve.x,
            curve.accuracy,
            yerr=curve.deviation,
            color=curve.color,
            linestyle="--" if curve.paper else "-",
            marker="o",
            markersize=4,
            markerfacecolor="white" if curve.paper else curve.color,
            capsize=2,
            label=f"{curve.name}, {'paper' if curve.paper else 'ours'}",
        )
    axes.set_xscale("log", base=2)
    if ticks:
        axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel(xlabel)
    axes.set_ylabel("accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def plot_selection(masking: Sequence[Row], selection: Sequence[Row], paper: Sequence[Curve], path: Path) -> None:
    """Figure 6: accuracy against the mean number of queries, with its deviation and range over images."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for curve in paper:
        axes.plot(
            curve.x, curve.accuracy, "--o", color=curve.color, markersize=3, mfc="white", label=f"{curve.name}, paper"
        )
    axes.plot(
        [row.used_mean for row in masking],
        [100 * row.accuracy for row in masking],
        "-o",
        color="tab:blue",
        label="first K queries, ours",
    )
    mean = np.array([row.used_mean for row in selection])
    accuracy = [100 * row.accuracy for row in selection]
    reach = [
        mean - [row.used_min for row in selection],
        np.array([row.used_max for row in selection]) - mean,
    ]
    axes.errorbar(mean, accuracy, xerr=reach, fmt="none", ecolor="tab:orange", elinewidth=0.7, capsize=2)
    deviation = [row.used_std for row in selection]
    axes.errorbar(mean, accuracy, xerr=deviation, fmt="none", ecolor="tab:orange", elinewidth=2.5)
    axes.plot(mean, accuracy, "-s", color="tab:orange", label="Dynamic Query Selection, ours")
    for row, height in zip(selection, accuracy, strict=True):
        axes.annotate(
            f"t = {dqs_threshold(row):g}",
            (row.used_mean, height),
            xytext=(3, 5),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set_xlabel("queries per image: mean, ± standard deviation (thick), minimum to maximum (thin)")
    axes.set_ylabel("accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    save_figure(figure, path)


def plot_similarities(selection: Selection, data: ImageDataset, path: Path) -> None:
    """Figure 10: cosine similarities of the queries in one image; those that drop a query are red, and its row ends in a bar."""
    Q = len(selection.keep)
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    picture, axes = figure.subplots(1, 2, width_ratios=[1, 4])
    picture.imshow(np.asarray(data.image(selection.example)))
    picture.set_title(data.label_names[data.labels[selection.example]], fontsize=9)
    picture.set_axis_off()
    # Only earlier queries count, so only they are shown; similarities above the threshold, which remove a query, in red.
    lower = np.where(np.tri(Q, k=-1, dtype=bool), selection.similarities, np.nan)
    extent = (0.5, Q + 0.5, Q + 0.5, 0.5)  # queries are counted from 1
    drawn = axes.imshow(lower, vmin=-1, vmax=1, cmap="Greys", extent=extent)
    above = np.where(lower > selection.threshold, 1.0, np.nan)
    axes.imshow(above, vmin=0, vmax=1, cmap=ListedColormap(["red"]), extent=extent)
    for i in np.flatnonzero(~selection.keep).tolist():
        axes.add_patch(Rectangle((i + 0.5, i + 0.5), Q - i, 1, facecolor="red", alpha=0.25, linewidth=0))
    axes.set_xlabel("earlier query")
    axes.set_ylabel("query")
    axes.set_title(
        f"t = {selection.threshold:g}: {int(selection.keep.sum())} of {Q} queries kept; rows of dropped ones end in a red bar",
        fontsize=10,
    )
    figure.colorbar(drawn, ax=axes, label="cosine similarity", shrink=0.85)
    save_figure(figure, path)


def plot_gallery(selection: Selection, data: ImageDataset, names: Sequence[str], path: Path, count: int = 16) -> None:
    """The images that keep the fewest and the most queries; wrong predictions are red.

    Args:
        selection: Counts and predictions.
        data: The images.
        names: Names of the model's labels.
        path: File of the picture.
        count: Images of each kind; fewer if there are not as many.
    """
    count = max(1, min(count, len(data) // 2))
    order = np.argsort(selection.counts, kind="stable")
    columns = min(8, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(4.5, 1.15 * columns), 2 * (1.4 * rows + 0.4)), layout="constrained")
    for part, (title, indices) in zip(
        figure.subfigures(2, 1, squeeze=False).flat,
        (("the fewest queries", order[:count]), ("the most queries", order[::-1][:count])),
        strict=True,
    ):
        part.suptitle(f"{title}, t = {selection.threshold:g}", fontsize=10)
        grid = part.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, i in zip(grid.flat, indices, strict=False):
            axes.imshow(np.asarray(data.image(int(i))))
            truth, answer = data.label_names[data.labels[i]], names[selection.predictions[i]]
            # Datasets without names have only indices to compare.
            right = truth == answer or truth == str(selection.predictions[i])
            axes.set_title(f"{selection.counts[i]}: {answer}", fontsize=8, color="black" if right else "red", pad=2)
    save_figure(figure, path)
