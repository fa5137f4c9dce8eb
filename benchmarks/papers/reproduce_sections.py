"""Sections of the report on the paper; each draws its figures and returns Markdown."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from reproduce_figures import Curve, plot_curves, plot_gallery, plot_selection, plot_similarities
from reproduce_measure import (
    FIXED,
    QUERY_MASKING,
    Measurements,
    SubsetRow,
    dqs_threshold,
    num_active_queries,
    specialist_role,
)

from hf_visual_perceiver import bundled_checkpoint
from hf_visual_perceiver.evaluation import paper
from hf_visual_perceiver.evaluation.attention_maps import plot_attention_maps
from hf_visual_perceiver.evaluation.evaluate import Row
from hf_visual_perceiver.evaluation.robustness_report import robustness_section
from hf_visual_perceiver.utils.files import read_json
from hf_visual_perceiver.utils.tables import markdown_table


ABSENT = "-"
PICTURES = "paper"  # the folder of the pictures, beside the report

# Role to what the report lacks without it.
WITHOUT = {
    QUERY_MASKING: "Tables 1 and 3, a column of Table 2, Figures 4, 6 and 10, a curve of Figures 2, 7 and 8, and the gallery",
    FIXED: "the random subsets of Table 2 and of Figures 2, 7 and 8, and Figure 3",
}
# K to the figure with the specialist's attention.
SPECIALIST_FIGURES = {1: 9, 16: 5}
COLORS = {QUERY_MASKING: "tab:blue", "specialists": "tab:orange", FIXED: "tab:green"}


def networks_section(found: Measurements, folder: Path) -> str:
    """Which networks were measured, how they differ from the paper's, and what is missing."""
    rows = [["paper", "-", "12 x 192", f"{paper.PARAMETERS_M:.2f}", "64", f"{paper.TRAINING_IMAGES / 1e6:.1f}"]]
    for role, network in found.networks.items():
        config, parameters = network.config, sum(p.numel() for p in network.parameters()) / 1e6
        size = f"{config.num_hidden_layers} x {config.hidden_size}"
        images = training_images(found.folders[role])
        trained = ABSENT if images is None else f"{images / 1e6:.1f}"
        called = f"{found.folders[role].name}, {config.architecture}"
        rows.append([role, called, size, f"{parameters:.2f}", f"{config.num_queries}", trained])
    headers = ("role", "network", "blocks x width", "parameters (M)", "Q", "training images (M, with repetition)")
    table = markdown_table(headers, rows, left=2)
    lines = ["## Networks", "", table, "", "A network of another size does not repeat the paper's experiment."]
    if found.missing:
        lines += ["", "Missing checkpoints, and what the report lacks without them:", ""]
        for role, name in found.missing.items():
            K = int(role.split()[-1]) if role not in WITHOUT else 0
            figure = f", and Figure {SPECIALIST_FIGURES[K]}" if K in SPECIALIST_FIGURES else ""
            without = WITHOUT.get(role, f"K = {K} among the specialists of Table 2 and of Figures 2, 7 and 8{figure}")
            where = "no folder is named" if name is None else f"no `{name}`"
            lines.append(f"- **{role}** ({where}): {without}.")
    return "\n".join(lines)


def table_1(found: Measurements, folder: Path) -> str:
    """MACs, time and accuracy at every K."""
    heading = "## Table 1: one network, every number of queries\n\n"
    if not found.query_masking:
        return heading + _lacking(QUERY_MASKING)
    lines = []
    for row in _masking(found):
        K = num_active_queries(row)
        lines.append(
            [
                f"{K}",
                f"{row.macs / 1e6:.2f}",
                _number(paper.MACS_M.get(K), "{}"),
                f"{row.ms_per_image:.3f} ({row.relative_time:.2f})",
                _number(paper.MILLISECONDS_PER_512.get(K)) + f" ({_number(paper.RELATIVE_TIME.get(K))})",
                _accuracy(row),
                _number(paper.QUERY_MASKING.get(K)),
                _gap(row.accuracy, paper.QUERY_MASKING.get(K)),
            ]
        )
    headers = ["K", "MACs (M)", "paper", "ms per image (relative)", "paper: ms per 512 (relative)", "accuracy (%)"]
    return (
        f"{heading}{markdown_table([*headers, 'paper', 'difference'], lines)}\n\n"
        "± is one standard error over images. Time is the median over batches, of the model alone, and relative to all queries. "
        "The paper does not name its hardware; compare only relative times. It calls its MACs FLOP."
    )


