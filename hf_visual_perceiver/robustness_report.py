"""Robustness as tables, pictures, sentences, and a section of a report."""

import shlex
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .corruptions import CORRUPTIONS, SEVERITIES, corrupt
from .difficulty import Difficulty, difficulty_verdict
from .loading import SAMPLE, default_dataset
from .plots import save_figure
from .robustness import ALL, CLEAN, Outcome, Robustness, robustness_points
from .training.data import load_images


SHEET_IMAGE = 25  # of the sample's test split


def robustness_section(result: Robustness, folder: Path) -> str:
    """A report's section in Markdown, headings from the second level on; its pictures are written into `folder`.

    Args:
        result: What `measure_robustness` returned.
        folder: Where the report lies; it is made if it is missing.

    Returns:
        The text; it names the pictures by file name, without the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plot_severities(result, folder / "robustness_severity.png")
    plot_corruptions(result, folder / "robustness_corruptions.png")
    plot_contact_sheet(folder / "robustness_corrupted.png")
    parts = [
        "## Robustness to common corruptions",
        f"{len(result.corruptions)} corruptions of the CIFAR-10-C kind (Hendrycks & Dietterich 2019), "
        f"{severities_in_words(result)}, {result.conditions['images']:,} images"
        f"{_of_dataset(result)}. They are drawn anew with the published constants, so these are not CIFAR-10-C numbers; "
        "`hf_visual_perceiver/corruptions.py` names each difference.",
        f"{robustness_verdict(result)}",
        "![One image under every corruption](robustness_corrupted.png)",
        "Accuracy (%), mean over severities; ± is one standard error over images, the corruptions taken as given.",
        accuracy_table(result),
        "![Accuracy and queries kept against severity](robustness_severity.png)",
        "![Accuracy and queries kept by corruption](robustness_corruptions.png)",
    ]
    if _thresholds(result):
        parts += ["Mean queries that selection keeps, by corruption (mean over severities).", queries_table(result)]
    if result.difficulty:
        plot_difficulty(result, folder / "robustness_difficulty.png")
        parts += [
            "### Does selection spend more queries on harder images?",
            "On the clean images; harder means that the full network is less sure of its answer, or that the answer is wrong. "
            "Rank correlations are Spearman's, their errors and intervals from a bootstrap over images.",
            "\n".join(f"- {difficulty_verdict(difficulty)}" for difficulty in result.difficulty),
            correlation_table(result),
            "![Full network's accuracy and confidence against queries kept](robustness_difficulty.png)",
            *(bins_table(difficulty) for difficulty in result.difficulty),
        ]
    conditions = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in result.conditions.items())
    parts += ["Measured by", f"    {robustness_command_line(result)}", f"Conditions: {conditions}."]
    return "\n\n".join(parts) + "\n"


def robustness_verdict(result: Robustness) -> str:
    """What corruption costs at each operating point, and what selection does about it, in sentences."""
    clean, corrupted = result.cell(CLEAN, 0), result.cell(ALL, None)
    after = {o.point: o for o in corrupted}
    before = {o.point: o for o in clean}
    text = (
        f"At {result.full} the mean accuracy over all corruptions is {100 * after[result.full].accuracy:.2f} %, against "
        f"{100 * before[result.full].accuracy:.2f} % on the clean images. Percentage points lost: "
    )
    text += ", ".join(f"{100 * (before[p].accuracy - after[p].accuracy):.2f} at {p}" for p in result.points) + "."
    thresholds = [p for p in result.points if p.dqs_threshold is not None]
    if not thresholds:
        return text
    worst = result.severities[-1]
    hardest = {o.point: o for o in result.cell(ALL, worst)}
    text += f" Queries kept, clean and at severity {worst}: " + ", ".join(
        f"{before[p].queries_mean:.2f} and {hardest[p].queries_mean:.2f} at {p}" for p in thresholds
    )
    used = {name: {o.point: o.queries_mean for o in result.cell(name, None)} for name in result.corruptions}
    more = {p: [name for name in used if used[name][p] > before[p].queries_mean] for p in thresholds}
    text += ". Corruptions under which it keeps more queries than on clean images: " + ", ".join(
        f"{len(more[p])} of {len(used)} at {p}" for p in thresholds
    )
    budgets = sorted((o.queries_mean, o.accuracy) for o in corrupted if o.dqs_threshold is None)
    inside = [p for p in thresholds if budgets[0][0] <= after[p].queries_mean <= budgets[-1][0]]
    text += "."
    if len(budgets) > 1 and inside:
        curve = ([q for q, _ in budgets], [a for _, a in budgets])
        wins = sum(after[p].accuracy > float(np.interp(after[p].queries_mean, *curve)) for p in inside)
        text += (
            f" At equal mean queries on the corrupted images, selection is more accurate than the first K queries at {wins} of "
            f"{len(inside)} thresholds within the measured K (accuracy between them interpolated)."
        )
    return text


def robustness_sentence(result: Robustness) -> str:
    """The result in a sentence, for a model card."""
    clean, corrupted = (
        next(o for o in result.cell(*place) if o.point == result.full) for place in ((CLEAN, 0), (ALL, None))
    )
    return (
        f"Under {len(result.corruptions)} corruptions of the CIFAR-10-C kind ("
        f"{severities_in_words(result)}; {result.conditions['images']:,} images{_of_dataset(result)}) its mean "
        f"accuracy at {result.full} is {100 * corrupted.accuracy:.2f} %, against {100 * clean.accuracy:.2f} % on the same images "
        "uncorrupted (robustness.json); other shifts were not measured."
    )


def accuracy_table(result: Robustness) -> str:
    """Accuracy per corruption and operating point, mean over severities, as Markdown."""
    lines = _header(["corruption", *map(str, result.points)])
    for name, outcomes in _table_rows(result):
        lines.append(_row([name, *(f"{100 * o.accuracy:.2f} ± {100 * o.standard_error:.2f}" for o in outcomes)]))
    return "\n".join(lines)


def queries_table(result: Robustness) -> str:
    """Mean queries kept per corruption and threshold, mean over severities, as Markdown."""
    thresholds = _thresholds(result)
    lines = _header(["corruption", *(str(result.points[i]) for i in thresholds)])
    for name, outcomes in _table_rows(result):
        lines.append(_row([name, *(f"{outcomes[i].queries_mean:.2f}" for i in thresholds)]))
    return "\n".join(lines)


def correlation_table(result: Robustness) -> str:
    """Rank correlations of queries kept with the full network's confidence and error, as Markdown."""
    lines = _header(["t", "with confidence", "with error"])
    for d in result.difficulty:
        lines.append(_row([f"{d.dqs_threshold:g}", str(d.with_confidence), str(d.with_error)]))
    return "\n".join(lines)


