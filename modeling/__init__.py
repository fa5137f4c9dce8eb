"""Models: what travels with the weights."""

from .configuration_visual_perceiver import ARCHITECTURES, VisualPerceiverConfig
from .elastic import FAMILIES, Budget, ElasticConfig, ElasticModel, Family, Pass, family_of, register
from .macs import count_macs, count_trunk_macs
from .modeling_visual_perceiver import (
    OptimizedVisualPerceiver,
    VisualPerceiverForImageClassification,
    VisualPerceiverImageClassifierOutput,
    VisualPerceiverModel,
    VisualPerceiverModelOutput,
    VisualPerceiverPreTrainedModel,
)
from .query_selection import select_queries


__all__ = [
    "ARCHITECTURES",
    "FAMILIES",
    "Budget",
    "ElasticConfig",
    "ElasticModel",
    "Family",
    "OptimizedVisualPerceiver",
    "Pass",
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
