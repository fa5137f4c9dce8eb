"""Pictures of what was measured."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from hf_visual_perceiver.evaluation.evaluate import Evaluation
from hf_visual_perceiver.utils.files import check_picture, written_aside


def plot_tradeoff(evaluation: Evaluation, path: str | Path) -> None:
    """Plot accuracy against mean MACs: one curve for Query Masking, one for Dynamic Query Selection."""
    save_figure(tradeoff_figure(evaluation), path)


def tradeoff_figure(evaluation: Evaluation) -> Figure:
    """The figure of `plot_tradeoff`."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    masking, selection = (
        sorted((row for row in evaluation.rows if (row.dqs_threshold is not None) == selects), key=lambda row: row.macs)
        for selects in (False, True)
    )
    for rows, others, label, marker in (
        (masking, selection, "first K queries (Query Masking)", "o"),
        (selection, masking, "Dynamic Query Selection, threshold t", "s"),
    ):
        if not rows:
            continue
        axes.errorbar(
            [row.macs / 1e6 for row in rows],
            [100 * row.accuracy for row in rows],
            yerr=[100 * row.standard_error for row in rows],
            marker=marker,
            capsize=2,
            label=label,
        )
        for row in rows:
            text = f"{row.dqs_threshold:g}" if row.dqs_threshold is not None else f"{row.num_active_queries}"
            # On the side that the other curve is not on.
            above = bool(others) and row.accuracy > np.interp(
                row.macs, [other.macs for other in others], [other.accuracy for other in others]
            )
            axes.annotate(
                text,
                (row.macs / 1e6, 100 * row.accuracy),
                xytext=(-4, 5) if above else (4, -5),
                textcoords="offset points",
                ha="right" if above else "left",
                va="bottom" if above else "top",
                fontsize=8,
            )
    axes.set_xlabel("multiply-accumulates per image (millions)")
    axes.set_ylabel("accuracy (%)")
    images = evaluation.conditions.get("images")
    axes.set_title(
        f"{evaluation.conditions.get('model', 'One network')}, {images:,} images, ±1 standard error", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Save aside and rename, so that no half-written picture is left."""
    check_picture(Path(path))
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=150)
