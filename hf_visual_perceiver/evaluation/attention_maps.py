"""Attention maps: each latent token's attention, averaged over images (the paper's Figures 3, 4, 5 and 9)."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from hf_visual_perceiver.evaluation.plots import save_figure
from hf_visual_perceiver.modeling import Budget


@torch.inference_mode()
def average_attention(model: Any, batches: Iterable[torch.Tensor], budget: Budget | None = None) -> np.ndarray:
    """Each latent token's cross-attention over the image, averaged over images and heads.

    Args:
        model: A model in eval mode that has a `look` method.
        batches: Batches of `pixel_values`, (B, C, H, W) each.
        budget: The budget whose tokens to look at; None is the full network.

    Returns:
        (K, rows, columns) float64: for each token, a distribution over the image's grid.

    Raises:
        ValueError: If there is no image, the budget is out of range, or the model has no `look` method.

    Example:
        >>> import torch
        >>> from hf_visual_perceiver import VisualPerceiverConfig, VisualPerceiverForImageClassification
        >>> model = VisualPerceiverForImageClassification(VisualPerceiverConfig()).eval()
        >>> average_attention(model, [torch.zeros(2, 3, 32, 32)]).shape
        (64, 8, 8)
    """
    if not hasattr(model, "look"):
        raise ValueError(f"Expected a model with attention maps, got one of type {model.config.model_type}.")
    total: Any = 0
    images = 0
    for pixels in batches:
        _, attention = model.look(pixels, budget)  # (B, K, rows, columns)
        total = total + attention.double().sum(0).cpu()
        images += len(pixels)
    if not images:
        raise ValueError("Expected at least one image to average over, got none.")
    return (total / images).numpy()


def plot_attention_maps(maps: np.ndarray, path: str | Path, title: str = "") -> None:
    """Draw maps (K, rows, columns) from left to right and top to bottom, each scaled from 0 to its own maximum."""
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
