"""Image models whose compute is a dial: the Visual Perceiver with Dynamic Query Selection.

Importing the package registers the models with transformers' auto classes and with timm, and a pipeline's task.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.pipelines import PIPELINE_REGISTRY

from hf_visual_perceiver.inference.onnx_perceiver import OnnxPerceiver
from hf_visual_perceiver.inference.pipeline import TASK, AdaptiveImageClassificationPipeline
from hf_visual_perceiver.modeling import (
    ARCHITECTURES,
    VisualPerceiverConfig,
    VisualPerceiverForImageClassification,
    VisualPerceiverModel,
    count_macs,
    select_queries,
    timm_conv_classifier,  # noqa: F401  (registers the timm names)
    timm_visual_perceiver,  # noqa: F401  (likewise)
)
from hf_visual_perceiver.modeling.engines import ENGINES
from hf_visual_perceiver.utils.bundled import bundled_checkpoint
from hf_visual_perceiver.version import __version__  # noqa: F401


AutoConfig.register(VisualPerceiverConfig.model_type, VisualPerceiverConfig, exist_ok=True)
AutoModel.register(VisualPerceiverConfig, VisualPerceiverModel, exist_ok=True)
AutoModelForImageClassification.register(VisualPerceiverConfig, VisualPerceiverForImageClassification, exist_ok=True)
# `image-classification` stays what it is everywhere; this task takes the budget as an argument.
PIPELINE_REGISTRY.register_pipeline(
    TASK, AdaptiveImageClassificationPipeline, pt_model=AutoModelForImageClassification, type="image"
)

# What `optimize_for_inference` takes by default; onnxruntime itself is imported when it is used.
ENGINES["onnxruntime"] = OnnxPerceiver

# So that `save_pretrained` puts the code beside the weights, and a folder loads where this package is not installed.
VisualPerceiverConfig.register_for_auto_class()
VisualPerceiverModel.register_for_auto_class("AutoModel")
VisualPerceiverForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "ARCHITECTURES",
    "AdaptiveImageClassificationPipeline",
    "VisualPerceiverConfig",
    "VisualPerceiverForImageClassification",
    "VisualPerceiverModel",
    "bundled_checkpoint",
    "count_macs",
    "select_queries",
]


def __dir__() -> list[str]:
    """The public names, without what registering them needs."""
    return sorted(__all__)