def bundled_section(found: Measurements, folder: Path) -> str:
    """The bundled network, from its card's measurement on the whole test set, beside the paper's network at that cost."""
    card = read_json(Path(bundled_checkpoint()) / "evaluation.json", dict)
    lines = []
    for row in card["rows"]:
        if "dqs_threshold" in row["budget"]:
            continue
        K, macs = row["budget"].get("num_active_queries", "all"), row["macs"] / 1e6
        within = max((k for k, cost in paper.MACS_M.items() if cost <= macs), default=None)
        published = f"{paper.QUERY_MASKING[within]:.2f} (K = {within}, {paper.MACS_M[within]})" if within else ABSENT
        accuracy = f"{100 * row['accuracy']:.2f} ± {100 * row['standard_error']:.2f}"
        lines.append([f"{K}", f"{macs:.2f}", accuracy, published])
    headers = ["K", "MACs (M)", "accuracy (%)", "paper, at most these MACs (K, MACs in M)"]
    c = card["conditions"]
    return (
        "## The bundled network\n\n"
        f"`{c['model']}` has a convolutional stem with levels and a block-causal trunk instead of the paper's patches and "
        f"full attention. Its first K queries, on all 10,000 test images:\n\n{markdown_table(headers, lines)}\n\n"
        f"Measured by `{c['command']}` at commit {c['commit']}. The paper's network has {paper.QUERY_MASKING[64]:.2f} % at "
        f"{paper.MACS_M[64]} M MACs with all queries; the README has the bundled network's cascades."
    )


def table_2(found: Measurements, folder: Path) -> str:
    """Query Masking, specialists for each K, and random subsets of the fixed network's queries."""
    masking = {num_active_queries(row): row for row in _masking(found)}
    subsets = {row.num_active_queries: row for row in found.random_subsets}
    lines = []
    for K in sorted({*paper.QUERY_MASKING, *masking, *found.specialists, *subsets}):
        subset = subsets.get(K)
        lines.append(
            [
                f"{K}",
                _accuracy(masking.get(K)),
                _number(paper.QUERY_MASKING.get(K)),
                _accuracy(found.specialists.get(K)),
                _number(paper.SPECIALISTS.get(K)),
                f"{100 * subset.mean:.2f} ± {100 * subset.deviation:.2f}" if subset else ABSENT,
                _number(paper.RANDOM_SUBSETS.get(K)),
            ]
        )
    headers = ["K", "Query Masking", "paper", "specialists", "paper", "random subsets", "paper"]
    curves = _three_curves(
        found,
        lambda row: row.num_active_queries if isinstance(row, SubsetRow) else num_active_queries(row),
        {K: float(K) for K in paper.QUERY_MASKING},
    )
    plot_curves(curves, "queries K", folder / "figure_2.png", ticks=(1, 2, 4, 8, 16, 32, 64))
    return (
        "## Table 2 and Figure 2: accuracy (%) against K\n\n"
        f"{markdown_table(headers, lines)}\n\n"
        f"Random subsets are drawn {paper.RANDOM_DRAWS} times from the network trained with all queries: mean ± standard deviation over "
        f"draws. Elsewhere ± is one standard error over images.\n\n{_picture('figure_2', 'Accuracy against K')}"
    )


