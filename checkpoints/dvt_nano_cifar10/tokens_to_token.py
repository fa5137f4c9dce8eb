"""Tokens-to-Token (Yuan et al. 2021): tokens of overlapping patches, made in steps, with Performers between them.

Shapes: B images, C channels, S and s sides of grids, N = s^2 tokens, d width between the steps, m random features, D width.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .layers import MLP
from .query_selection import without_autocast


def sinusoids(tokens: int, width: int) -> torch.Tensor:
    """The fixed positions of Vaswani et al. 2017, sine and cosine in turn: (1, tokens, width)."""
    places = torch.arange(tokens, dtype=torch.float64)[:, None]
    angles = places / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[None, :, :width].float()


class TokenPerformer(GradientCheckpointingLayer):
    """A layer whose attention grows linearly with the number of tokens: (B, N, in_features) -> (B, N, d).

    Positive random features estimate the kernel of softmax, exp(q k), as phi(q) phi(k) (Choromanski et al. 2021). The width
    changes within the layer, so the first residual adds the values instead of the inputs.
    """

    directions: torch.Tensor

    def __init__(self, config: Any, in_features: int):
        super().__init__()
        d, m = config.stem_hidden_size, config.num_random_features
        self.norm1 = nn.LayerNorm(in_features, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(in_features, 3 * d)
        self.proj = nn.Linear(d, d)
        self.proj_drop = nn.Dropout(config.stem_dropout_prob)
        self.norm2 = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.mlp = MLP(d, d, d, config.hidden_act, config.stem_dropout_prob)
        # Drawn once and then fixed, so the state dict has them.
        self.register_buffer("directions", torch.empty(m, d))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """phi(x), positive: (B, N, d) -> (B, N, m)."""
        w = self.directions.float()
        return (x @ w.T - x.square().sum(-1, keepdim=True) / 2).exp() * len(w) ** -0.5

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Means of the values, weighted by phi(q) phi(k): three (B, N, d) -> (B, N, d)."""
        with without_autocast(value.device):  # half precision has no room for the exponentials
            query, key = self.features(query.float()), self.features(key.float())
            above = query @ (key.transpose(1, 2) @ value.float())
            below = query @ key.sum(1)[:, :, None]
            return (above / (below + 1e-8)).to(value.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = value + self.proj_drop(self.proj(self.attend(query, key, value)))
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """An exit's tokens: (B, C, S, S) -> (B, D, N).

    Each soft split joins the overlapping patches of a grid to vectors. All but the last go through a Performer, which makes
    them the tokens of a smaller grid.
    """

    def __init__(self, config: Any, exit: int):
        super().__init__()
        self.splits, self.sides = config.splits(exit), config.sides(exit)
        sizes = [kernel**2 for kernel, _, _ in self.splits]
        widths = [config.num_channels, *[config.stem_hidden_size] * (len(sizes) - 1)]
        *inner, last = [size * width for size, width in zip(sizes, widths, strict=True)]
        self.performers = nn.ModuleList(TokenPerformer(config, width) for width in inner)
        self.projection = nn.Linear(last, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate([*self.performers, self.projection]):
            if i:
                x = x.unflatten(2, (self.sides[i - 1],) * 2)  # (B, d, N) -> (B, d, s, s)
            kernel, stride, padding = self.splits[i]
            x = layer(F.unfold(x, kernel, padding=padding, stride=stride).transpose(1, 2)).transpose(1, 2)
        return x
