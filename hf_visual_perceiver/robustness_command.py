"""`visual-perceiver robustness`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from .options import (
    BatchSizeOption,
    DatasetNameOption,
    DatasetOption,
    DeviceOption,
    DtypeOption,
    FastOption,
    JsonOption,
    MaxImagesOption,
    ModelArgument,
    ModelOption,
    SplitOption,
    chosen_model,
    dataset_label,
    model_label,
    output_console,
    write_result,
)
from .training.files import write_json, write_text


if TYPE_CHECKING:
    from .robustness import Robustness


def robustness_command(
    checkpoint: ModelArgument = None,
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
    max_images: MaxImagesOption = None,
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
    from .corruptions import CORRUPTIONS, SEVERITIES
    from .difficulty import difficulty_verdict
    from .loading import choose_device, default_dataset, load_model, load_optimized
    from .robustness import BUDGETS, THRESHOLDS, measure_robustness, robustness_points
    from .robustness_report import robustness_section, robustness_verdict
    from .training.data import load_images

    console, name = output_console(json_file), chosen_model(checkpoint, model)
    if output_dir:  # what could fail at the end fails now
        output_dir.mkdir(parents=True, exist_ok=True)
    network = (load_optimized if fast else load_model)(name, choose_device(device), dtype)
    result = measure_robustness(
        network,
        load_images(dataset or default_dataset(), split),
        robustness_points(network.config.num_queries, num_active_queries or BUDGETS, dqs_threshold or THRESHOLDS),
        corruption or tuple(CORRUPTIONS),
        severity or SEVERITIES,
        max_images,
        seed,
        batch_size,
        conditions={
            "model": model_label(name),
            "dataset": dataset_label(dataset, dataset_name),
            "split": split,
        },
    )
    console.print(robustness_rich_table(result))
    for sentence in (robustness_verdict(result), *map(difficulty_verdict, result.difficulty)):
        console.print(sentence, highlight=False)
    write_result(json_file, result.to_dict())
    if output_dir:
        write_json(output_dir / "robustness.json", result.to_dict())
        write_text(output_dir / "robustness.md", robustness_section(result, output_dir))
        console.print(f"Report: {output_dir / 'robustness.md'}")


def robustness_rich_table(result: "Robustness") -> Table:
    """Accuracy by corruption, mean over severities, for the terminal; with selection, the mean queries in brackets."""
    from .robustness import ALL, CLEAN
    from .robustness_report import severities_in_words

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
