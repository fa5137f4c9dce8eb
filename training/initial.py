"""Start a run from the weights of another: fine-tuning, or a second stage of training."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageClassification

from hf_visual_perceiver.modeling.conv_stem import ConvBlock, ConvStem


@torch.no_grad()
def load_initial_weights(model: Any, source: str) -> list[str]:
    """Load the weights of a checkpoint into `model`; the head keeps its random weights if the labels differ.

    Args:
        model: The network to train, changed in place.
        source: A folder or Hub id of a classifier of the same family and sizes.

    Returns:
        The names of the weights that were not loaded: none, or those of the head.

    Raises:
        ValueError: If there is no such checkpoint, or it is of another family or size; `model` is then unchanged.

    Example:
        >>> from hf_visual_perceiver import VisualPerceiverConfig, VisualPerceiverForImageClassification
        >>> from hf_visual_perceiver.inference.loading import default_model
        >>> config = VisualPerceiverConfig.from_pretrained(default_model(), num_labels=5)
        >>> load_initial_weights(VisualPerceiverForImageClassification(config), default_model())
        ['head.weight', 'head.bias']
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.model_type != model.config.model_type:
            raise ValueError(f"it is a model of type {config.model_type}")
        trained = type(model).from_pretrained(source, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"Expected `initial_model` to be a folder or Hub id of a model of type {model.config.model_type}, got {source!r}: {reason}"
        ) from error
    weights = trained.state_dict()
    same_labels = trained.config.id2label == model.config.id2label
    fresh = [] if same_labels else [name for name in weights if name.startswith("head.")]
    own = {name: value for name, value in model.state_dict().items() if name not in fresh}
    taken = {name: value for name, value in weights.items() if name not in fresh}
    for name in sorted(own.keys() | taken.keys()):
        expected, given = (list(x[name].shape) if name in x else None for x in (own, taken))
        if expected != given:
            raise ValueError(
                f"Expected `initial_model` to have the sizes of the recipe's `architecture` and `config`, got {name} of shape "
                f"{given} for {expected} in {Path(source).name}."
            )
    model.load_state_dict(taken, strict=False)
    return fresh


@torch.no_grad()
def load_initial_stem(model: Any, source: str) -> None:
    """Load the stem of a `conv_stem_classifier_32`, a classifier made of a stem and pooling, into the stem of `model`.

    Args:
        model: The network to train, with a convolutional stem; changed in place.
        source: A folder or Hub id of that timm model in transformers' `TimmWrapper`.

    Raises:
        ValueError: If there is no such classifier, or its stem has other shapes, downsampling, shortcuts or activation;
            `model` is then unchanged.
    """
    own = model.stem
    try:
        classifier = AutoModelForImageClassification.from_pretrained(
            source, use_safetensors=True, trust_remote_code=False
        )
        stem = classifier.timm_model.stem
    except (OSError, ValueError, RuntimeError, AttributeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"Expected `initial_stem` to be a folder or Hub id of a conv_stem_classifier_32, got {source!r}: {reason}"
        ) from error
    weights = stem.state_dict()
    for name, value in own.state_dict().items():
        given = list(weights[name].shape) if name in weights else None
        if given != list(value.shape):
            raise ValueError(
                f"Expected `initial_stem` to have the stem of the recipe's `config`, got {name} of shape {given} for "
                f"{list(value.shape)} in {Path(source).name}."
            )
    if not weights or len(weights) != len(own.state_dict()):
        raise ValueError(
            f"Expected a stem of {len(own.state_dict())} tensors, got {len(weights)} in {Path(source).name}."
        )
    for name, expected in choices_of(own).items():
        if (given := choices_of(stem)[name]) != expected:
            raise ValueError(
                f"Expected `initial_stem` with {name} {expected}, as in the recipe's `config`, got {given} in "
                f"{Path(source).name}."
            )
    own.load_state_dict(weights)


def choices_of(stem: ConvStem) -> dict[str, Any]:
    """What the shapes of a stem's weights do not show."""
    blocks = [block for block in stem.modules() if isinstance(block, ConvBlock)]
    return {
        "downsampling": "pool" if stem.pool else "stride",
        "shortcuts": [block.residual for block in blocks],
        "activation": type(blocks[0].act).__name__,
    }


def earlier_training(source: str) -> dict[str, Any] | None:
    """Read the training.json that this package wrote beside the initial weights; None if there is none."""
    file = Path(source) / "training.json"
    return json.loads(file.read_text()) if file.is_file() else None
