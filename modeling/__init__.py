"""Models: what travels with the weights."""

from .configuration_visual_perceiver import ARCHITECTURES, VisualPerceiverConfig
from .macs import count_macs
from .modeling_visual_perceiver import (
    VisualPerceiverForImageClassification,
    VisualPerceiverImageClassifierOutput,
    VisualPerceiverModel,
    VisualPerceiverModelOutput,
    VisualPerceiverPreTrainedModel,
)
from .query_selection import select_queries


__all__ = [
    "ARCHITECTURES",
    "VisualPerceiverConfig",
    "VisualPerceiverForImageClassification",
    "VisualPerceiverImageClassifierOutput",
    "VisualPerceiverModel",
    "VisualPerceiverModelOutput",
    "VisualPerceiverPreTrainedModel",
    "count_macs",
    "select_queries",
]
