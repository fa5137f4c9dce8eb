"""`visual-perceiver calibrate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hf_visual_perceiver.cli.options import (
    BatchSizeOption,
    BudgetOption,
    DeviceOption,
    DtypeOption,
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
from hf_visual_perceiver.utils.tables import terminal_table


if TYPE_CHECKING:
    from rich.table import Table

    from hf_visual_perceiver.evaluation.calibration import Calibration


def calibrate_command(
    checkpoint: ModelArgument = None,
    target_macs: Annotated[float | None, typer.Option(help="At most this fraction of the full network's MACs.")] = None,
    target_ms: Annotated[
        float | None, typer.Option(help="At most this many ms per image, on this machine and at --batch-size.")
    ] = None,
    max_accuracy_drop: Annotated[
        float | None, typer.Option(help="At most this many percentage points of accuracy below the full network.")
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(
            help='Knobs of the model to search over, such as "K", "t", "K,t", "p" or "grid"; by default its first.'
        ),
    ] = None,
    budget: BudgetOption = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write the chosen budget to the model folder's config.json as its default.")
    ] = False,
    model: ModelOption = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Labelled images that the model was not trained on: Hub id, folder of parquet files, or imagefolder; "
            "by default the bundled sample."
        ),
    ] = None,
    split: SplitOption = "test",
    max_images: MaxImagesOption = None,
    batch_size: BatchSizeOption = 256,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    json_file: JsonOption = None,
) -> None:
    """Choose a budget for a target cost or accuracy, and report its results on held-out images."""
    from hf_visual_perceiver.data.images import load_images
    from hf_visual_perceiver.data.parts import at_most
    from hf_visual_perceiver.evaluation.calibration import (
        FEW_IMAGES,
        Target,
        calibrate,
        write_budget,
    )
    from hf_visual_perceiver.inference.loading import choose_device, default_dataset, load_model
    from hf_visual_perceiver.utils.conditions import measurement_conditions

    console, messages = output_console(json_file), Console(stderr=True)
    # Fail early: check whatever could fail after the measurement.
    target = Target.from_options(target_macs, target_ms, max_accuracy_drop)
    name = chosen_model(checkpoint, model)
    if write and not (Path(name) / "config.json").is_file():
        raise ValueError(f"Expected a local model folder for --write, got {name!r}.")
    network = load_model(name, choose_device(device), dtype)
    knobs = [knob.strip() for knob in search.split(",")] if search else []
    budgets = parsed_budgets(network.config, budget) or None
    network.config.candidates(knobs)  # raises if there are no such knobs
    data = at_most(load_images(dataset or default_dataset(), split), max_images)
    if len(data) < FEW_IMAGES:
        few = f"warning: calibrating on {len(data)} images, fewer than {FEW_IMAGES}: the intervals are wide"
        messages.print(few, style="yellow", highlight=False, soft_wrap=True)
    result = calibrate(network, data, target, budgets, batch_size, search=knobs)
    conditions = measurement_conditions(
        next(network.parameters()).device,
        dtype=dtype,
        attention=network.config._attn_implementation,
        batch_size=batch_size,
        images=len(data),
        model=model_label(name),
        dataset=dataset_label(dataset),
        split=split,
    )
    console.print(calibration_table(result, network.config))
    if not result.met:
        messages.print("warning: the target is not met on the held-out images", style="yellow", highlight=False)
    write_result(json_file, {"conditions": conditions, **result.to_dict()})
    if write:
        write_budget(name, result.budget)
        console.print(
            f"Wrote to {Path(name) / 'config.json'}: {result.budget.short(network.config.knobs)}",
            highlight=False,
            markup=False,
        )


def calibration_table(result: "Calibration", config: Any) -> "Table":
    """The chosen budget's results on both halves, beside the full network's on the held-out half."""
    chosen = result.budget.short(config.knobs)
    low, high = (100 * x for x in result.accuracy_interval)
    drop = f"{result.drop:.2f} ({result.drop_interval[0]:.2f} to {result.drop_interval[1]:.2f})"
    settings = [
        ([chosen, "for choosing"], result.chosen_on, "", ""),
        ([chosen, "held out"], result.achieved, f" ({low:.2f} to {high:.2f})", drop),
        (["full", "held out"], result.full, "", ""),
    ]
    rows = [
        [
            *names,
            f"{row.used_mean:.2f}",
            f"{row.macs / 1e6:.2f}",
            f"{row.macs / result.full.macs:.3f}",
            f"{row.ms_per_image:.3f}",
            f"{100 * row.accuracy:.2f}{interval}",
            lost,
        ]
        for names, row, interval, lost in settings
    ]
    headers = ("setting", "images", config.unit, "MACs (M)", "MACs / full", "ms/image", "accuracy (%)", "drop (points)")
    return terminal_table(f"{chosen}: {result.target}; 95 % intervals in brackets", headers, rows, left=2)
