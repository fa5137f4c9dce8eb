"""Engines for inference: PyTorch here, and ONNX Runtime, which the package hf_visual_perceiver adds by name."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .conv_stem import ConvBlock
from .query_selection import without_autocast


class PlainPerceiver:
    """Classifies images with a copy of the network's modules, in any dtype and on any device.

    Batch norms are folded into the convolutions before them.

    Args:
        parts: The network: a `PerceiverNetwork` with a decoder.
        head: The classifier.
        dtype: Dtype of weights and activations; None keeps the network's.
    """

    def __init__(self, parts: Any, head: nn.Module, dtype: torch.dtype | None = None):
        self.dtype = dtype or parts.cross_attention.queries.dtype
        self.device = parts.cross_attention.queries.device
        self.parts = copy.deepcopy(parts).requires_grad_(False).eval()
        fold_batch_norms(self.parts)
        self.parts.to(self.dtype)
        self.head = copy.deepcopy(head).requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(
        self, pixel_values: torch.Tensor, K: int | torch.Tensor, threshold: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, labels) and the active queries (B, Q) bool.

        Args:
            pixel_values: (B, C, H, W), normalised, of the config's size.
            K: Use the first K queries; an integer, or (B,) with a K for each image.
            threshold: Drop queries that are more similar than this to an earlier one; None keeps all.
        """
        parts = self.parts
        with without_autocast(self.device):  # the engine has a dtype of its own
            active = parts.process(parts.begin(pixel_values.to(self.dtype), K, threshold))
            pooled = parts.decode(active)
            parameter = next(self.head.parameters(), pooled)
            return self.head(pooled.to(parameter.dtype)), parts.active_queries(active)


# Name -> what makes an engine from a network and its head. Importing hf_visual_perceiver adds "onnxruntime".
ENGINES: dict[str, Callable[..., Any]] = {"torch": PlainPerceiver}


@torch.no_grad()
def fold_batch_norms(module: nn.Module) -> None:
    """Fold the batch norm of each `ConvBlock` into its convolution, in place; for inference only."""
    for block in module.modules():
        if isinstance(block, ConvBlock) and isinstance(block.norm, nn.BatchNorm2d):
            block.conv = fuse_conv_bn_eval(block.conv.eval(), block.norm.eval())
            block.norm = nn.Identity()
