"""LookupViT (Koner et al. 2024): a ViT on a few compressed tokens, which read and update the full grid of tokens cheaply.

Shapes: B images, N lookup tokens (patches), M compressed tokens, D width, H heads.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_lookupvit import LookupViTConfig
from .elastic import check_keywords, check_pixel_values
from .family_config import FamilyConfig  # noqa: F401  transformers 5.4 copies what this file imports alone
from .layers import MLP, DropPath, attend, drop_path_rates, split_heads
from .optimized import OptimizableModel
from .query_selection import as_number, without_autocast  # noqa: F401  likewise


@dataclass
class LookupViTModelOutput(ModelOutput):
    """What `LookupViTModel` returns.

    Attributes:
        last_hidden_state: (B, M, D) compressed tokens, normalised.
        pooler_output: (B, D) their mean.
        lookup_hidden_state: (B, N, D) lookup tokens, normalised.
        used: (B,) the number of compressed tokens, M.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    lookup_hidden_state: torch.Tensor | None = None
    used: torch.Tensor | None = None


@dataclass
class LookupViTImageClassifierOutput(ModelOutput):
    """What `LookupViTForImageClassification` returns.

    Attributes:
        loss: If `labels` were given, the mean of both classifiers' losses.
        logits: (B, labels), the mean of both classifiers', or the compressed tokens' (`config.classify_with`).
        tokens: (B,) the number of compressed tokens that each image used.
        compressed_logits: (B, labels).
        lookup_logits: (B, labels).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    compressed_logits: torch.Tensor | None = None
    lookup_logits: torch.Tensor | None = None

    @property
    def used(self) -> torch.Tensor:
        """(B,) the number of compressed tokens that each image used."""
        assert self.tokens is not None
        return self.tokens


class LookupViTEmbeddings(nn.Module):
    """Patches with learned positions: (B, C, S, S) -> (B, D, h, w)."""

    def __init__(self, config: LookupViTConfig):
        super().__init__()
        size, side = config.patch_size, config.image_size // config.patch_size
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, size, size)
        self.position_embeddings = nn.Parameter(torch.empty(1, config.hidden_size, side, side))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.projection(pixel_values) + self.position_embeddings)


def compress(grid: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Tokens on a smaller grid, resized bilinearly with antialiasing: (B, D, h, w) -> (B, M, D)."""
    if tuple(grid.shape[-2:]) != size:
        # Half precision has no antialiased kernel on CPUs.
        grid = F.interpolate(grid.float(), size, mode="bilinear", align_corners=False, antialias=True).to(grid.dtype)
    return grid.flatten(2).transpose(1, 2)


