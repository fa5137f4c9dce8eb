"""Layers that several families share."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from .query_selection import without_autocast


class MLP(nn.Module):
    """Two linears around the activation: (..., D_in) -> (..., D_out)."""

    def __init__(self, in_features: int, hidden: int, out_features: int, act: str = "gelu", dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden)
        self.act = ACT2FN[act]
        self.fc2 = nn.Linear(hidden, out_features)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.fc2(self.act(self.fc1(x))))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, an image skips the branch with this probability."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.probability == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.probability
        return x * (keep.to(x.dtype) / (1 - self.probability))


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, n, D) -> (B, H, n, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    config: PretrainedConfig,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    need_scores: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scaled dot-product attention, written out where transformers' `attn_implementation` is "eager".

    Args:
        query: (B, H, n, d).
        key: (B, H, m, d).
        value: (B, H, m, d').
        config: The model's, which has the implementation.
        bias: Added to the scores before softmax, of a shape that broadcasts to (B, H, n, m).
        dropout: Probability to drop an attention weight.
        need_scores: Return the scores, with the bias; torch's fused kernels do not have them.

    Returns:
        (B, n, H d'), and the scores before softmax (B, H, n, m), or None.
    """
    if not need_scores and config._attn_implementation != "eager":
        y = F.scaled_dot_product_attention(query, key, value, bias, dropout)
        return y.transpose(1, 2).flatten(2), None
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
    scores = scores if bias is None else scores + bias
    with without_autocast(scores.device):  # torch's softmax sums in float32 in every dtype
        weights = F.dropout(scores.softmax(-1), dropout)
    return (weights @ value).transpose(1, 2).flatten(2), scores


def drop_path_rates(highest: float, layers: int) -> list[float]:
    """The probability of stochastic depth in each layer, growing linearly from 0."""
    return [highest * i / max(layers - 1, 1) for i in range(layers)]
