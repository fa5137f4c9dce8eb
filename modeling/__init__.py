"""Models: what travels with the weights."""

from .configuration_dynamic_vision_transformer import DynamicVisionTransformerConfig
from .configuration_iterative_perceiver import IterativePerceiverConfig
from .configuration_lookupvit import LookupViTConfig
from .configuration_qna_vit import QnAViTConfig
from .configuration_visual_perceiver import ARCHITECTURES, VisualPerceiverConfig
from .elastic import FAMILIES, Budget, ElasticConfig, ElasticModel, Family, Pass, family_of, register
from .macs import count_macs, count_trunk_macs
from .modeling_dynamic_vision_transformer import (
    DynamicVisionTransformerForImageClassification,
    DynamicVisionTransformerModel,
)
from .modeling_iterative_perceiver import IterativePerceiverForImageClassification, IterativePerceiverModel
from .modeling_lookupvit import LookupViTForImageClassification, LookupViTModel
from .modeling_qna_vit import QnAViTForImageClassification, QnAViTModel
from .modeling_visual_perceiver import (
    OptimizedVisualPerceiver,
    VisualPerceiverForImageClassification,
    VisualPerceiverModel,
    VisualPerceiverPreTrainedModel,
)
from .query_selection import select_queries
from .visual_perceiver_incremental import VisualPerceiverImageClassifierOutput, VisualPerceiverModelOutput


__all__ = [
    "ARCHITECTURES",
    "FAMILIES",
    "Budget",
    "DynamicVisionTransformerConfig",
    "DynamicVisionTransformerForImageClassification",
    "DynamicVisionTransformerModel",
    "ElasticConfig",
    "ElasticModel",
    "Family",
    "IterativePerceiverConfig",
    "IterativePerceiverForImageClassification",
    "IterativePerceiverModel",
    "LookupViTConfig",
    "LookupViTForImageClassification",
    "LookupViTModel",
    "OptimizedVisualPerceiver",
    "Pass",
    "QnAViTConfig",
    "QnAViTForImageClassification",
    "QnAViTModel",
    "VisualPerceiverConfig",
    "VisualPerceiverForImageClassification",
    "VisualPerceiverImageClassifierOutput",
    "VisualPerceiverModel",
    "VisualPerceiverModelOutput",
    "VisualPerceiverPreTrainedModel",
    "count_macs",
    "count_trunk_macs",
    "family_of",
    "register",
    "select_queries",
]
