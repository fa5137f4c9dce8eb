"""`visual-perceiver robustness`."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from .corruptions import CORRUPTIONS, SEVERITIES
from .difficulty import difficulty_verdict
from .loading import choose_device, default_dataset, default_model, load_model, load_optimized
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
from .robustness import ALL, BUDGETS, CLEAN, THRESHOLDS, Robustness, measure_robustness, robustness_points
from .robustness_report import robustness_section, robustness_verdict, severities_in_words
from .training.data import load_images
from .training.files import check_writable, write_json, write_text


def robustness_command(
    model: ModelOption = None,
    dataset: DatasetOption = None,
    dataset_name: DatasetNameOption = None,
    split: SplitOption = "test",
    corruption: Annotated[list[str] | None, typer.Option(help="Repeat for several; by default all.")] = None,
    severity: Annotated[list[int] | None, typer.Option(help="1 to 5; repeat for several; by default all.")] = None,
    num_active_queries: Annotated[
        list[int] | None, typer.Option(help="K to measure beside all queries; repeat. By default 8, 16, 32, 64.")
    ] = None,
    dqs_threshold: Annotated[
        list[float] | None, typer.Option(help="t to measure; repeat for several. By default 0.7, 0.8, 0.9.")
    ] = None,
    max_images: Annotated[int | None, typer.Option(help="At most so many images, evenly spaced in the split.")] = None,
    seed: Annotated[int, typer.Option(help="Of the corruptions.")] = 0,
    batch_size: BatchSizeOption = 256,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    fast: FastOption = False,
    json_file: JsonOption = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Write robustness.md, its pictures and robustness.json into this folder.")
    ] = None,
) -> None:
    """Accuracy and queries kept under common corruptions; whether selection spends more on harder images."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    name, data_name = model or default_model(), dataset or default_dataset()
    # What could fail at the end fails now.
    if json_file:
        check_writable(json_file)
    if output_dir:
        output_dir.mkdir(parents=True, exist_ok=True)
    network = (load_optimized if fast else load_model)(name, choose_device(device), dtype)
    result = measure_robustness(
        network,
        load_images(data_name, split),
        robustness_points(network.config.num_queries, num_active_queries or BUDGETS, dqs_threshold or THRESHOLDS),
        corruption or tuple(CORRUPTIONS),
        severity or SEVERITIES,
        max_images,
        seed,
        batch_size,
        progress=sys.stderr.isatty(),
        conditions={
            "model": model_label(name),
            "dataset": dataset_label(dataset, dataset_name),
            "split": split,
        },
    )
    console.print(robustness_rich_table(result))
    for sentence in (robustness_verdict(result), *map(difficulty_verdict, result.difficulty)):
        console.print(sentence, highlight=False)
    for file in filter(None, (json_file, output_dir and output_dir / "robustness.json")):
        write_json(file, result.to_dict())
    if output_dir:
        write_text(output_dir / "robustness.md", robustness_section(result, output_dir))
        console.print(f"Report: {output_dir / 'robustness.md'}")


def robustness_rich_table(result: Robustness) -> Table:
    """Accuracy by corruption, mean over severities, for the terminal; with selection, the mean queries in brackets."""
    title = f"accuracy (%), mean over {severities_in_words(result)}; queries kept in brackets"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in ("corruption", *map(str, result.points)):
        table.add_column(header, justify="left" if header == "corruption" else "right", no_wrap=True)
    for name, severity in ((CLEAN, 0), *((c, None) for c in result.corruptions), (ALL, None)):
        cells = [
            f"{100 * o.accuracy:.2f}" + ("" if o.dqs_threshold is None else f" ({o.queries_mean:.1f})")
            for o in result.cell(name, severity)
        ]
        table.add_row(name.replace("_", " "), *cells, end_section=name == CLEAN or name == result.corruptions[-1])
    return table
