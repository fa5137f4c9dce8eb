"""`visual-perceiver predict`."""

from typing import TYPE_CHECKING, Annotated

import typer

from hf_visual_perceiver.cli.options import (
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    FastOption,
    JsonOption,
    ModelOption,
    chosen_model,
    output_console,
    write_result,
)
from hf_visual_perceiver.utils.console import print_error
from hf_visual_perceiver.utils.tables import terminal_table


if TYPE_CHECKING:
    from hf_visual_perceiver.modeling import Budget


def predict_command(
    images: Annotated[list[str], typer.Argument(help="Image files, folders of images, or - for an image on stdin.")],
    model: ModelOption = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help='Compute budget, such as "K=16", "K=16, t=0.8" or "full", or a cascade, such as "cascade to K=16 + mirror '
            'at 0.99"; by default that of config.json.'
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Number of labels to show per image.")] = 3,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    fast: FastOption = False,
    json_file: JsonOption = None,
) -> None:
    """Classify images: print labels, probabilities, usage and MACs of each image.

    Unreadable files are reported and the others are classified; the exit status is then 1.
    """
    from hf_visual_perceiver.data.image_files import list_images, read_image
    from hf_visual_perceiver.inference.cascade import Cascade
    from hf_visual_perceiver.inference.classification import classify
    from hf_visual_perceiver.inference.loading import choose_device, load_model, load_optimized

    files = list_images(images)
    network = (load_optimized if fast else load_model)(chosen_model(None, model), choose_device(device), dtype)
    chosen: Budget | Cascade | None = None
    if budget is not None:
        chosen = Cascade.parse(network, budget) if " at " in budget else network.config.parse_budget(budget)
    results, unreadable = [], []
    for first in range(0, len(files), batch_size):
        readable = []
        for file in files[first : first + batch_size]:
            try:
                readable.append((file, read_image(file)))
            except ValueError as error:
                unreadable.append(str(error))
        if readable:
            named, pictures = zip(*readable, strict=True)
            outputs = classify(network, pictures, chosen, top_k)
            results += [{"file": file, **output} for file, output in zip(named, outputs, strict=True)]

    if results:
        rows = []
        for result in results:
            (label, p), *others = result["labels"].items()
            also = ", ".join(f"{name} {q:.1%}" for name, q in others)
            cost = [f"{result['used']}", f"{result['macs'] / 1e6:.1f}"]
            rows.append([result["file"], label, also, f"{p:.1%}", *cost])
        headers = ("image", "label", "also", "p", network.config.unit, "MACs (M)")
        output_console(json_file).print(terminal_table(None, headers, rows, left=3))
    write_result(json_file, {"images": results, "unreadable": unreadable})
    for message in unreadable:
        print_error(message)
    if unreadable:
        raise typer.Exit(1)
