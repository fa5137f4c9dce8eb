"""Robustness results as tables, figures and a section of a report."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_visual_perceiver.data.images import load_images
from hf_visual_perceiver.evaluation.corruptions import CORRUPTIONS, corrupt
from hf_visual_perceiver.evaluation.difficulty import Difficulty
from hf_visual_perceiver.evaluation.plots import save_figure
from hf_visual_perceiver.evaluation.robustness import ALL, CLEAN, Outcome, Robustness
from hf_visual_perceiver.utils.bundled import default_dataset
from hf_visual_perceiver.utils.conditions import conditions_line
from hf_visual_perceiver.utils.tables import markdown_table


SHEET_IMAGE, SHEET_SEVERITIES = 25, (1, 3, 5)  # of the sample's test split


def robustness_section(result: Robustness, folder: Path) -> str:
    """Write a report's section in Markdown, with headings from the second level on, and its figures into `folder`.

    Args:
        result: The result of `measure_robustness`.
        folder: Folder of the report; it is created if it is missing.

    Returns:
        The text; it refers to the figures by file name, without the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plot_severities(result, folder / "robustness_severity.png")
    plot_corruptions(result, folder / "robustness_corruptions.png")
    parts = [
        "## Robustness to common corruptions",
        "Accuracy (%), mean over severities; ± is one standard error over images, for these corruptions.",
        accuracy_table(result),
        f"![Accuracy and {result.unit} used against severity](robustness_severity.png)",
        f"![Accuracy and {result.unit} used by corruption](robustness_corruptions.png)",
    ]
    if set(result.corruptions) <= set(CORRUPTIONS):
        plot_contact_sheet(folder / "robustness_corrupted.png")
        parts.insert(1, "![One image under every corruption](robustness_corrupted.png)")
    if result.adaptive:
        parts += [f"Mean number of {result.unit} used, by corruption (mean over severities).", used_table(result)]
    if result.difficulty:
        plot_difficulty(result, folder / "robustness_difficulty.png")
        parts += [
            f"### Do harder images use more {result.unit}?",
            "On clean images. An image is harder if the full network is less confident or wrong. "
            f"Rank correlations of {result.unit} used are Spearman's, with errors and intervals from a bootstrap over images.",
            difficulty_table(result),
            f"![Full network's accuracy and confidence against {result.unit} used](robustness_difficulty.png)",
            *(bins_table(result, difficulty) for difficulty in result.difficulty),
        ]
    if "command" in result.conditions:
        parts += ["Measured by", f"    {result.conditions['command']}"]
    return "\n\n".join([*parts, f"Conditions: {conditions_line(result.conditions)}."]) + "\n"


def accuracy_table(result: Robustness) -> str:
    """Accuracy per corruption and budget, mean over severities, as Markdown."""
    rows = [
        [name, *(f"{100 * o.accuracy:.2f} ± {100 * o.standard_error:.2f}" for o in outcomes)]
        for name, outcomes in _table_rows(result)
    ]
    return markdown_table(["corruption", *result.names], rows)


def used_table(result: Robustness) -> str:
    """Mean usage per corruption and adaptive budget, mean over severities, as Markdown."""
    places = result.adaptive
    rows = [[name, *(f"{outcomes[i].used_mean:.2f}" for i in places)] for name, outcomes in _table_rows(result)]
    return markdown_table(["corruption", *(result.names[i] for i in places)], rows)


def difficulty_rows(result: Robustness) -> list[list[str]]:
    """Headers and cells of a table of the `Difficulty` of each adaptive budget."""
    rows = [["setting", "with confidence", "with error", f"{result.unit} where right", "where wrong"]]
    for d in result.difficulty:
        means = ("-" if mean is None else f"{mean:.2f}" for mean in (d.used_right, d.used_wrong))
        rows.append([d.budget.short(result.knobs), str(d.with_confidence), str(d.with_error), *means])
    return rows


