"""`visual-perceiver knn`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_visual_perceiver.cli.options import (
    BatchSizeOption,
    BudgetOption,
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
    parsed_budgets,
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
    split: Annotated[str, typer.Option(help='Images to classify, such as "test" or "train[-5000:]".')] = "test",
    max_images: MaxImagesOption = None,
    budget: BudgetOption = None,
    feature: Annotated[str, typer.Option(help=f"Feature: {' or '.join(FEATURES)}.")] = "pooled",
    neighbours: Annotated[int, typer.Option(help="Number of neighbours, k.")] = 20,
    temperature: Annotated[float, typer.Option(help="A neighbour votes with weight exp(cosine / temperature).")] = 0.07,
    batch_size: BatchSizeOption = 256,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    json_file: JsonOption = None,
) -> None:
    """Classify images by their nearest neighbours in a gallery, with the features of AutoModel, at several budgets.

    The checkpoint's classes are not used, so the dataset may have other classes.
    """
    from hf_visual_perceiver.data.parts import at_most, load_splits
    from hf_visual_perceiver.evaluation.retrieval import measure_retrieval
    from hf_visual_perceiver.inference.loading import choose_device, default_dataset, load_model
    from hf_visual_perceiver.utils.conditions import conditions_line

    console, name = output_console(json_file), chosen_model(checkpoint, model)
    network = load_model(name, choose_device(device), dtype).base_model
    budgets = parsed_budgets(network.config, budget)
    parts = load_splits(dataset or default_dataset(), gallery_split, split, apart=True)
    gallery, queried = (at_most(part, max_images) for part in parts)
    result = measure_retrieval(
        network,
        gallery,
        queried,
        budgets,
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
    console.print(retrieval_table(result, network.config))
    console.print(conditions_line(result.conditions), style="dim", highlight=False, markup=False)
    write_result(json_file, result.to_dict())


def retrieval_table(result: "Retrieval", config: Any) -> "Table":
    """The results for the terminal, one line per budget."""
    rows = [
        [
            row.budget.short(config.knobs),
            f"{row.used_mean:.2f}",
            f"{row.macs / 1e6:.2f}",
            f"{100 * row.accuracy:.2f} ± {100 * row.standard_error:.2f}",
            f"{100 * row.full_gallery_accuracy:.2f} ± {100 * row.full_gallery_standard_error:.2f}",
        ]
        for row in result.rows
    ]
    headers = ("setting", config.unit, "MACs (M)", "gallery: same budget (%)", "gallery: full (%)")
    return terminal_table("nearest-neighbour accuracy", headers, rows)
