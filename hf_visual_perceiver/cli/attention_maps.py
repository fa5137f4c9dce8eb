"""`visual-perceiver attention-maps`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_visual_perceiver.cli.options import (
    BatchSizeOption,
    DatasetOption,
    DeviceOption,
    JsonOption,
    MaxImagesOption,
    ModelOption,
    OneBudgetOption,
    SplitOption,
    chosen_model,
    output_console,
    picture_option,
    write_result,
)


if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch


def attention_maps_command(
    images: Annotated[
        list[str] | None, typer.Argument(help="Image files, folders of images, or - for stdin; by default the dataset.")
    ] = None,
    model: ModelOption = None,
    dataset: DatasetOption = None,
    split: SplitOption = "test",
    max_images: MaxImagesOption = None,
    output: Annotated[Path, picture_option("Plot to write: .png, .svg or .pdf.")] = Path("attention_maps.png"),
    budget: OneBudgetOption = None,
    batch_size: BatchSizeOption = 256,
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Plot the attention map of each query or token, averaged over a dataset or over given images."""
    from hf_visual_perceiver.data.image_files import list_images, read_image
    from hf_visual_perceiver.data.image_processor import create_image_processor
    from hf_visual_perceiver.data.images import load_images
    from hf_visual_perceiver.data.parts import at_most
    from hf_visual_perceiver.evaluation.attention_maps import average_attention, plot_attention_maps
    from hf_visual_perceiver.evaluation.evaluate import pixel_batches
    from hf_visual_perceiver.inference.loading import choose_device, default_dataset, load_model

    if images and dataset:
        raise ValueError("Expected either images or --dataset, got both.")
    name = chosen_model(None, model)
    network = load_model(name, choose_device(device))
    chosen = None if budget is None else network.config.parse_budget(budget)
    batches: Iterable[torch.Tensor]
    if images:
        pictures = [read_image(file) for file in list_images(images)][:max_images]
        processor, count = create_image_processor(network.config), len(pictures)
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"].to(network.device)
        batches = pixels.split(batch_size)
    else:
        data = at_most(load_images(dataset or default_dataset(), split), max_images)
        batches, count = (pixels for _, pixels in pixel_batches(network, data, batch_size, "averaging")), len(data)
    maps = average_attention(network, batches, chosen)
    plot_attention_maps(
        maps, output, f"{Path(name).name}: mean attention of the {network.config.unit}, {count:,} images"
    )
    write_result(json_file, {"images": count, "maps": maps.tolist()})
    output_console(json_file).print(
        f"Attention of {len(maps)} {network.config.unit} over {count:,} images: {output}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