def difficulty_table(result: Robustness) -> str:
    """`difficulty_rows` as Markdown."""
    headers, *rows = difficulty_rows(result)
    return markdown_table(headers, rows)


def bins_table(result: Robustness, difficulty: Difficulty) -> str:
    """The full network's accuracy and confidence on images, binned by their usage, as Markdown."""
    rows = [
        [
            f"{b.used_min} to {b.used_max}",
            f"{b.images:,}",
            f"{100 * b.accuracy:.2f} ± {100 * b.standard_error:.2f}",
            f"{100 * b.confidence:.2f}",
        ]
        for b in difficulty.bins
    ]
    first = f"{result.unit} used at {difficulty.budget.short(result.knobs)}"
    return markdown_table([first, "images", "full network's accuracy (%)", "its mean confidence (%)"], rows)


def plot_severities(result: Robustness, path: Path) -> None:
    """Plot accuracy at each budget, and usage at each adaptive one, against severity; mean over corruptions."""
    adaptive = result.adaptive
    figure = Figure(figsize=(11 if adaptive else 6, 4.5), layout="constrained")
    axes, *others = figure.subplots(1, 2 if adaptive else 1, squeeze=False)[0]
    severities = [0, *result.severities]
    columns = [result.cell(ALL, s) if s else result.cell(CLEAN, 0) for s in severities]
    for i, name in enumerate(result.names):
        axes.errorbar(
            severities,
            [100 * outcomes[i].accuracy for outcomes in columns],
            yerr=[100 * outcomes[i].standard_error for outcomes in columns],
            color=_colours(result)[i],
            linestyle="--" if i in adaptive else "-",
            marker="s" if i in adaptive else "o",
            markersize=4,
            capsize=2,
            label=name,
        )
    axes.set_ylabel("accuracy (%)")
    axes.set_title("accuracy, ±1 standard error", fontsize=10)
    for kept in others:
        for i in adaptive:
            kept.plot(
                severities,
                [outcomes[i].used_mean for outcomes in columns],
                "s--",
                color=_colours(result)[i],
                markersize=4,
                label=result.names[i],
            )
        kept.set_ylabel(f"mean {result.unit} used")
        kept.set_title(f"{result.unit} used", fontsize=10)
        kept.set_ylim(bottom=0)
    for one in (axes, *others):
        one.set_xlabel("severity (0: clean)")
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
        one.grid(alpha=0.3)
        one.legend(fontsize=8)
    figure.suptitle(f"{_name(result)}, mean over {len(result.corruptions)} corruptions", fontsize=10)
    save_figure(figure, path)


