"""Image models whose compute is a dial: the Visual Perceiver with Dynamic Query Selection.

Importing the package registers the models with transformers' auto classes and with timm.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .modeling import (
    ARCHITECTURES,
    VisualPerceiverConfig,
    VisualPerceiverForImageClassification,
    VisualPerceiverModel,
    count_macs,
    select_queries,
    timm_visual_perceiver,  # noqa: F401  (registers the timm names)
)


__version__ = "0.1.0"

AutoConfig.register(VisualPerceiverConfig.model_type, VisualPerceiverConfig, exist_ok=True)
AutoModel.register(VisualPerceiverConfig, VisualPerceiverModel, exist_ok=True)
AutoModelForImageClassification.register(VisualPerceiverConfig, VisualPerceiverForImageClassification, exist_ok=True)

# So that `save_pretrained` puts the code beside the weights, and a folder loads where this package is not installed.
VisualPerceiverConfig.register_for_auto_class()
VisualPerceiverModel.register_for_auto_class("AutoModel")
VisualPerceiverForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "ARCHITECTURES",
    "VisualPerceiverConfig",
    "VisualPerceiverForImageClassification",
    "VisualPerceiverModel",
    "count_macs",
    "select_queries",
]
