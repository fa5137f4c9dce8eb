"""Image classifiers whose compute budget is chosen at each call: the Visual Perceiver with Dynamic Query Selection.

Importing the package registers the models with transformers' auto classes and with timm, and a pipeline's task.
"""

from transformers import AutoModelForImageClassification
from transformers.pipelines import PIPELINE_REGISTRY

from hf_visual_perceiver.inference.cascade import Cascade
from hf_visual_perceiver.inference.onnx_models import create_onnx_engine
from hf_visual_perceiver.inference.onnx_perceiver import OnnxPerceiver
from hf_visual_perceiver.inference.pipeline import TASK, AdaptiveImageClassificationPipeline
from hf_visual_perceiver.modeling import (
    ARCHITECTURES,
    DynamicVisionTransformerConfig,
    DynamicVisionTransformerForImageClassification,
    DynamicVisionTransformerModel,
    IterativePerceiverConfig,
    IterativePerceiverForImageClassification,
    IterativePerceiverModel,
    LookupViTConfig,
    LookupViTForImageClassification,
    LookupViTModel,
    QnAViTConfig,
    QnAViTForImageClassification,
    QnAViTModel,
    VisualPerceiverConfig,
    VisualPerceiverForImageClassification,
    VisualPerceiverModel,
    count_macs,
    select_queries,
    timm_conv_classifier,  # noqa: F401  (registers the timm names)
    timm_dynamic_vision_transformer,  # noqa: F401  (likewise)
    timm_iterative_perceiver,  # noqa: F401
    timm_lookupvit,  # noqa: F401
    timm_qna_vit,  # noqa: F401
    timm_visual_perceiver,  # noqa: F401
)
from hf_visual_perceiver.modeling.elastic import Budget, Family, register
from hf_visual_perceiver.modeling.engines import ENGINES
from hf_visual_perceiver.modeling.optimized import MODEL_ENGINES
from hf_visual_perceiver.utils.bundled import bundled_checkpoint
from hf_visual_perceiver.version import __version__  # noqa: F401


for config, model, classifier in (
    (VisualPerceiverConfig, VisualPerceiverModel, VisualPerceiverForImageClassification),
    (DynamicVisionTransformerConfig, DynamicVisionTransformerModel, DynamicVisionTransformerForImageClassification),
    (LookupViTConfig, LookupViTModel, LookupViTForImageClassification),
    (IterativePerceiverConfig, IterativePerceiverModel, IterativePerceiverForImageClassification),
    (QnAViTConfig, QnAViTModel, QnAViTForImageClassification),
):
    register(Family(config, model, classifier, config.named))

# `image-classification` stays what it is everywhere; this task takes the budget as an argument.
PIPELINE_REGISTRY.register_pipeline(
    TASK, AdaptiveImageClassificationPipeline, pt_model=AutoModelForImageClassification, type="image"
)

# What `optimize_for_inference` takes by default; onnxruntime itself is imported when it is used.
ENGINES["onnxruntime"] = OnnxPerceiver
MODEL_ENGINES["onnxruntime"] = create_onnx_engine

__all__ = [
    "ARCHITECTURES",
    "AdaptiveImageClassificationPipeline",
    "Budget",
    "Cascade",
    "DynamicVisionTransformerConfig",
    "DynamicVisionTransformerForImageClassification",
    "DynamicVisionTransformerModel",
    "IterativePerceiverConfig",
    "IterativePerceiverForImageClassification",
    "IterativePerceiverModel",
    "LookupViTConfig",
    "LookupViTForImageClassification",
    "LookupViTModel",
    "QnAViTConfig",
    "QnAViTForImageClassification",
    "QnAViTModel",
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
