"""`visual-perceiver robustness`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_visual_perceiver.cli.options import (
    BatchSizeOption,
    BudgetOption,
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
    parsed_budgets,
    write_result,
)
from hf_visual_perceiver.utils.files import write_json, write_text
from hf_visual_perceiver.utils.tables import terminal_table


if TYPE_CHECKING:
    from rich.table import Table

    from hf_visual_perceiver.evaluation.robustness import Robustness


def robustness_command(
    checkpoint: ModelArgument = None,
    model: ModelOption = None,
    dataset: DatasetOption = None,
    dataset_name: DatasetNameOption = None,
    split: SplitOption = "test",
    cifar10_c: Annotated[
        Path | None,
        typer.Option(
            "--cifar10-c",
            help="Folder of the published CIFAR-10-C (NAME.npy, labels.npy), instead of our own corruptions; "
            "--dataset must be CIFAR-10.",
        ),
    ] = None,
    corruption: Annotated[
        list[str] | None, typer.Option(help="Corruption; repeat for several; by default all.")
    ] = None,
    severity: Annotated[
        list[int] | None, typer.Option(help="Severity, 1 to 5; repeat for several; by default all.")
    ] = None,
    budget: BudgetOption = None,
    max_images: MaxImagesOption = None,
    seed: Annotated[int, typer.Option(help="Random seed of the corruptions.")] = 0,
    batch_size: BatchSizeOption = 256,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    fast: FastOption = False,
    json_file: JsonOption = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Write robustness.md, its figures and robustness.json into this folder.")
    ] = None,
) -> None:
    """Measure accuracy and usage on corrupted images, and test whether harder images use more."""
    from hf_visual_perceiver.data.images import load_images
    from hf_visual_perceiver.evaluation.corruptions import SEVERITIES
    from hf_visual_perceiver.evaluation.robustness import measure_robustness
    from hf_visual_perceiver.evaluation.robustness_report import difficulty_rows, robustness_section
    from hf_visual_perceiver.inference.loading import choose_device, default_dataset, load_model, load_optimized
    from hf_visual_perceiver.modeling import Budget
    from hf_visual_perceiver.utils.conditions import command_line

    console, name = output_console(json_file), chosen_model(checkpoint, model)
    if output_dir:  # fail early if it cannot be created
        output_dir.mkdir(parents=True, exist_ok=True)
    network = (load_optimized if fast else load_model)(name, choose_device(device), dtype)
    budgets = parsed_budgets(network.config, budget)
    result = measure_robustness(
        network,
        load_images(dataset or default_dataset(), split),
        budgets and list(dict.fromkeys([*budgets, Budget()])),
        corruption or None,
        severity or SEVERITIES,
        max_images,
        seed,
        batch_size,
        conditions={
            "model": model_label(name),
            "dataset": dataset_label(dataset, dataset_name),
            "split": split,
            "command": command_line(),
        },
        cifar10_c=cifar10_c,
    )
    console.print(robustness_table(result))
    if result.difficulty:
        headers, *rows = difficulty_rows(result)
        console.print(terminal_table(f"rank correlation of {result.unit} used, clean images", headers, rows))
    write_result(json_file, result.to_dict())
    if output_dir:
        write_json(output_dir / "robustness.json", result.to_dict())
        write_text(output_dir / "robustness.md", robustness_section(result, output_dir))
        console.print(f"Report: {output_dir / 'robustness.md'}")


def robustness_table(result: "Robustness") -> "Table":
    """Accuracy by corruption, mean over severities, for the terminal; adaptive budgets with mean usage in brackets."""
    from hf_visual_perceiver.evaluation.robustness import ALL, CLEAN
    from hf_visual_perceiver.evaluation.robustness_report import severities_in_words

    rows = []
    for name, severity in ((CLEAN, 0), *((c, None) for c in result.corruptions), (ALL, None)):
        cells = (
            f"{100 * o.accuracy:.2f}" + (f" ({o.used_mean:.1f})" if o.adaptive else "")
            for o in result.cell(name, severity)
        )
        rows.append([name.replace("_", " "), *cells])
    title = f"accuracy (%), mean over {severities_in_words(result)}; {result.unit} used in brackets"
    return terminal_table(title, ["corruption", *result.names], rows, ends=(0, len(rows) - 2))
