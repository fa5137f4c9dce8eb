"""Perceiver and Perceiver IO as timm models; importing this file registers their architectures."""

from typing import Any

import torch

from .modeling_iterative_perceiver import IterativePerceiverNetwork, IterativePerceiverPreTrainedModel
from .timm_family import TimmClassifier, register_architectures


class IterativePerceiver(IterativePerceiverNetwork, TimmClassifier):
    """Perceiver with timm's interface.

    Example:
        >>> import timm
        >>> model = timm.create_model("perceiver_io_nano_32").eval()
        >>> model(torch.zeros(2, 3, 32, 32), num_active_queries=8).shape
        torch.Size([2, 10])
    """

    pretrained_class = IterativePerceiverPreTrainedModel

    def forward_features(self, x: torch.Tensor, **knobs: Any) -> torch.Tensor:
        """The latents: (B, C, S, S) -> (B, K, D)."""
        return self.run(x, **self.config.knobs_for(**knobs))


register_architectures(IterativePerceiver)
