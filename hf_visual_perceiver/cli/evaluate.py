"""`visual-perceiver evaluate`."""

import dataclasses
from itertools import pairwise
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
    picture_option,
    write_result,
)
from hf_visual_perceiver.utils.tables import terminal_table


if TYPE_CHECKING:
    from rich.table import Table

    from hf_visual_perceiver.evaluation.evaluate import Evaluation


def evaluate_command(
    checkpoint: ModelArgument = None,
    model: ModelOption = None,
    dataset: DatasetOption = None,
    dataset_name: DatasetNameOption = None,
    split: SplitOption = "test",
    max_images: MaxImagesOption = None,
    budget: BudgetOption = None,
    batch_size: BatchSizeOption = 256,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    fast: FastOption = False,
    plot: Annotated[Path | None, picture_option("Write accuracy against MACs to this .png, .svg or .pdf.")] = None,
    json_file: JsonOption = None,
    card: Annotated[
        bool, typer.Option("--write-card", help="Write the result and a model card into the model's folder.")
    ] = False,
) -> None:
    """Measure accuracy, usage (such as queries per image), MACs and time at every budget."""
    from hf_visual_perceiver.data.images import load_images
    from hf_visual_perceiver.data.parts import at_most
    from hf_visual_perceiver.evaluation.evaluate import evaluate, int8_accuracy
    from hf_visual_perceiver.evaluation.plots import plot_tradeoff
    from hf_visual_perceiver.hub.card import write_card
    from hf_visual_perceiver.inference.loading import choose_device, default_dataset, load_model, load_optimized
    from hf_visual_perceiver.modeling import FAMILIES
    from hf_visual_perceiver.utils.conditions import command_line, conditions_line

    console, name = output_console(json_file), chosen_model(checkpoint, model)
    if card and not Path(name).is_dir():
        raise ValueError(f"Expected a local model folder for --write-card, got {name!r}.")
    if card and fast:
        raise ValueError("Expected either --write-card or --fast, got both.")
    network = (load_optimized if fast else load_model)(name, choose_device(device), dtype)
    if card and network.config.model_type not in FAMILIES:
        raise ValueError(
            f"Expected a network of {', '.join(FAMILIES)} for --write-card, got a {network.config.model_type}."
        )
    data = at_most(load_images(dataset or default_dataset(), split), max_images)
    result = evaluate(
        network,
        data,
        parsed_budgets(network.config, budget),
        batch_size,
        conditions={
            "model": model_label(name),
            "dataset": dataset_label(dataset, dataset_name),
            "split": split,
            "command": command_line(),
        },
    )
    if card and hasattr(network, "optimize_for_inference"):
        try:
            result = dataclasses.replace(result, int8=int8_accuracy(network, data, batch_size))
        except (ImportError, ValueError) as error:
            console.print(f"The card will not have the accuracy in int8: {error}", markup=False, highlight=False)
    console.print(evaluation_table(result))
    console.print(conditions_line(result.conditions), style="dim", highlight=False)
    console.print(errors_line(result), markup=False, highlight=False)
    write_result(json_file, result.to_dict())
    if plot:
        plot_tradeoff(result, plot)
        console.print(f"Plot: {plot}")
    if card:
        console.print(f"Card: {write_card(Path(name), network, result)}")


def evaluation_table(evaluation: "Evaluation") -> "Table":
    """The rows of a sweep, for the terminal."""
    rows = [
        [
            evaluation.name(row.budget),
            f"{row.used_mean:.2f}",
            f"{row.used_std:.2f}",
            f"{row.used_min}-{row.used_max}",
            f"{row.macs / 1e6:.2f}",
            f"{100 * row.accuracy:.2f} ± {100 * row.standard_error:.2f}",
            f"{row.ms_per_image:.3f}",
            f"{row.relative_time:.2f}",
        ]
        for row in evaluation.rows
    ]
    headers = ("setting", evaluation.unit, "std", "min-max", "MACs (M)", "accuracy (%)", "ms/image", "time")
    # A line is drawn where the set of knobs changes; the full network sets none.
    turned = [row.budget.kwargs.keys() for row in evaluation.rows]
    ends = [i for i, (one, other) in enumerate(pairwise(turned)) if other and one != other]
    return terminal_table("accuracy and cost at every budget", headers, rows, ends=ends)


def errors_line(evaluation: "Evaluation") -> str:
    """The full network's errors by class, in one line."""
    confusion = evaluation.confusion
    return "Errors by class were not measured." if confusion is None else f"Full network: {confusion.sentence()}"
