"""Compare rules that give each image its own number of queries: accuracy against MACs and mean queries.

    python benchmarks/selection.py --dataset FOLDER_OR_ID --split train --max-images 5000 --train-images 4000 \\
        --json selection.json --plot selection.png

The last `--max-images` of the split are the validation set. Each rule's parameters are chosen for each budget on every other
image of it; the printed results are measured on the rest. The predictor is trained on the `--train-images` before them, or by
default on the half for choosing. Rules: the first K queries; the paper's similarity with both references; a cascade of two or
three stages; a predictor of K. `--time` adds the share of a full forward that the selection itself takes.
"""

import itertools
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hf_visual_perceiver.data.images import ImageDataset, load_images, normalise, pixels_of_size
from hf_visual_perceiver.evaluation.cascade import search_thresholds, stopping_stages
from hf_visual_perceiver.evaluation.evaluate import labels_of_model
from hf_visual_perceiver.evaluation.plots import check_picture, save_figure
from hf_visual_perceiver.evaluation.predictor import choose_budgets, fit_predictor, predicted_macs
from hf_visual_perceiver.inference.cascade import top_probability
from hf_visual_perceiver.inference.loading import SAMPLE, choose_device, default_dataset, default_model, load_model
from hf_visual_perceiver.modeling import Budget, VisualPerceiverForImageClassification, count_macs, select_queries
from hf_visual_perceiver.modeling.macs import count_trunk_macs
from hf_visual_perceiver.modeling.query_selection import cosine_similarities
from hf_visual_perceiver.modeling.ragged import PackedLayout
from hf_visual_perceiver.utils.conditions import conditions_line, measurement_conditions
from hf_visual_perceiver.utils.console import run_command
from hf_visual_perceiver.utils.files import check_writable, write_json


BUDGETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
THRESHOLDS = {"all": (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99), "kept": (0.5, 0.6, 0.7, 0.8, 0.9)}
SHARES = (0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PROBES = 8
RULES = ("first K", "similarity, all", "similarity, kept", "cascade", "predictor")
# One option of a rule: its name, and for each image whether it is right, its MACs and its queries.
Option = tuple[str, np.ndarray, np.ndarray, np.ndarray]


@torch.no_grad()
def answers(
    model: VisualPerceiverForImageClassification, data: ImageDataset, batch_size: int, similarity: bool = True
) -> dict[str, np.ndarray]:
    """Inputs of the rules: outputs at each K and t, and the attention outputs of the first queries."""
    parts, config, device = model.visual_perceiver, model.config, next(model.parameters()).device
    cfg, Q = config.timm_pretrained_cfg, config.num_queries
    found: dict[str, list[np.ndarray]] = {}
    for first in track(range(0, len(data), batch_size), "answers", console=Console(stderr=True)):
        indices = range(first, min(first + batch_size, len(data)))
        pixels = normalise(pixels_of_size(data, indices, config.image_height_width), cfg["mean"], cfg["std"]).to(device)
        y = parts.read(pixels, Q)
        batch = {"y": y[:, :PROBES]}
        for K in budgets(Q):
            logits = model.head(parts.decode(parts.process(parts.select(y[:, :K], None))))
            batch |= {f"K{K}": logits.argmax(-1), f"p{K}": top_probability(logits)}
        for reference, t in [(r, t) for r in THRESHOLDS for t in THRESHOLDS[r]] if similarity else []:
            keep = select_queries(y, t, reference)
            logits = model.head(parts.decode(parts.process(parts.keep_queries(y, keep))))
            batch |= {f"{reference}{t}": logits.argmax(-1), f"n{reference}{t}": keep.sum(1)}
        for key, value in batch.items():
            found.setdefault(key, []).append(value.cpu().numpy())
    return {key: np.concatenate(values) for key, values in found.items()}


def budgets(Q: int) -> list[int]:
    """The tried values of K."""
    return [*(K for K in BUDGETS if Q > K), Q]


def fixed_options(
    model: VisualPerceiverForImageClassification, found: dict[str, np.ndarray], labels: np.ndarray
) -> dict[str, list[Option]]:
    """The rules whose options do not depend on the budget: first K and similarity."""
    config, n = model.config, len(labels)
    Q = config.num_queries
    options: dict[str, list[Option]] = {
        "first K": [
            (f"K = {K}", found[f"K{K}"] == labels, np.full(n, float(count_macs(config, K))), np.full(n, K))
            for K in budgets(Q)
        ]
    }
    for reference, thresholds in THRESHOLDS.items():
        cost = np.array([0.0, *(count_macs(config, k, Q) for k in range(1, Q + 1))])
        options[f"similarity, {reference}"] = [
            (f"t = {t:g}", found[f"{reference}{t}"] == labels, cost[kept], kept)
            for t in thresholds
            for kept in [found[f"n{reference}{t}"]]
        ]
    return options


def predictor_options(
    model: VisualPerceiverForImageClassification,
    train: tuple[np.ndarray, np.ndarray],
    y: np.ndarray,
    right: np.ndarray,
) -> list[Option]:
    """The predictor at several prices; `train` holds the attention outputs and whether each budget was right, `right` (n, P)."""
    ks = budgets(model.config.num_queries)
    predictor = fit_predictor(torch.from_numpy(train[0]), torch.from_numpy(train[1]))
    macs = np.array(predicted_macs(model.config, [Budget(num_active_queries=K) for K in ks], predictor), dtype=float)
    trunk = [count_trunk_macs(model.config, K) for K in ks]
    with torch.no_grad():
        odds = predictor(torch.from_numpy(y))
    options = []
    for price in (*np.geomspace(0.003, 8, 60), 0.0):
        choice = choose_budgets(odds, trunk, price).numpy()
        options.append((f"price {price:.3g}", right[np.arange(len(y)), choice], macs[choice], np.array(ks)[choice]))
    return options


def cascade_option(
    model: VisualPerceiverForImageClassification,
    confidence: np.ndarray,
    right: np.ndarray,
    half: np.ndarray,
    budget: float,
) -> Option | None:
    """The best cascade of two or three stages within the budget on the images of `half`; None if there is none."""
    ks, n = budgets(model.config.num_queries), len(right)
    best = None
    for columns in (c for S in (2, 3) for c in itertools.combinations(range(len(ks)), S)):
        stages = [ks[c] for c in columns]
        macs = model.config.count_stages([Budget(num_active_queries=K) for K in stages])
        if macs[0] > budget:
            continue
        columns = list(columns)
        found = search_thresholds(confidence[half][:, columns], right[half][:, columns], macs, budget, 144)
        if best is None or found.accuracy > best[0].accuracy:
            best = (found, stages, columns, macs)
    if best is None:
        return None
    found, stages, columns, macs = best
    stage = stopping_stages(confidence[:, columns], found.thresholds)
    name = f"{stages} at " + ", ".join(f"{t:.2f}" for t in found.thresholds)
    return name, right[np.arange(n), np.array(columns)[stage]], np.array(macs, float)[stage], np.array(stages)[stage]


def frontier(
    model: VisualPerceiverForImageClassification,
    found: dict[str, np.ndarray],
    labels: np.ndarray,
    train: tuple[np.ndarray, np.ndarray] | None,
) -> list[dict[str, Any]]:
    """For each budget and rule, the best option of the first half, measured on the second."""
    n, ks = len(labels), budgets(model.config.num_queries)
    first = np.arange(n) % 2 == 0
    full = count_macs(model.config, model.config.num_queries)
    right = np.stack([found[f"K{K}"] == labels for K in ks], axis=1)
    confidence = np.stack([found[f"p{K}"] for K in ks], axis=1)
    options = fixed_options(model, found, labels)
    options["predictor"] = predictor_options(model, train or (found["y"][first], right[first]), found["y"], right)
    rows = []
    for share in track(SHARES, "choosing", console=Console(stderr=True)):
        cascade = cascade_option(model, confidence, right, first, share * full)
        for rule in RULES:
            # The slack of one MAC is for rounding of the mean.
            tried = [o for o in [cascade] if o] if rule == "cascade" else options[rule]
            fitting = [o for o in tried if o[2][first].mean() <= share * full + 1]
            if not fitting:
                continue
            name, correct, macs, queries = max(fitting, key=lambda o: (o[1][first].mean(), -o[2][first].mean()))
            accuracy, held_out = float(correct[~first].mean()), int((~first).sum())
            rows.append(
                {
                    "budget": share,
                    "rule": rule,
                    "parameters": name,
                    "accuracy": accuracy,
                    "standard_error": (accuracy * (1 - accuracy) / held_out) ** 0.5,
                    "macs": float(macs[~first].mean()),
                    "relative_macs": float(macs[~first].mean() / full),
                    "queries": float(queries[~first].mean()),
                }
            )
    return rows


@torch.no_grad()
def selection_times(
    model: VisualPerceiverForImageClassification, pixels: torch.Tensor, repetitions: int = 9
) -> list[dict[str, Any]]:
    """Medians of the parts of a selection by similarity (t = 0.8), relative to a full forward of the same repetition."""
    parts = model.visual_perceiver
    Q = model.config.num_queries
    y = parts.read(pixels, Q)
    keep = select_queries(y, 0.8)
    pieces = {
        "similarities": lambda: cosine_similarities(y),
        "similarities and rule, all": lambda: select_queries(y, 0.8, "all"),
        "similarities and rule, kept": lambda: select_queries(y, 0.8, "kept"),
        "packing": lambda: PackedLayout.from_mask(keep).pack(y),
        "full": lambda: parts.decode(parts.process(parts.select(parts.read(pixels, Q), None))),
    }
    times: dict[str, list[float]] = {name: [] for name in pieces}
    for repetition in range(repetitions + 1):
        for name, piece in pieces.items():
            if pixels.device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            piece()
            if pixels.device.type == "cuda":
                torch.cuda.synchronize()
            if repetition:  # the first warms up
                times[name].append(time.perf_counter() - began)
    full = np.array(times.pop("full"))
    return [{"part": name, "relative_time": float(np.median(np.array(t) / full))} for name, t in times.items()]


def plot(rows: list[dict[str, Any]], conditions: dict[str, Any], path: Path) -> None:
    """Accuracy on the second half against its MACs, one line per rule."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for rule, marker in zip(RULES, "os^Dv", strict=True):
        mine = sorted((r for r in rows if r["rule"] == rule), key=lambda r: r["macs"])
        axes.plot(
            [r["macs"] / 1e6 for r in mine],
            [100 * r["accuracy"] for r in mine],
            marker=marker,
            markersize=4,
            label=rule,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("million MACs per image")
    axes.set_ylabel("accuracy on held-out images (%)")
    axes.set_title(f"{conditions['model']}, {conditions['held_out_images']:,} held-out images", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def main(
    model: Annotated[str | None, typer.Option(help="Folder or Hub id; by default the bundled checkpoint.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub id or folder; by default the bundled sample.")] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "test",
    max_images: Annotated[int, typer.Option(min=4, help="Number of images, from the end of the split.")] = 5000,
    train_images: Annotated[
        int, typer.Option(min=0, help="Number of images before those, for training the predictor.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 250,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    timed: Annotated[bool, typer.Option("--time", help="Also time the selection itself.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")] = None,
    picture: Annotated[
        Path | None, typer.Option("--plot", help="Plot the frontier to this .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Print, for each budget, the accuracy of every rule."""
    if picture:
        check_picture(picture)
    for output in filter(None, (json_file, picture)):
        check_writable(output)
    console, name = Console(width=140), model or default_model()
    network = load_model(name, choose_device(device))
    everything = load_images(dataset or default_dataset(), split)
    data = everything.subset(slice(-max_images, None))
    found, train = answers(network, data, batch_size), None
    if train_images:
        start = len(everything) - len(data) - train_images
        if start < 0:
            raise ValueError(
                f"Expected {train_images} images before the last {len(data)}, got {len(everything)} in all."
            )
        before = everything.subset(slice(start, start + train_images))
        seen, labels = answers(network, before, batch_size, similarity=False), labels_of_model(network, before)
        ks = budgets(network.config.num_queries)
        train = seen["y"], np.stack([seen[f"K{K}"] == labels for K in ks], axis=1)
    rows = frontier(network, found, labels_of_model(network, data), train)
    conditions = measurement_conditions(
        network.device,
        model=Path(name).name,
        dataset=(Path(dataset).name if Path(dataset).exists() else dataset) if dataset else SAMPLE,
        split=split,
        images=len(data),
        held_out_images=len(data) // 2,
        predictor_images=train_images or len(data) - len(data) // 2,
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in ("budget", "rule", "parameters", "accuracy (%)", "MACs, of all", "mean queries"):
        table.add_column(header, justify="left" if header in ("rule", "parameters") else "right", no_wrap=True)
    for before_row, row in zip([None, *rows], rows, strict=False):
        if before_row and before_row["budget"] != row["budget"]:
            table.add_section()
        accuracy = f"{100 * row['accuracy']:.2f} ± {100 * row['standard_error']:.2f}"
        numbers = (accuracy, f"{row['relative_macs']:.3f}", f"{row['queries']:.2f}")
        table.add_row(f"{row['budget']:g}", row["rule"], row["parameters"], *numbers)
    console.print(table)
    times = []
    if timed:
        cfg = network.config.timm_pretrained_cfg
        pixels = pixels_of_size(data, range(min(batch_size, len(data))), network.config.image_height_width)
        times = selection_times(network, normalise(pixels, cfg["mean"], cfg["std"]).to(network.device))
        for part in times:
            console.print(f"{part['part']}: {100 * part['relative_time']:.2f} % of a full forward")
    console.print(conditions_line(conditions), style="dim", highlight=False)
    if json_file:
        write_json(json_file, {"conditions": conditions, "rows": rows, "times": times})
    if picture:
        plot(rows, conditions, picture)


if __name__ == "__main__":
    run_command(main)
