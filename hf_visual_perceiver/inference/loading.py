"""Load checkpoints and choose devices by name, with clear errors."""

from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, TimmWrapperForImageClassification

from hf_visual_perceiver.modeling import FAMILIES
from hf_visual_perceiver.modeling.static_classifier import StaticClassifier, StaticConfig
from hf_visual_perceiver.utils.bundled import (
    SAMPLE,
    bundled_checkpoint,
    default_dataset,
    default_model,
    shipped,
)
from hf_visual_perceiver.utils.choices import check_dtype


def load_optimized(name: str, device: str = "cpu", dtype: str = "float32") -> Any:
    """Load a classifier in the form that is optimised for CPUs; see `load_model`.

    Raises:
        ValueError: If the model has no such form, or `load_model` fails.
    """
    check_dtype(dtype)
    # Load in float32, so that folded weights are rounded only once.
    model = load_model(name, device)
    if not hasattr(model, "optimize_for_inference"):
        raise ValueError(f"Expected a model with an optimised form, got one of type {model.config.model_type}.")
    return model.optimize_for_inference(getattr(torch, dtype))


def load_model(name: str, device: str = "cpu", dtype: str = "float32") -> Any:
    """Load a classifier, ready for inference: one of our families, or a timm classifier saved by transformers.

    Args:
        name: A folder or Hub id.
        device: torch's name of the device.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.

    Raises:
        ValueError: If there is no such checkpoint, it holds another kind of model, or its weights are incomplete.
    """
    check_dtype(dtype)
    config = load_any_config(name)
    if config.model_type == StaticConfig.model_type:
        network = load_weights(TimmWrapperForImageClassification, name)
        return StaticClassifier(network).to(device, getattr(torch, dtype))
    check_type(config.model_type, name)
    family = FAMILIES[config.model_type]
    return load_weights(family.classifier, name, getattr(torch, dtype)).to(device).eval()


def load_weights(classifier: Any, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load all weights of a model of transformers or ours.

    Args:
        classifier: The model's class.
        name: A folder or Hub id.
        dtype: Dtype of the weights.

    Raises:
        ValueError: If the weights cannot be read, or are not those of the model that config.json describes.
    """
    try:
        model, report = classifier.from_pretrained(
            # Mismatches are reported below with both shapes.
            name,
            dtype=dtype,
            use_safetensors=True,  # transformers would fall back to a pickle
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"Cannot read the weights of {name}: {_first_line(error)}") from error
    if mismatched := sorted(report["mismatched_keys"]):
        key, given, expected = mismatched[0]
        raise ValueError(
            f"Expected {key} of shape {tuple(expected)} in {name}, as its config.json says, got {tuple(given)} "
            f"({len(mismatched)} weights do not fit)."
        )
    for kind, verb in (("missing_keys", "missing"), ("unexpected_keys", "not part of the model")):
        if keys := sorted(report[kind]):
            raise ValueError(
                f"Expected the weights of {name} to match its config.json; {len(keys)} are {verb}, such as {keys[0]}."
            )
    return model


def load_config(name: str) -> Any:
    """Load the config of a folder or Hub id.

    Raises:
        ValueError: If there is no such checkpoint, or it holds another kind of model.
    """
    config = load_any_config(name)
    check_type(config.model_type, name)
    return config


def load_any_config(name: str) -> Any:
    """Load the config of a folder or Hub id, of any model that transformers knows.

    Raises:
        ValueError: If there is no such checkpoint.
    """
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)  # None would prompt on a terminal
    except (OSError, ValueError, HFValidationError, HfHubHTTPError, StrictDataclassError) as error:
        raise ValueError(f"Expected a folder or Hub id of a checkpoint, got {name!r}: {_first_line(error)}") from error


def config_from_dict(values: dict[str, Any], source: str) -> Any:
    """Create the config from the values of a config.json.

    Raises:
        ValueError: If they are of another kind of model, or are invalid.
    """
    check_type(values.get("model_type"), source)
    return FAMILIES[values["model_type"]].config.from_dict(values)


def check_type(model_type: Any, source: str) -> None:
    """Raise a `ValueError` unless this is one of our families."""
    if model_type not in FAMILIES:
        raise ValueError(f"Expected a model of type {', '.join(FAMILIES)} in {source}, got {model_type!r}.")


def choose_device(device: str = "auto") -> str:
    """Return `device`; for `"auto"`, cuda if it is available, and cpu otherwise.

    Raises:
        ValueError: If this machine has no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"Expected an available device, got {device!r}: {_first_line(error)}") from error
    return device


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


__all__ = [
    "SAMPLE",
    "bundled_checkpoint",
    "check_type",
    "choose_device",
    "config_from_dict",
    "default_dataset",
    "default_model",
    "load_config",
    "load_model",
    "load_optimized",
    "shipped",
]
