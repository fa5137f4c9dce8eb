"""What each query reads: its cross-attention over the patches, averaged over images (the paper's Figures 3, 4, 5 and 9)."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from hf_visual_perceiver.evaluation.plots import save_figure
from hf_visual_perceiver.modeling import VisualPerceiverForImageClassification


@torch.inference_mode()
def average_attention(
    model: VisualPerceiverForImageClassification, batches: Iterable[torch.Tensor], num_active_queries: int | None = None
) -> np.ndarray:
    """The cross-attention of each query, averaged over images and heads.

    Args:
        model: In eval mode.
        batches: Batches of `pixel_values`, (B, C, H, W) each.
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
        _, weights = parts.look(pixels, K)  # (B, H, K, N)
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
