"""`visual-perceiver frontier`."""

from pathlib import Path
from typing import Annotated

import typer

from hf_visual_perceiver.cli.options import (
    BatchSizeOption,
    DatasetNameOption,
    DatasetOption,
    DeviceOption,
    JsonOption,
    SplitOption,
    dataset_label,
    model_label,
    output_console,
    picture_option,
    write_result,
)
from hf_visual_perceiver.utils.tables import markdown_table, terminal_table


def frontier_command(
    models: Annotated[
        list[str] | None, typer.Argument(help="Folders or Hub ids; by default the bundled checkpoint.")
    ] = None,
    dataset: DatasetOption = None,
    dataset_name: DatasetNameOption = None,
    split: SplitOption = "test",
    choose: Annotated[
        str, typer.Option(help="Split on which settings are chosen; the models must not have been trained on it.")
    ] = "train[-5000:]",
    macs: Annotated[
        list[float] | None,
        typer.Option("--macs", min=0, help="MACs limit in millions; repeat for several."),
    ] = None,
    batch_size: BatchSizeOption = 256,
    device: DeviceOption = "auto",
    plot: Annotated[Path | None, picture_option("Write accuracy against MACs to this .png, .svg or .pdf.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in markdown.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Find each network's best accuracy within MACs limits, over all its settings."""
    from hf_visual_perceiver.data.images import load_images
    from hf_visual_perceiver.evaluation.frontier import Frontier, check_names, measure_points, plot_frontier
    from hf_visual_perceiver.inference.loading import choose_device, default_dataset, default_model, load_model
    from hf_visual_perceiver.utils.conditions import command_line, conditions_line, measurement_conditions

    console = output_console(json_file, width=240)
    names = models or [default_model()]
    check_names([model_label(name) for name in names])
    source = dataset or default_dataset()
    data, choosing = load_images(source, split), load_images(source, choose)
    points = []
    for name in names:
        network = load_model(name, choose_device(device))
        points += measure_points(model_label(name), network, data, choosing, batch_size)
    conditions = measurement_conditions(
        choose_device(device),
        dtype="float32",
        batch_size=batch_size,
        images=len(data),
        images_to_choose_by=len(choosing),
        dataset=dataset_label(dataset, dataset_name),
        split=split,
        chosen_on=choose,
        command=command_line(),
    )
    result = Frontier(points, [1e6 * limit for limit in macs or (10, 15, 25, 40, 60, 100, 130)], conditions)
    headers, *rows = result.table()
    if markdown:
        console.print(markdown_table(headers, rows, left=2), markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(terminal_table("best accuracy (%) within a MACs limit", headers, rows, left=2))
    console.print(conditions_line(conditions), style="dim", highlight=False)
    write_result(json_file, result.to_dict())
    if plot:
        plot_frontier(result, plot)
        console.print(f"Plot: {plot}")