def bins_table(difficulty: Difficulty) -> str:
    """The full network on images by the queries that selection keeps of them, as Markdown."""
    t = f"{difficulty.dqs_threshold:g}"
    lines = _header([f"queries kept at t = {t}", "images", "full network's accuracy (%)", "its mean confidence (%)"])
    for b in difficulty.bins:
        kept = f"{b.queries_min} to {b.queries_max}" if b.queries_max > b.queries_min else f"{b.queries_min}"
        accuracy = f"{100 * b.accuracy:.2f} ± {100 * b.standard_error:.2f}"
        lines.append(_row([kept, f"{b.images:,}", accuracy, f"{100 * b.confidence:.2f}"]))
    return "\n".join(lines)


def plot_severities(result: Robustness, path: Path) -> None:
    """Plot accuracy against severity at each operating point, and the queries kept at each t; mean over corruptions."""
    thresholds = _thresholds(result)
    figure = Figure(figsize=(11 if thresholds else 6, 4.5), layout="constrained")
    axes, *others = figure.subplots(1, 2 if thresholds else 1, squeeze=False)[0]
    severities = [0, *result.severities]
    columns = [result.cell(ALL, s) if s else result.cell(CLEAN, 0) for s in severities]
    for i, point in enumerate(result.points):
        axes.errorbar(
            severities,
            [100 * outcomes[i].accuracy for outcomes in columns],
            yerr=[100 * outcomes[i].standard_error for outcomes in columns],
            color=_colours(result)[i],
            linestyle="-" if point.dqs_threshold is None else "--",
            marker="o" if point.dqs_threshold is None else "s",
            markersize=4,
            capsize=2,
            label=str(point),
        )
    axes.set_ylabel("accuracy (%)")
    axes.set_title("accuracy, ±1 standard error", fontsize=10)
    for kept in others:
        for i in thresholds:
            kept.plot(
                severities,
                [outcomes[i].queries_mean for outcomes in columns],
                "s--",
                color=_colours(result)[i],
                markersize=4,
                label=str(result.points[i]),
            )
        kept.set_ylabel("mean queries kept")
        kept.set_title("queries that selection keeps", fontsize=10)
        kept.set_ylim(bottom=0)
    for one in (axes, *others):
        one.set_xlabel("severity (0: clean)")
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
        one.grid(alpha=0.3)
        one.legend(fontsize=8)
    figure.suptitle(f"{_name(result)}, mean over {len(result.corruptions)} corruptions", fontsize=10)
    save_figure(figure, path)


