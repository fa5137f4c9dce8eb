"""`visual-perceiver export` and `visual-perceiver compare-exports`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hf_visual_perceiver.cli.options import (
    BatchSizeOption,
    BudgetOption,
    DatasetNameOption,
    DatasetOption,
    JsonOption,
    MaxImagesOption,
    ModelArgument,
    ModelOption,
    chosen_model,
    dataset_label,
    model_label,
    one_of,
    output_console,
    parsed_budgets,
    write_result,
)
from hf_visual_perceiver.utils.choices import FORMATS
from hf_visual_perceiver.utils.extras import require_extra
from hf_visual_perceiver.utils.tables import markdown_table, terminal_table


if TYPE_CHECKING:
    from hf_visual_perceiver.export.comparison import ExportRow


def export_command(
    checkpoint: ModelArgument = None,
    model: ModelOption = None,
    format: Annotated[str, typer.Option(callback=one_of(FORMATS), help=f"{', '.join(FORMATS)}.")] = "onnx",
    output: Annotated[
        Path | None,
        typer.Option(
            help="File (timm: folder) to write; by default in the current folder, named after the checkpoint."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help='Budget to fix in the graph, such as "K=16". By default, K and t are inputs of the graph if the model '
            "supports it; otherwise the default budget is fixed."
        ),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantise the linear layers to 8 bits (onnx only).")] = False,
) -> None:
    """Export a checkpoint for other runtimes; the file is kept only if it agrees with PyTorch at several budgets.

    A graph takes pixel_values (B, C, H, W) and returns logits (B, labels) and the usage of each image. A Visual
    Perceiver's graph also takes dqs_threshold (float32; 1 keeps all queries) and num_active_queries (int64). The batch
    size is dynamic.
    """
    from hf_visual_perceiver.export.graph import check_output, export_onnx, export_program, export_timm
    from hf_visual_perceiver.inference.loading import load_config, load_model

    console, folder = output_console(), chosen_model(checkpoint, model)
    if format == "safetensors-timm" and budget is not None:
        raise ValueError("Expected --budget with a graph format, got --format safetensors-timm.")
    if int8 and format != "onnx":
        raise ValueError(f"Expected --int8 with --format onnx, got {format!r}.")
    if format == "onnx":
        require_extra("export")
    # Fail early: check whatever could fail after the export.
    config = load_config(folder)
    fixed = None if budget is None else config.parse_budget(budget)
    called = "" if fixed is None else "-" + "-".join(fixed.short(config.knobs).lower().replace("=", "").split(", "))
    variant = called + ("-int8" if int8 else "")
    output = output or Path(f"{Path(folder).resolve().name}{variant}{FORMATS[format]}")
    if format != "safetensors-timm":
        if output.suffix != FORMATS[format]:
            raise ValueError(
                f"Expected a file that ends in {FORMATS[format]} for --format {format}, got {output.name!r}."
            )
        check_output(output)
    network = load_model(folder)
    with Console(stderr=True).status(f"{format}: tracing, writing, comparing with PyTorch"):
        if format == "onnx":
            difference = export_onnx(network, output, fixed, int8)
        elif format == "torch-export":
            difference = export_program(network, output, fixed)
        else:
            difference = export_timm(network, output)
    size = sum(path.stat().st_size for path in (output.rglob("*") if output.is_dir() else [output]))
    console.print(f"{format}: {output} ({size / 1e6:.2f} MB)", soft_wrap=True, markup=False, highlight=False)
    if int8:
        sentence = (
            f"Mean difference from PyTorch's logits: {difference:.3f} of their standard deviation, on random images."
        )
    else:
        sentence = f"Largest difference from PyTorch's logits: {difference:.1e}."
    console.print(sentence, highlight=False)


def compare_exports_command(
    files: Annotated[list[Path], typer.Argument(help="Exported files, .onnx or .pt2.")],
    model: ModelOption = None,
    dataset: DatasetOption = None,
    dataset_name: DatasetNameOption = None,
    split: Annotated[str, typer.Option(help='Split of the dataset, or a part of it such as "train[-5000:]".')] = "test",
    budget: BudgetOption = None,
    max_images: MaxImagesOption = None,
    batch_size: BatchSizeOption = 64,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in markdown.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Compare exported files with PyTorch: accuracy and time, on the same batches in turn.

    OMP_NUM_THREADS sets the number of threads for all of them.
    """
    from hf_visual_perceiver.data.images import load_images
    from hf_visual_perceiver.data.parts import at_most
    from hf_visual_perceiver.export.comparison import compare_exports
    from hf_visual_perceiver.inference.loading import default_dataset, load_model
    from hf_visual_perceiver.utils.conditions import conditions_line

    console = output_console(json_file)
    name = chosen_model(None, model)
    network = load_model(name)
    config = network.config
    result = compare_exports(
        network,
        files,
        at_most(load_images(dataset or default_dataset(), split), max_images),
        parsed_budgets(config, budget),
        batch_size,
        conditions={
            "model": model_label(name),
            "dataset": dataset_label(dataset, dataset_name),
            "split": split,
        },
    )
    rows = [[row.budget.short(config.knobs), *comparison_cells(row)] for row in result.rows]
    columns = ("setting", "form", "MB", "accuracy (%)", "same label (%)", config.unit, "ms/image", "time")
    if markdown:
        console.print(markdown_table(columns, rows, left=2), markup=False, highlight=False, soft_wrap=True)
    else:
        ends = range(len(files), len(rows), 1 + len(files))  # a line after each budget
        console.print(terminal_table("exported files", columns, rows, left=2, ends=ends))
    console.print(conditions_line(result.conditions), style="dim", highlight=False)
    write_result(json_file, result.to_dict())


def comparison_cells(row: "ExportRow") -> list[str]:
    """The cells of one row, without its budget."""
    return [
        row.form,
        f"{row.megabytes:.2f}",
        f"{100 * row.accuracy:.2f} ± {100 * row.standard_error:.2f}",
        f"{100 * row.same_answer:.2f}",
        f"{row.used_mean:.2f}",
        f"{row.ms_per_image:.3f}",
        f"{row.relative_time:.2f}",
    ]
