"""Plots of evaluations."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hf_visual_perceiver.evaluation.evaluate import Evaluation
from hf_visual_perceiver.utils.files import check_picture, written_aside


def plot_tradeoff(evaluation: Evaluation, path: str | Path) -> None:
    """Plot accuracy against mean MACs: one curve per knob, or set of knobs, that the budgets set."""
    save_figure(tradeoff_figure(evaluation), path)


def tradeoff_figure(evaluation: Evaluation) -> Figure:
    """The figure of `plot_tradeoff`."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    series = evaluation.series()
    for number, (name, rows) in enumerate(series.items()):
        axes.errorbar(
            [row.macs / 1e6 for row in rows],
            [100 * row.accuracy for row in rows],
            yerr=[100 * row.standard_error for row in rows],
            marker="os^vD"[number % 5],
            capsize=2,
            label=name or "network",
        )
        others = [row for other, rows_of_other in series.items() if other != name for row in rows_of_other]
        others.sort(key=lambda row: row.macs)
        for row in rows:
            # The label is placed on the side away from the other curve.
            above = bool(others) and row.accuracy > np.interp(
                row.macs, [other.macs for other in others], [other.accuracy for other in others]
            )
            axes.annotate(
                ", ".join(map(_value, row.budget.kwargs.values())) or "full",
                (row.macs / 1e6, 100 * row.accuracy),
                xytext=(-4, 5) if above else (4, -5),
                textcoords="offset points",
                ha="right" if above else "left",
                va="bottom" if above else "top",
                fontsize=8,
            )
    axes.set_xlabel("million MACs per image")
    axes.set_ylabel("accuracy (%)")
    images = evaluation.conditions.get("images")
    axes.set_title(
        f"{evaluation.conditions.get('model', 'One network')}, {images:,} images, ±1 standard error", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Save a figure atomically, so that no half-written file is left."""
    check_picture(Path(path))
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=150)
