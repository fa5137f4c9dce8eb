"""The `visual-perceiver` command."""

import json
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import datasets
import torch
import transformers
import typer
from PIL import Image
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .attention_maps import attention_maps_command
from .benchmark_command import benchmark_command
from .calibrate_command import calibrate_command
from .card import training_lines, write_card
from .card_command import card_command
from .comparison import compare_runs, plot_comparison
from .evaluation import Evaluation, OperatingPoint, default_points, evaluate
from .export_command import compare_exports_command, export_command
from .knn_command import knn_command
from .loading import choose_device, default_dataset, default_model, load_model, load_optimized
from .memory import fitting
from .modeling import OptimizedVisualPerceiver, VisualPerceiverForImageClassification, count_macs
from .modeling.handler import open_image
from .options import (
    BatchSizeOption,
    DatasetNameOption,
    DatasetOption,
    DeviceOption,
    DtypeOption,
    FastOption,
    JsonOption,
    ModelOption,
    SplitOption,
    dataset_label,
    model_label,
)
from .plots import check_picture, plot_tradeoff
from .publish_command import publish_command
from .robustness_command import robustness_command
from .space.command import demo_app_command
from .training.data import load_images
from .training.files import check_writable, write_json
from .training.folder import create_image_processor


T = TypeVar("T")

