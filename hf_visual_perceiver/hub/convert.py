"""Checkpoints of transformers' own Perceiver as checkpoints of this package."""

from pathlib import Path
from typing import Any

import torch
import transformers

from hf_visual_perceiver.inference.loading import load_any_config, load_weights
from hf_visual_perceiver.modeling import FAMILIES
from hf_visual_perceiver.training.folder import save_folder


TOLERANCE = 1e-4  # of float32 logits, relative to the largest


def convert(source: str, output: Path) -> tuple[Any, float]:
    """Write a checkpoint of transformers' Perceiver as one of this package; nothing is written unless logits agree.

    Args:
        source: Folder or Hub id of a `PerceiverForImageClassificationLearned`, `...Fourier` or `...ConvProcessing`.
        output: A new or empty folder.

    Returns:
        The model, and the largest difference of its logits from those of transformers' on a random image.

    Raises:
        ValueError: If the source is no such checkpoint, or cannot be expressed here, or the folder is in use.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"Expected a new or empty folder to write to, got {str(output)!r}.")
    config = load_any_config(source)
    if config.model_type != "perceiver":
        raise ValueError(f"Expected a model of type perceiver in {source}, got {config.model_type!r}.")
    name = str(next(iter(config.architectures or []), None))
    classes = [family.classifier for family in FAMILIES.values()]
    takes = {of: ours for ours in classes for of in getattr(ours, "transformers_classes", ())}
    if name not in takes:
        raise ValueError(f"Expected the weights of {' or '.join(takes)} in {source}, got {name}.")
    theirs = load_weights(getattr(transformers, name), source).eval()
    ours = takes[name].from_transformers(theirs)
    side = ours.config.image_size
    image = torch.randn(1, ours.config.num_channels, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs(inputs=image).logits
        difference = (ours(image).logits - expected).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise ValueError(
            f"Expected logits equal to those of {source} to {TOLERANCE}, got a difference of {difference}."
        )
    save_folder(ours, output)
    return ours, difference