class LookupViTLayer(GradientCheckpointingLayer):
    """Gather from the lookup tokens, a ViT block on the compressed ones, infuse into the lookup tokens, their small MLP."""

    def __init__(self, config: LookupViTConfig, drop_path: float):
        super().__init__()
        D, eps, bias = config.hidden_size, config.layer_norm_eps, config.qkv_bias
        self.config, self.heads, self.dropout = config, config.num_attention_heads, config.attention_probs_dropout_prob
        self.softmax_again = config.infusion == "softmax"
        self.norm_gather = nn.LayerNorm(D, eps=eps)
        self.norm_lookup = nn.LayerNorm(D, eps=eps)
        self.query = nn.Linear(D, D, bias=bias)
        self.key_value = nn.Linear(D, 2 * D, bias=bias)
        self.gather_proj = nn.Linear(D, D)
        self.norm1 = nn.LayerNorm(D, eps=eps)
        self.qkv = nn.Linear(D, 3 * D, bias=bias)
        self.proj = nn.Linear(D, D)
        self.norm2 = nn.LayerNorm(D, eps=eps)
        self.mlp = MLP(D, int(D * config.mlp_ratio), D, config.hidden_act, config.hidden_dropout_prob)
        self.norm_infuse = nn.LayerNorm(D, eps=eps)
        self.infuse_value = nn.Linear(D, D, bias=bias)
        self.infuse_proj = nn.Linear(D, D)
        self.norm_small = nn.LayerNorm(D, eps=eps)
        self.lookup_mlp = MLP(D, int(D * config.lookup_mlp_ratio), D, config.hidden_act, config.hidden_dropout_prob)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor, lookup: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One block.

        Args:
            x: (B, M, D) compressed tokens.
            lookup: (B, N, D).
        """
        dropout = self.dropout if self.training else 0.0
        query = split_heads(self.query(self.norm_gather(x)), self.heads)
        key, value = (split_heads(p, self.heads) for p in self.key_value(self.norm_lookup(lookup)).chunk(2, dim=-1))
        y, scores = attend(query, key, value, self.config, dropout=dropout, need_scores=True)
        assert scores is not None
        x = x + self.drop_path(self.gather_proj(y))
        query, key, value = (split_heads(p, self.heads) for p in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.drop_path(self.proj(attend(query, key, value, self.config, dropout=dropout)[0]))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        # (B, H, N, M): the scores of the gathering attention, transposed.
        with without_autocast(x.device):
            weights = scores.transpose(2, 3).softmax(-1) if self.softmax_again else scores.softmax(-1).transpose(2, 3)
        y = weights @ split_heads(self.infuse_value(self.norm_infuse(x)), self.heads)
        lookup = lookup + self.drop_path(self.infuse_proj(y.transpose(1, 2).flatten(2)))
        return x, lookup + self.drop_path(self.lookup_mlp(self.norm_small(lookup)))


class LookupViTParts:
    """The network, mixed into transformers' and timm's model classes."""

    config: LookupViTConfig

    def build_parts(self, config: LookupViTConfig) -> None:
        """Create the submodules; their names are those of the state dict in both libraries."""
        self.embeddings = LookupViTEmbeddings(config)
        rates = drop_path_rates(config.drop_path_rate, config.num_hidden_layers)
        self.layers = nn.ModuleList(LookupViTLayer(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lookup_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def run(self, pixel_values: torch.Tensor, size: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compressed tokens (B, M, D) and lookup tokens (B, N, D), normalised."""
        grid = self.embeddings(pixel_values)
        x = compress(grid, (size, size) if isinstance(size, int) else size)
        lookup = grid.flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, N, D)
        for layer in self.layers:
            x, lookup = layer(x, lookup)
        return self.norm(x), self.lookup_norm(lookup)


class LookupViTPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and saving."""

    config: LookupViTConfig
    config_class = LookupViTConfig
    base_model_prefix = "lookupvit"
    main_input_name = "pixel_values"
    input_modalities = "image"
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _no_split_modules = ["LookupViTLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """ViT's initialisation; uses transformers' setters, which skip loaded weights."""
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, LookupViTEmbeddings):
            init.trunc_normal_(module.position_embeddings, std=std)


class LookupViTModel(LookupViTPreTrainedModel, LookupViTParts):
    """LookupViT without a head.

    Example:
        >>> model = LookupViTModel(LookupViTConfig()).eval()
        >>> model(torch.zeros(2, 3, 32, 32), compressed_size=5).last_hidden_state.shape
        torch.Size([2, 25, 96])
    """

    def __init__(self, config: LookupViTConfig):
        super().__init__(config)
        self.build_parts(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, compressed_size: int | tuple[int, int] | None = None, **kwargs: Any
    ) -> LookupViTModelOutput:
        """Compute the tokens with a grid of compressed tokens.

        Args:
            pixel_values: (B, C, S, S), normalised.
            compressed_size: Side of the grid, or (rows, columns); None is the config's, or the largest.
            **kwargs: transformers' `return_dict` and `num_items_in_batch`.

        Raises:
            ValueError: If the images or the grid are not as described, or another keyword would be ignored.
        """
        check_keywords(self, kwargs)
        check_pixel_values(pixel_values, self.config)
        size = self.config.knobs_for(compressed_size=compressed_size)["compressed_size"]
        if isinstance(size, torch.Tensor):
            raise ValueError(f"Expected one grid for all images, got {size.tolist()}; the classifier takes several.")
        x, lookup = self.run(pixel_values, size)
        used = torch.full((x.shape[0],), x.shape[1], device=x.device)
        return LookupViTModelOutput(last_hidden_state=x, pooler_output=x.mean(1), lookup_hidden_state=lookup, used=used)


class LookupViTForImageClassification(LookupViTPreTrainedModel, OptimizableModel):
    """LookupViT with a linear classifier on the mean of each kind of tokens.

    Example:
        >>> model = LookupViTForImageClassification(LookupViTConfig(num_labels=10)).eval()
        >>> output = model(torch.zeros(2, 3, 32, 32), compressed_size=torch.tensor([2, 8]))
        >>> output.logits.shape, output.tokens
        (torch.Size([2, 10]), tensor([ 4, 64]))
    """

    accepts_loss_kwargs = False  # the loss is a mean over the batch

    def __init__(self, config: LookupViTConfig):
        super().__init__(config)
        self.num_labels = len(config.label_names)
        self.lookupvit = LookupViTModel(config)
        self.head = nn.Linear(config.hidden_size, len(config.label_names))
        self.lookup_head = nn.Linear(config.hidden_size, len(config.label_names))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        compressed_size: int | tuple[int, int] | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LookupViTImageClassifierOutput:
        """Classify images with a grid of compressed tokens.

        Args:
            pixel_values: (B, C, S, S), normalised.
            labels: (B,) class indices.
            compressed_size: Side of the grid, (rows, columns), or a tensor (B,) with a side for each image; images of
                equal grids run together. None is the config's, or the largest.
            **kwargs: transformers' `return_dict` and `num_items_in_batch`.

        Raises:
            ValueError: If the images or a grid are not as described, or another keyword would be ignored.
        """
        check_keywords(self, kwargs)
        check_pixel_values(pixel_values, self.config)
        size = self.config.knobs_for(compressed_size=compressed_size)["compressed_size"]
        if isinstance(size, torch.Tensor):
            if len(size) != pixel_values.shape[0]:
                raise ValueError(f"Expected `compressed_size` of {pixel_values.shape[0]} images, got {len(size)}.")
            first = second = pixel_values.new_zeros(pixel_values.shape[0], self.num_labels)
            for side in size.unique().tolist():
                images = (size == side).nonzero()[:, 0].to(pixel_values.device)
                a, b = self.classify(pixel_values[images], side)
                first, second = first.to(a.dtype).index_put((images,), a), second.to(b.dtype).index_put((images,), b)
            tokens = (size**2).to(pixel_values.device)
        else:
            first, second = self.classify(pixel_values, size)
            number = size**2 if isinstance(size, int) else size[0] * size[1]
            tokens = torch.full((pixel_values.shape[0],), number, device=pixel_values.device)
        loss = None
        if labels is not None:
            loss = (
                self.loss_function(labels, first, self.config) + self.loss_function(labels, second, self.config)
            ) / 2
        logits = (first + second) / 2 if self.config.classify_with == "both" else first
        return LookupViTImageClassifierOutput(
            loss=loss, logits=logits, tokens=tokens, compressed_logits=first, lookup_logits=second
        )

    def classify(self, pixel_values: torch.Tensor, size: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of both classifiers, (B, labels) each."""
        x, lookup = self.lookupvit.run(pixel_values, size)
        return self.head(x.mean(1)), self.lookup_head(lookup.mean(1))

    def blocks(self) -> Iterable[nn.Module]:
        """The blocks."""
        return self.lookupvit.layers


__all__ = ["LookupViTForImageClassification", "LookupViTModel", "LookupViTPreTrainedModel"]
