"""Perceiver and Perceiver IO as timm models; importing this file registers their architectures."""

from typing import Any

import torch

from .configuration_iterative_perceiver import IterativePerceiverConfig
from .modeling_iterative_perceiver import IterativePerceiverNetwork, init_weights
from .timm_family import TimmClassifier, register_architectures


class IterativePerceiver(TimmClassifier, IterativePerceiverNetwork):
    """Perceiver with timm's interface.

    Example:
        >>> import timm
        >>> model = timm.create_model("perceiver_io_nano_32").eval()
        >>> model(torch.zeros(2, 3, 32, 32), num_active_queries=8).shape
        torch.Size([2, 10])
    """

    config_class = IterativePerceiverConfig
    base_prefix = "iterative_perceiver"
    initialise = staticmethod(init_weights)
    build_parts = IterativePerceiverNetwork.build_parts
    pool = IterativePerceiverNetwork.pool

    def forward_features(self, x: torch.Tensor, **knobs: Any) -> torch.Tensor:
        """The latents: (B, C, S, S) -> (B, K, D)."""
        return self.run(x, **self.knobs_of(knobs))


register_architectures(__name__, IterativePerceiver)
