"""`visual-perceiver predict`."""

from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from .options import (
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
from .training.console import print_error


def predict_command(
    images: Annotated[list[str], typer.Argument(help="Image files, folders of them, or - for an image on stdin.")],
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
    from .classification import classify
    from .image_files import list_images, read_image
    from .loading import choose_device, load_model, load_optimized

    files = list_images(images)
    network = (load_optimized if fast else load_model)(chosen_model(None, model), choose_device(device), dtype)
    network.config.operating_point(num_active_queries, dqs_threshold)
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
            outputs = classify(network, pictures, num_active_queries, dqs_threshold, top_k)
            results += [{"file": file, **output} for file, output in zip(named, outputs, strict=True)]

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
        output_console(json_file).print(table)
    write_result(json_file, {"images": results, "unreadable": unreadable})
    for message in unreadable:
        print_error(message)
    if unreadable:
        raise typer.Exit(1)