def table_3(found: Measurements, folder: Path) -> str:
    """Dynamic Query Selection at every threshold."""
    heading = "## Table 3 and Figure 6: Dynamic Query Selection\n\n"
    if not found.query_masking:
        return heading + _lacking(QUERY_MASKING)
    masking = _masking(found)
    budgets, accuracies = [row.used_mean for row in masking], [row.accuracy for row in masking]
    selection = [row for row in found.query_masking.rows if dqs_threshold(row) is not None]
    lines = []
    for row in selection:
        t = dqs_threshold(row) or 0.0
        published = paper.SELECTION.get(t)
        queries, accuracy = published or (None, None)
        same = float(np.interp(row.used_mean, budgets, accuracies))
        lines.append(
            [
                f"{t:g}",
                f"{row.used_mean:.2f}",
                _number(queries),
                f"{row.used_std:.2f}",
                f"{row.used_min}",
                f"{row.used_max}",
                f"{row.macs / 1e6:.2f}",
                _accuracy(row),
                _number(accuracy),
                f"{100 * (row.accuracy - same):+.2f}",
            ]
        )
    headers = ["t", "mean K", "paper", "std", "min", "max", "MACs (M)", "accuracy (%)", "paper", "gain over first K"]
    paper_curves = [
        Curve("first K queries", list(paper.QUERY_MASKING), list(paper.QUERY_MASKING.values()), "tab:blue"),
        Curve(
            "Dynamic Query Selection",
            [queries for queries, _ in paper.SELECTION.values()],
            [accuracy for _, accuracy in paper.SELECTION.values()],
            "tab:orange",
        ),
    ]
    plot_selection(masking, selection, paper_curves, folder / "figure_6.png")
    return (
        f"{heading}{markdown_table(headers, lines)}\n\n"
        "The last column is the difference from the first K queries at the same mean K, interpolated between the measured K; it "
        "is negative where selection is less accurate. MACs include reading and comparing all queries.\n\n"
        f"{_picture('figure_6', 'Accuracy against the mean number of queries')}"
    )


def cost_figures(found: Measurements, folder: Path) -> str:
    """Figures 7 and 8."""
    curves = _three_curves(found, lambda row: row.macs / 1e6, paper.MACS_M)
    plot_curves(curves, "million MACs per image", folder / "figure_7.png")
    times = {K: ms / 512 for K, ms in paper.MILLISECONDS_PER_512.items()}
    curves = _three_curves(found, lambda row: row.ms_per_image, times)
    plot_curves(curves, "milliseconds per image (model only)", folder / "figure_8.png")
    return (
        "## Figures 7 and 8: accuracy against MACs and time\n\n"
        f"{_picture('figure_7', 'Accuracy against MACs')}\n\n{_picture('figure_8', 'Accuracy against time')}\n\n"
        "The paper's times are those of its Table 1, for all three kinds of network, on its own hardware with batches of 512 "
        "images. Do not compare them with ours."
    )


def attention_section(found: Measurements, folder: Path) -> str:
    """Figures 3, 4, 5 and 9, and the other specialists' maps."""
    figures = {FIXED: 3, QUERY_MASKING: 4, specialist_role(16): 5, specialist_role(1): 9}
    lines = [
        "## Figures 3, 4, 5 and 9: what each query reads",
        "Cross-attention averaged over the dataset, one map per query, in reading order. Each map is scaled from zero to its "
        "maximum.",
    ]
    for role in dict.fromkeys([*figures, *found.attention]):
        figure = figures.get(role)
        title = f"Figure {figure}, {role}" if figure else f"Not in the paper, {role}"
        if role not in found.attention:
            lines.append(f"{title}: no checkpoint.")
            continue
        maps = found.attention[role]
        name = f"figure_{figure}" if figure else f"attention_{role.replace(' ', '_')}"
        plot_attention_maps(maps, folder / f"{name}.png", f"{title}: {len(found.data):,} images")
        # The entropy's exponential: as many patches as are read evenly.
        read = np.exp(-(maps * np.log(np.maximum(maps, 1e-30))).sum((1, 2)))
        rest = f", the others {read[1:].mean():.1f}" if len(read) > 1 else ""
        lines.append(
            f"{title}. On average the first query reads {read[0]:.1f} of {maps[0].size} patches{rest} "
            f"(exponential of the map's entropy).\n\n{_picture(name, title)}"
        )
    return "\n\n".join(lines)


