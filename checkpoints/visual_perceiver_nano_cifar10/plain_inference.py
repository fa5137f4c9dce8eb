"""A snapshot of a network for inference, by its own modules, with batch norms folded into the convolutions before them."""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .conv_stem import ConvBlock


class PlainPerceiver:
    """Images to what the output query reads; the counterpart of `FastPerceiver` for what that does not know.

    Args:
        parts: The network: a `PerceiverParts` with a decoder.
        dtype: Of weights and activations; None is that of the network.
        tokens_per_chunk: Tokens that go through the trunk together; None is all.
    """

    def __init__(self, parts: Any, dtype: torch.dtype | None = None, tokens_per_chunk: int | None = None):
        if tokens_per_chunk is not None and tokens_per_chunk < 1:
            raise ValueError(f"Expected `tokens_per_chunk` to be at least 1, got {tokens_per_chunk}.")
        self.tokens_per_chunk = tokens_per_chunk
        self.dtype = dtype or parts.cross_attention.queries.dtype
        self.parts = copy.deepcopy(parts).requires_grad_(False).eval()
        fold_batch_norms(self.parts)
        self.parts.to(self.dtype)
        self.queries = self.parts.cross_attention.queries

    def __call__(
        self, pixel_values: torch.Tensor, K: int, threshold: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the output query reads of each image, (B, D), and the active queries, (B, Q) bool."""
        images = len(pixel_values) if self.tokens_per_chunk is None else max(1, self.tokens_per_chunk // K)
        results = [self.answer(part.to(self.dtype), K, threshold) for part in pixel_values.split(images)]
        pooled, active = (torch.cat(parts) for parts in zip(*results, strict=True))
        return pooled, active

    def answer(self, pixel_values: torch.Tensor, K: int, threshold: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """As `__call__`, for one chunk."""
        active = self.parts.process(self.parts.select(self.parts.read(pixel_values, K), threshold))
        return self.parts.decode(active), self.parts.active_queries(active)


@torch.no_grad()
def fold_batch_norms(module: nn.Module) -> None:
    """Fold the batch norm of each `ConvBlock` into its convolution, in place; for inference alone."""
    for block in module.modules():
        if isinstance(block, ConvBlock) and isinstance(block.norm, nn.BatchNorm2d):
            block.conv = fuse_conv_bn_eval(block.conv.eval(), block.norm.eval())
            block.norm = nn.Identity()