app = typer.Typer(
    help="Image models whose compute is a dial.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Not a terminal, no width: tables are then as wide as they need.
console = Console(width=None if sys.stdout.isatty() else 120)
messages = Console(stderr=True)

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@app.command("evaluate")
def evaluate_command(
    model: ModelOption = None,
    dataset: DatasetOption = None,
    dataset_name: DatasetNameOption = None,
    split: SplitOption = "test",
    num_active_queries: Annotated[
        list[int] | None, typer.Option(help="K to measure; repeat for several. By default the paper's K and t.")
    ] = None,
    dqs_threshold: Annotated[
        list[float] | None, typer.Option(help="t to measure, at every K given; repeat for several.")
    ] = None,
    batch_size: BatchSizeOption = 256,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    fast: FastOption = False,
    plot: Annotated[Path | None, typer.Option(help="Write accuracy against MACs to this .png, .svg or .pdf.")] = None,
    json_file: JsonOption = None,
    card: Annotated[
        bool, typer.Option("--write-card", help="Write the result and a model card into the model's folder.")
    ] = False,
) -> None:
    """Accuracy, active queries, MACs and time at every budget K and threshold t."""
    name, data_name = model or default_model(), dataset or default_dataset()
    if card and not Path(name).is_dir():
        raise ValueError(f"Expected --write-card to go with a model folder, got {name!r}.")
    # What could fail at the end fails now.
    if plot:
        check_picture(plot)
    for output in filter(None, (plot, json_file)):
        check_writable(output)
    if card and fast:
        raise ValueError("Expected --write-card without --fast: a card is of the model as it is loaded.")
    network = (load_optimized if fast else load_model)(name, choose_device(device), dtype)
    points = default_points(network.config.num_queries)
    if num_active_queries or dqs_threshold:
        budgets: list[int | None] = [*num_active_queries] if num_active_queries else [None]
        thresholds: list[float | None] = [*dqs_threshold] if dqs_threshold else [None]
        points = [OperatingPoint(K, t) for K in budgets for t in thresholds]
    result = evaluate(
        network,
        load_images(data_name, split),
        points,
        batch_size,
        progress=messages.is_terminal,
        conditions={
            "model": model_label(name),
            "dataset": dataset_label(dataset, dataset_name),
            "split": split,
        },
    )
    console.print(evaluation_table(result))
    console.print(conditions_line(result.conditions), style="dim", highlight=False)
    console.print(errors_line(result), markup=False, highlight=False)
    if json_file:
        write_json(json_file, result.to_dict())
    if plot:
        plot_tradeoff(result, plot)
        console.print(f"Plot: {plot}")
    if card:
        assert isinstance(network, VisualPerceiverForImageClassification)
        console.print(f"Card: {write_card(Path(name), network, result)}")


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    model: ModelOption = None,
    num_active_queries: Annotated[int | None, typer.Option(help="K: use the first K queries.")] = None,
    dqs_threshold: Annotated[float | None, typer.Option(help="t: drop queries more similar than this.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Labels to show of each image.")] = 3,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    fast: FastOption = False,
    json_file: JsonOption = None,
) -> None:
    """Labels with probabilities, and the number of queries that each image used.

    Unreadable files are named, the others classified; the exit status is then 1.
    """
    if json_file:
        check_writable(json_file)
    files = list_images(images)
    network = (load_optimized if fast else load_model)(model or default_model(), choose_device(device), dtype)
    network.config.operating_point(num_active_queries, dqs_threshold)
    results, unreadable = [], []
    for first in range(0, len(files), batch_size):
        readable = []
        for path in files[first : first + batch_size]:
            try:
                readable.append((path, read_image(path)))
            except ValueError as error:
                unreadable.append(str(error))
        if readable:
            paths, pictures = zip(*readable, strict=True)
            outputs = classify(network, pictures, num_active_queries, dqs_threshold, top_k)
            results += [{"file": str(path), **output} for path, output in zip(paths, outputs, strict=True)]

    if results:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("image", overflow="fold")
        for header in ("label", "p", "also", "queries", "MACs (M)"):
            table.add_column(header, justify="left" if header in ("label", "also") else "right")
        for result in results:
            (label, p), *others = result["labels"].items()
            also = ", ".join(f"{name} {q:.1%}" for name, q in others)
            table.add_row(
                escape(result["file"]),  # brackets in a name are no markup
                escape(label),
                f"{p:.1%}",
                escape(also),
                f"{result['queries_used']}",
                f"{result['macs'] / 1e6:.1f}",
            )
        console.print(table)
    if json_file:
        write_json(json_file, {"images": results, "unreadable": unreadable})
    for message in unreadable:
        print_error(message)
    if unreadable:
        raise typer.Exit(1)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of training runs.")],
    plot: Annotated[Path | None, typer.Option(help="Write accuracy against K to this .png, .svg or .pdf.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in markdown.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Validation accuracy of training runs at every K, side by side: mean and deviation over seeds."""
    if plot:
        check_picture(plot)
    for output in filter(None, (plot, json_file)):
        check_writable(output)
    comparison = compare_runs(runs)
    if markdown:
        console.print(comparison.to_markdown(), markup=False, highlight=False, soft_wrap=True)
    else:
        headers, *lines = comparison.table()
        table = Table(title="validation accuracy (%)", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for header in headers:
            table.add_column(header, justify="left" if header == "runs" else "right", no_wrap=header != "runs")
        for line in lines:
            table.add_row(*map(escape, line))
        console.print(table)
    if json_file:
        write_json(json_file, comparison.to_dict())
    if plot:
        plot_comparison(comparison, plot)
        console.print(f"Plot: {plot}")


@app.command()
def info(model: ModelOption = None, json_file: JsonOption = None) -> None:
    """A checkpoint at a glance: architecture, operating point, cost at every budget, measured accuracy."""
    if json_file:
        check_writable(json_file)
    name = model or default_model()
    network = load_model(name)
    config = network.config
    height, width = config.image_height_width
    K, t = config.operating_point()
    facts = {
        "architecture": config.architecture,
        "parameters": sum(p.numel() for p in network.parameters()),
        "images": f"{height}x{width}, {config.num_channels} channels, {config.num_patches} patches",
        "trunk": f"{config.num_hidden_layers} blocks of width {config.hidden_size}, {config.num_attention_heads} heads",
        "queries": config.num_queries,
        "operating point": f"K = {K}, " + (f"t = {t:g} ({config.dqs_reference})" if t is not None else "no selection"),
        "labels": ", ".join(config.label_names),
    }
    summary = Table(show_header=False, title=name)
    for key, value in facts.items():
        summary.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
    console.print(summary)
    budgets = [point.num_active_queries for point in default_points(config.num_queries) if point.num_active_queries]
    macs = {budget: count_macs(config, budget) for budget in budgets}
    evaluation = _read_json(Path(name) / "evaluation.json", Evaluation.from_dict)
    for line in _read_json(Path(name) / "training.json", training_lines) or []:
        console.print(f"- {line}", highlight=False, markup=False, soft_wrap=True)
    if evaluation is not None:
        console.print(evaluation_table(evaluation))
        console.print(conditions_line(evaluation.conditions), style="dim", highlight=False)
        console.print(errors_line(evaluation), markup=False, highlight=False)
    else:
        table = Table("K", "MACs (M)", title="cost of one image")
        for budget, count in macs.items():
            table.add_row(f"{budget}", f"{count / 1e6:.2f}")
        console.print(table)
    if json_file:
        write_json(
            json_file,
            {**facts, "macs": macs, "evaluation": None if evaluation is None else evaluation.to_dict()},
        )


app.command("benchmark")(benchmark_command)
app.command("robustness")(robustness_command)
app.command("card")(card_command)
app.command("export")(export_command)
app.command("compare-exports")(compare_exports_command)
app.command("publish")(publish_command)
app.command("demo-app")(demo_app_command)
app.command("attention-maps")(attention_maps_command)
app.command("calibrate")(calibrate_command)
app.command("knn")(knn_command)


def _read_json(path: Path, convert: Callable[[dict[str, Any]], T]) -> T | None:
    """A file of a checkpoint's folder, None if it is not there; a damaged one is a `ValueError`."""
    if not path.is_file():
        return None
    try:
        return convert(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"Expected {path} to be as it was written; it is damaged: {error!r}.") from error


def evaluation_table(evaluation: Evaluation) -> Table:
    """The rows of a sweep, for the terminal."""
    table = Table(title="one network, every budget", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in ("setting", "queries", "std", "min-max", "MACs (M)", "accuracy (%)", "ms/image", "time"):
        table.add_column(header, justify="left" if header == "setting" else "right", no_wrap=True)
    for before, row in zip([None, *evaluation.rows], evaluation.rows, strict=False):
        if before is not None and (before.dqs_threshold is None) != (row.dqs_threshold is None):
            table.add_section()
        table.add_row(
            str(row.point),
            f"{row.queries_mean:.2f}",
            f"{row.queries_std:.2f}",
            f"{row.queries_min}-{row.queries_max}",
            f"{row.macs / 1e6:.2f}",
            f"{100 * row.accuracy:.2f} ± {100 * row.standard_error:.2f}",
            f"{row.ms_per_image:.3f}",
            f"{row.relative_time:.2f}",
        )
    return table


def conditions_line(conditions: dict[str, Any]) -> str:
    """The conditions of a measurement, in one line."""
    return ", ".join(f"{key} {value}" for key, value in conditions.items())


def errors_line(evaluation: Evaluation) -> str:
    """What all queries get wrong, in one line."""
    confusion = evaluation.confusion
    return "Errors by class were not measured." if confusion is None else f"All queries: {confusion.sentence()}"


def list_images(paths: list[Path]) -> list[Path]:
    """The files among `paths`, and the image files in the folders among them."""
    files = []
    for path in paths:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise ValueError(f"Expected images in {path}, found none.")
            files += found
        else:
            files.append(path)
    return files


def read_image(path: Path) -> Image.Image:
    """An RGB image, or a `ValueError` that names the file."""
    try:
        with path.open("rb") as file:
            return open_image(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot read {path} as an image: {error}") from error


@torch.inference_mode()
def classify(
    model: VisualPerceiverForImageClassification | OptimizedVisualPerceiver,
    images: tuple[Image.Image, ...],
    num_active_queries: int | None,
    dqs_threshold: float | None,
    top_k: int,
) -> list[dict[str, Any]]:
    """The most probable labels of each image, and what it cost."""
    names = model.config.label_names
    pixels = create_image_processor(model.config)(images=list(images), return_tensors="pt")["pixel_values"]
    K, t = model.config.operating_point(num_active_queries, dqs_threshold)
    pixels = pixels.to(model.device, model.dtype)
    run = partial(model, num_active_queries=K, dqs_threshold=t)
    with fitting(run, pixels):
        output = run(pixels)
    probabilities, labels = output.logits.float().softmax(-1).topk(min(top_k, len(names)))
    return [
        {
            "labels": {names[i]: p for i, p in zip(indices.tolist(), ps.tolist(), strict=True)},
            "queries_used": used,
            "macs": count_macs(model.config, used, None if t is None else K),
        }
        for indices, ps, used in zip(labels, probabilities, output.active_queries.sum(1).tolist(), strict=True)
    ]


def print_error(message: object) -> None:
    """One red line on stderr."""
    messages.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command; what is wrong with the input is said in one line, without a traceback."""
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    try:
        app()
    except torch.OutOfMemoryError as error:
        print_error(f"{str(error).splitlines()[0]} A smaller --batch-size needs less.")
        sys.exit(1)
    except (ValueError, OSError) as error:
        print_error(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
