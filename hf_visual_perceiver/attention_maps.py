"""What each query reads: its cross-attention over the patches, averaged over images (the paper's Figures 3, 4, 5 and 9)."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console

from .evaluation import pixel_batches
from .loading import choose_device, default_dataset, default_model, load_model
from .modeling import VisualPerceiverForImageClassification
from .options import BatchSizeOption, DatasetOption, DeviceOption, ModelOption, SplitOption
from .plots import check_picture, save_figure
from .training.data import load_images
from .training.files import check_writable, write_json
from .training.folder import create_image_processor


@torch.inference_mode()
def average_attention(
    model: VisualPerceiverForImageClassification, batches: Iterable[torch.Tensor], num_active_queries: int | None = None
) -> np.ndarray:
    """The cross-attention of each query, averaged over images and heads.

    Args:
        model: In eval mode.
        batches: Of `pixel_values`, (B, C, H, W) each.
        num_active_queries: K, the queries to look at; None is all.

    Returns:
        (K, rows, columns) float64: of each query a distribution over the grid of patches.

    Raises:
        ValueError: If there is no image, or K is out of its range.

    Example:
        >>> import torch
        >>> from hf_visual_perceiver import VisualPerceiverConfig, VisualPerceiverForImageClassification
        >>> model = VisualPerceiverForImageClassification(VisualPerceiverConfig()).eval()
        >>> average_attention(model, [torch.zeros(2, 3, 32, 32)]).shape
        (64, 8, 8)
    """
    config, parts = model.config, model.visual_perceiver
    K = config.num_queries if num_active_queries is None else config.operating_point(num_active_queries)[0]
    total, images = torch.zeros(K, config.num_patches, dtype=torch.float64), 0
    for pixels in batches:
        _, weights = parts.cross_attention(parts.embeddings(pixels), K, need_weights=True)  # (B, H, K, N)
        total += weights.double().mean(1).sum(0).cpu()
        images += len(pixels)
    if not images:
        raise ValueError("Expected at least one image to average over, got none.")
    height, width = config.image_height_width
    return (total / images).numpy().reshape(K, height // config.patch_size, width // config.patch_size)


def plot_attention_maps(maps: np.ndarray, path: str | Path, title: str = "") -> None:
    """Draw maps (K, rows, columns) from left to right and top to bottom, each on a scale of its own from 0 to its maximum."""
    columns = min(len(maps), max(1, math.ceil(math.sqrt(len(maps)))))
    rows = math.ceil(len(maps) / columns)
    width = max(3.2, 0.85 * columns)
    figure = Figure(figsize=(width, width * rows / columns + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, (axes, attention) in enumerate(zip(grid.flat, maps, strict=False), start=1):
        axes.imshow(attention, vmin=0, vmax=attention.max(), cmap="viridis")
        axes.set_title(str(number), fontsize=6, pad=1.5)
    if title:
        figure.suptitle(title, fontsize=9, wrap=True)
    save_figure(figure, path)


def attention_maps_command(
    images: Annotated[
        list[Path] | None, typer.Argument(help="Image files, or folders of them; by default the dataset.")
    ] = None,
    model: ModelOption = None,
    dataset: DatasetOption = None,
    split: SplitOption = "test",
    output: Annotated[Path, typer.Option(help="The picture to write: .png, .svg or .pdf.")] = Path(
        "attention_maps.png"
    ),
    num_active_queries: Annotated[int | None, typer.Option(help="K: draw the first K queries.")] = None,
    batch_size: BatchSizeOption = 256,
    device: DeviceOption = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the maps to this file.")] = None,
) -> None:
    """What each query reads, as a picture: cross-attention averaged over a dataset, or over given images."""
    # The command line imports this module.
    from .cli import list_images, read_image

    if images and dataset:
        raise ValueError("Expected either images or --dataset, got both.")
    check_picture(output)
    for file in filter(None, (output, json_file)):
        check_writable(file)
    name = model or default_model()
    network = load_model(name, choose_device(device))
    if num_active_queries is not None:
        network.config.operating_point(num_active_queries)
    batches: Iterable[torch.Tensor]
    if images:
        pictures = [read_image(path) for path in list_images(images)]
        processor, count = create_image_processor(network.config), len(pictures)
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"].to(network.device)
        batches = pixels.split(batch_size)
    else:
        data = load_images(dataset or default_dataset(), split)
        shown = "averaging" if Console(stderr=True).is_terminal else None
        batches, count = (pixels for _, pixels in pixel_batches(network, data, batch_size, shown)), len(data)
    maps = average_attention(network, batches, num_active_queries)
    plot_attention_maps(maps, output, f"{Path(name).name}: cross-attention of each query, {count:,} images")
    if json_file:
        write_json(json_file, {"images": count, "maps": maps.tolist()})
    typer.echo(f"Attention of {len(maps)} queries over {count:,} images: {output}")
