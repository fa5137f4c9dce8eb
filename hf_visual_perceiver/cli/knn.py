"""`visual-perceiver knn`."""

from typing import TYPE_CHECKING, Annotated

import typer

from hf_visual_perceiver.cli.options import (
    BatchSizeOption,
    DatasetNameOption,
    DatasetOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MaxImagesOption,
    ModelArgument,
    ModelOption,
    chosen_model,
    dataset_label,
    model_label,
    output_console,
    write_result,
)
from hf_visual_perceiver.utils.choices import FEATURES
from hf_visual_perceiver.utils.tables import terminal_table


if TYPE_CHECKING:
    from rich.table import Table

    from hf_visual_perceiver.evaluation.retrieval import Retrieval


def knn_command(
    checkpoint: ModelArgument = None,
    model: ModelOption = None,
    dataset: DatasetOption = None,
    dataset_name: DatasetNameOption = None,
    gallery_split: Annotated[
        str, typer.Option(help='Images to search in, such as "train" or "train[:10000]".')
    ] = "train",
    split: Annotated[str, typer.Option(help='Images to search for, such as "test" or "train[-5000:]".')] = "test",
    max_images: MaxImagesOption = None,
    num_active_queries: Annotated[
        list[int] | None, typer.Option(help="K to measure; repeat for several. By default 4, 16 and all.")
    ] = None,
    dqs_threshold: Annotated[
        list[float] | None, typer.Option(help="t to measure with all queries; repeat for several.")
    ] = None,
    feature: Annotated[str, typer.Option(help=f"{' or '.join(FEATURES)}.")] = "pooled",
    neighbours: Annotated[int, typer.Option(help="k.")] = 20,
    temperature: Annotated[float, typer.Option(help="A neighbour votes with exp(cosine / this).")] = 0.07,
    batch_size: BatchSizeOption = 256,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    json_file: JsonOption = None,
) -> None:
    """Retrieval: images classified by their nearest neighbours in a gallery, by the features of AutoModel, at every budget.

    The checkpoint's own classes play no part, so the dataset may have others.
    """
    from hf_visual_perceiver.data.parts import at_most, load_splits
    from hf_visual_perceiver.evaluation.retrieval import measure_retrieval, retrieval_points
    from hf_visual_perceiver.inference.loading import choose_device, default_dataset, load_model
    from hf_visual_perceiver.utils.conditions import conditions_line

    console, name = output_console(json_file), chosen_model(checkpoint, model)
    network = load_model(name, choose_device(device), dtype).visual_perceiver
    points = retrieval_points(network.config.num_queries, num_active_queries, dqs_threshold)
    for point in points:
        network.config.operating_point(point.num_active_queries, point.dqs_threshold)
    parts = load_splits(dataset or default_dataset(), gallery_split, split, apart=True)
    gallery, queried = (at_most(part, max_images) for part in parts)
    result = measure_retrieval(
        network,
        gallery,
        queried,
        points,
        feature=feature,
        neighbours=neighbours,
        temperature=temperature,
        batch_size=batch_size,
        conditions={
            "dtype": dtype,
            "model": model_label(name),
            "dataset": dataset_label(dataset, dataset_name),
            "gallery": gallery_split,
            "queried": split,
        },
    )
    console.print(retrieval_table(result))
    console.print(conditions_line(result.conditions), style="dim", highlight=False, markup=False)
    write_result(json_file, result.to_dict())


def retrieval_table(result: "Retrieval") -> "Table":
    """One line for each operating point."""
    from hf_visual_perceiver.evaluation.evaluate import OperatingPoint

    rows = [
        [
            str(OperatingPoint(row.num_active_queries, row.dqs_threshold)),
            f"{row.queries_mean:.2f}",
            f"{row.macs / 1e6:.2f}",
            f"{100 * row.accuracy:.2f} ± {100 * row.standard_error:.2f}",
            f"{100 * row.full_gallery_accuracy:.2f} ± {100 * row.full_gallery_standard_error:.2f}",
        ]
        for row in result.rows
    ]
    headers = ("setting", "queries", "MACs (M)", "gallery alike (%)", "gallery at all queries (%)")
    return terminal_table("nearest neighbours", headers, rows)