def plot_corruptions(result: Robustness, path: Path) -> None:
    """Plot accuracy by corruption and budget, and the change in usage relative to clean images."""
    adaptive = result.adaptive
    names = result.corruptions
    accuracy = np.array([[100 * o.accuracy for o in result.cell(name, None)] for name in names])
    kept = np.array([[o.used_mean for o in result.cell(name, None)] for name in names])
    change = (kept - [o.used_mean for o in result.cell(CLEAN, 0)])[:, adaptive]
    size = (3.2 + 0.8 * (len(result.budgets) + len(adaptive)), 1.8 + 0.3 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    ratios = [len(result.budgets), *([len(adaptive)] if adaptive else [])]
    axes = figure.subplots(1, len(ratios), sharey=True, squeeze=False, gridspec_kw={"width_ratios": ratios})[0]
    # The colour scales extend beyond the values, so that black digits stay readable on the colours.
    low, high = float(accuracy.min()), float(accuracy.max())
    reach = (low, high + 0.6 * (high - low) + 1)
    _heat_map(axes[0], accuracy, ".1f", "YlGn", reach, result.names)
    axes[0].set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes[0].set_title("accuracy (%)", fontsize=10)
    if adaptive:
        most = 1.6 * max(float(np.abs(change).max()), 1e-9)
        _heat_map(axes[1], change, "+.1f", "RdBu_r", (-most, most), [result.names[i] for i in adaptive])
        axes[1].set_title(f"{result.unit} used, minus clean images", fontsize=10)
    figure.suptitle(f"{_name(result)}, mean over {severities_in_words(result)}", fontsize=10)
    save_figure(figure, path)


def plot_difficulty(result: Robustness, path: Path) -> None:
    """Plot the full network's accuracy and confidence against usage, one panel per adaptive budget."""
    figure = Figure(figsize=(1 + 3.4 * len(result.difficulty), 4), layout="constrained")
    panels = figure.subplots(1, len(result.difficulty), sharey=True, squeeze=False)[0]
    for axes, difficulty in zip(panels, result.difficulty, strict=True):
        x = [b.used_mean for b in difficulty.bins]
        spread = [[a - b.used_min for a, b in zip(x, difficulty.bins, strict=True)]]
        spread.append([b.used_max - a for a, b in zip(x, difficulty.bins, strict=True)])
        accuracy = [100 * b.accuracy for b in difficulty.bins]
        errors = [100 * b.standard_error for b in difficulty.bins]
        axes.errorbar(x, accuracy, errors, spread, "o-", capsize=2, elinewidth=0.8, label="accuracy")
        axes.plot(x, [100 * b.confidence for b in difficulty.bins], "s--", label="mean confidence")
        axes.set_title(
            f"{difficulty.budget.short(result.knobs)}; rank correlation of {result.unit}\n"
            f"with confidence {_short(difficulty.with_confidence.value)}, with error {_short(difficulty.with_error.value)}",
            fontsize=9,
        )
        axes.set_xlabel(f"{result.unit} used (mean and range of the bin)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("full network (%)")
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{_name(result)}, clean images", fontsize=10)
    save_figure(figure, path)


def plot_contact_sheet(path: Path) -> None:
    """Show an image of the embedded sample under each of our own corruptions, one row for each of three severities."""
    image = np.asarray(load_images(default_dataset(), "test").image(SHEET_IMAGE))
    figure = Figure(figsize=(1.25 * len(CORRUPTIONS), 1.3 * len(SHEET_SEVERITIES)), layout="constrained")
    grid = figure.subplots(len(SHEET_SEVERITIES), len(CORRUPTIONS))
    for row, severity in zip(grid, SHEET_SEVERITIES, strict=True):
        for axes, name in zip(row, CORRUPTIONS, strict=True):
            axes.set_axis_off()
            axes.imshow(corrupt(image[None], name, severity)[0])
            axes.set_title(f"{name.replace('_', ' ')}, {severity}", fontsize=7, pad=2)
    save_figure(figure, path)


def severities_in_words(result: Robustness) -> str:
    """The measured severities in words, such as "severities 1, 3, 5"."""
    return ("severity " if len(result.severities) == 1 else "severities ") + ", ".join(map(str, result.severities))


def _table_rows(result: Robustness) -> list[tuple[str, list[Outcome]]]:
    rows = [("clean", result.cell(CLEAN, 0))]
    rows += [(name.replace("_", " "), result.cell(name, None)) for name in result.corruptions]
    rows += [(f"**all, severity {severity}**", result.cell(ALL, severity)) for severity in result.severities]
    return [*rows, ("**all, mean**", result.cell(ALL, None))]


def _colours(result: Robustness) -> list[str]:
    return [f"C{i % 10}" for i in range(len(result.budgets))]


def _heat_map(
    axes: Axes, values: np.ndarray, form: str, colours: str, reach: tuple[float, float], labels: list[str]
) -> None:
    axes.imshow(values, cmap=colours, vmin=reach[0], vmax=reach[1], aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, format(value, form), ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)


def _short(value: float | None) -> str:
    return "not defined" if value is None else f"{value:+.2f}"


def _name(result: Robustness) -> str:
    return f"{result.conditions.get('model', 'One network')}, {result.conditions['images']:,} images"