def selection_section(found: Measurements, folder: Path) -> str:
    """Figure 10 and the gallery."""
    heading = "## Figure 10: the selection of one image\n\n"
    selection = found.selection
    if not selection:
        return heading + _lacking(QUERY_MASKING)
    names = found.networks[QUERY_MASKING].config.label_names
    plot_similarities(selection, found.data, folder / "figure_10.png")
    plot_gallery(selection, found.data, names, folder / "gallery.png")
    return (
        f"{heading}{_picture('figure_10', 'Similarities of one image')}\n\n"
        f"Image {selection.example} of the dataset keeps {int(selection.keep.sum())} of {len(selection.keep)} queries at "
        f"t = {selection.threshold:g}.\n\n"
        "## Images with the fewest and the most queries\n\n"
        f"{_picture('gallery', 'Images with the fewest and the most queries')}\n\n"
        f"Titles give the number of queries kept at t = {selection.threshold:g} and the predicted class, red if wrong. Among images "
        "with equal numbers, the first of the dataset are shown (the last in the lower half)."
    )


def corruptions_section(found: Measurements, folder: Path) -> str:
    """Accuracy and queries under common corruptions, and whether harder images use more queries; not in the paper."""
    if found.robustness is None:
        return "## Robustness to common corruptions\n\nNot measured for this report."
    return robustness_section(found.robustness, folder).replace("](robustness", f"]({PICTURES}/robustness").rstrip()


# The report, in order. A section takes the measurements and the folder of the pictures.
SECTIONS: tuple[Callable[[Measurements, Path], str], ...] = (
    networks_section,
    bundled_section,
    table_1,
    table_2,
    table_3,
    cost_figures,
    attention_section,
    selection_section,
    corruptions_section,
)


def _masking(found: Measurements) -> list[Row]:
    return [row for row in found.query_masking.rows if dqs_threshold(row) is None] if found.query_masking else []


def _three_curves(found: Measurements, x: Callable, paper_x: dict[int, float]) -> list[Curve]:
    """Query Masking, specialists and random subsets, ours and the paper's, by a cost `x` of a row."""
    names = {QUERY_MASKING: "Query Masking", "specialists": "specialists", FIXED: "fixed Q, random subsets"}
    ours: dict[str, list[tuple[Any, float]]] = {
        QUERY_MASKING: [(row, row.accuracy) for row in _masking(found)],
        "specialists": [(row, row.accuracy) for row in found.specialists.values()],
        FIXED: [(row, row.mean) for row in found.random_subsets],
    }
    theirs = {QUERY_MASKING: paper.QUERY_MASKING, "specialists": paper.SPECIALISTS, FIXED: paper.RANDOM_SUBSETS}
    curves = []
    for kind, rows in ours.items():
        if rows:
            deviation = [100 * row.deviation for row in found.random_subsets] if kind == FIXED else None
            accuracy = [100 * accuracy for _, accuracy in rows]
            curves.append(Curve(names[kind], [x(row) for row, _ in rows], accuracy, COLORS[kind], deviation=deviation))
    for kind, values in theirs.items():
        curves.append(Curve(names[kind], [paper_x[K] for K in values], list(values.values()), COLORS[kind], paper=True))
    return curves


def training_images(folder: Path) -> int | None:
    """Total number of training images over all stages, from training.json; None without the file."""

    def count(facts: dict[str, Any]) -> int:
        earlier = facts.get("earlier_training")
        return facts["recipe"]["steps"] * facts["recipe"]["batch_size"] + (count(earlier) if earlier else 0)

    file = folder / "training.json"
    return read_json(file, count) if file.is_file() else None


def _lacking(role: str) -> str:
    return f"Missing: no {role} checkpoint."


def _picture(name: str, text: str) -> str:
    return f"![{text}]({PICTURES}/{name}.png)"


def _accuracy(row: Row | None) -> str:
    return ABSENT if row is None else f"{100 * row.accuracy:.2f} ± {100 * row.standard_error:.2f}"


def _number(value: float | None, form: str = "{:.2f}") -> str:
    return ABSENT if value is None else form.format(value)


def _gap(accuracy: float, published: float | None) -> str:
    return ABSENT if published is None else f"{100 * accuracy - published:+.2f}"