def plot_corruptions(result: Robustness, path: Path) -> None:
    """Plot accuracy by corruption and operating point, and how many queries more or fewer than on clean images are kept."""
    thresholds = _thresholds(result)
    names = result.corruptions
    accuracy = np.array([[100 * o.accuracy for o in result.cell(name, None)] for name in names])
    kept = np.array([[o.queries_mean for o in result.cell(name, None)] for name in names])
    change = (kept - [o.queries_mean for o in result.cell(CLEAN, 0)])[:, thresholds]
    size = (3.2 + 0.8 * (len(result.points) + len(thresholds)), 1.8 + 0.3 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    ratios = [len(result.points), *([len(thresholds)] if thresholds else [])]
    axes = figure.subplots(1, len(ratios), sharey=True, squeeze=False, gridspec_kw={"width_ratios": ratios})[0]
    # The scales go on beyond the values, so that black digits can be read on the colours.
    low, high = float(accuracy.min()), float(accuracy.max())
    reach = (low, high + 0.6 * (high - low) + 1)
    _heat_map(axes[0], accuracy, ".1f", "YlGn", reach, [str(p) for p in result.points])
    axes[0].set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes[0].set_title("accuracy (%)", fontsize=10)
    if thresholds:
        most = 1.6 * max(float(np.abs(change).max()), 1e-9)
        _heat_map(axes[1], change, "+.1f", "RdBu_r", (-most, most), [str(result.points[i]) for i in thresholds])
        axes[1].set_title("queries kept, less those on clean images", fontsize=10)
    figure.suptitle(f"{_name(result)}, mean over {severities_in_words(result)}", fontsize=10)
    save_figure(figure, path)


def plot_difficulty(result: Robustness, path: Path) -> None:
    """Plot the full network's accuracy and confidence against the queries that selection keeps, one panel for each t."""
    figure = Figure(figsize=(1 + 3.4 * len(result.difficulty), 4), layout="constrained")
    panels = figure.subplots(1, len(result.difficulty), sharey=True, squeeze=False)[0]
    for axes, difficulty in zip(panels, result.difficulty, strict=True):
        x = [b.queries_mean for b in difficulty.bins]
        spread = [[a - b.queries_min for a, b in zip(x, difficulty.bins, strict=True)]]
        spread.append([b.queries_max - a for a, b in zip(x, difficulty.bins, strict=True)])
        accuracy = [100 * b.accuracy for b in difficulty.bins]
        errors = [100 * b.standard_error for b in difficulty.bins]
        axes.errorbar(x, accuracy, errors, spread, "o-", capsize=2, elinewidth=0.8, label="accuracy")
        axes.plot(x, [100 * b.confidence for b in difficulty.bins], "s--", label="mean confidence")
        axes.set_title(
            f"t = {difficulty.dqs_threshold:g}; rank correlation of queries\n"
            f"with confidence {_short(difficulty.with_confidence.value)}, with error {_short(difficulty.with_error.value)}",
            fontsize=9,
        )
        axes.set_xlabel("queries kept (mean and range of the bin)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("full network (%)")
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{_name(result)}, clean images", fontsize=10)
    save_figure(figure, path)


def plot_contact_sheet(path: Path, severities: tuple[int, ...] = (1, 3, 5), index: int = SHEET_IMAGE) -> None:
    """Show one image of the embedded sample under every corruption.

    Args:
        path: The picture.
        severities: One row each.
        index: Of the image in the sample's test split.

    Raises:
        ValueError: If there is no such severity.
    """
    if not severities or not set(severities) <= set(SEVERITIES):
        raise ValueError(f"Expected severities from 1 to 5, got {', '.join(map(str, severities)) or 'none'}.")
    image = np.asarray(load_images(default_dataset(), "test").image(index))
    shown = [CLEAN, *CORRUPTIONS]
    columns = 6
    blocks = -(-len(shown) // columns)
    figure = Figure(figsize=(1.25 * columns, blocks * (0.35 + 1.2 * len(severities))), layout="constrained")
    grid = figure.subplots(blocks * len(severities), columns)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, name in enumerate(shown):
        block, column = divmod(number, columns)
        for row, severity in enumerate(severities):
            axes = grid[block * len(severities) + row, column]
            if name == CLEAN and row:
                continue
            axes.imshow(image if name == CLEAN else corrupt(image[None], name, severity, indices=[index])[0])
            label = name.replace("_", " ")
            title = label if name == CLEAN else f"{label}\n{severity}" if row == 0 else f"{severity}"
            axes.set_title(title, fontsize=7, pad=2)
    save_figure(figure, path)


def robustness_command_line(result: Robustness) -> str:
    """The command that measures this."""
    c = result.conditions
    parts = ["visual-perceiver", "robustness"]
    parts += ["--model", f"checkpoints/{c['model']}"] if "model" in c else []
    parts += ["--dataset", c["dataset"]] if c.get("dataset", SAMPLE) != SAMPLE else []
    parts += ["--split", c["split"]] if "split" in c else []
    if result.corruptions != list(CORRUPTIONS):
        parts += [word for name in result.corruptions for word in ("--corruption", name)]
    if result.severities != list(SEVERITIES):
        parts += [word for severity in result.severities for word in ("--severity", str(severity))]
    budgets = [p.num_active_queries for p in result.points if p.dqs_threshold is None and p.num_active_queries]
    if result.points != robustness_points(max(budgets)):
        parts += [word for K in budgets for word in ("--num-active-queries", str(K))]
        thresholds = [p.dqs_threshold for p in result.points if p.dqs_threshold is not None]
        parts += [word for t in thresholds for word in ("--dqs-threshold", f"{t:g}")]
    parts += ["--max-images", str(c["images"])] if c["images"] < c["images_in_split"] else []
    parts += ["--seed", str(c["seed"]), "--batch-size", str(c["batch_size"]), "--dtype", c["dtype"]]
    parts += ["--fast"] if c.get("form") == "optimized" else []
    return shlex.join(parts)


def severities_in_words(result: Robustness) -> str:
    """The severities measured, such as "severities 1, 3, 5"."""
    return ("severity " if len(result.severities) == 1 else "severities ") + ", ".join(map(str, result.severities))


def _table_rows(result: Robustness) -> list[tuple[str, list[Outcome]]]:
    rows = [("clean", result.cell(CLEAN, 0))]
    rows += [(name.replace("_", " "), result.cell(name, None)) for name in result.corruptions]
    rows += [(f"**all, severity {severity}**", result.cell(ALL, severity)) for severity in result.severities]
    return [*rows, ("**all, mean**", result.cell(ALL, None))]


def _header(cells: list[str]) -> list[str]:
    return [_row(cells), "|" + "---|" * len(cells)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _thresholds(result: Robustness) -> list[int]:
    """The places of the points that select."""
    return [i for i, point in enumerate(result.points) if point.dqs_threshold is not None]


def _colours(result: Robustness) -> list[str]:
    return [f"C{i % 10}" for i in range(len(result.points))]


def _heat_map(axes, values: np.ndarray, form: str, colours: str, reach: tuple[float, float], labels: list[str]) -> None:
    axes.imshow(values, cmap=colours, vmin=reach[0], vmax=reach[1], aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, format(value, form), ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)


def _short(value: float | None) -> str:
    return "not defined" if value is None else f"{value:+.2f}"


def _name(result: Robustness) -> str:
    return f"{result.conditions.get('model', 'One network')}, {result.conditions['images']:,} images"


def _of_dataset(result: Robustness) -> str:
    c = result.conditions
    return f" of {c['dataset']}, split {c['split']}" if {"dataset", "split"} <= set(c) else ""
