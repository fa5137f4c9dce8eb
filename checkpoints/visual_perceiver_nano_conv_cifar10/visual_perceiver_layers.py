"""The layers of a Visual Perceiver: tokens, attention and blocks.

Shapes: B images, N input tokens, Q learned queries, K active queries, D width, H heads, d = D / H, T tokens of a packed
batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_visual_perceiver import VisualPerceiverConfig
from .conv_stem import ConvBlock, ConvStem, StemLevel
from .elastic import check_pixel_values
from .query_selection import without_autocast
from .ragged import PackedLayout, torch_varlen_attention
from .spatial_init import mimetic_attention, query_features, token_features


KeysAndValues: TypeAlias = tuple[torch.Tensor, torch.Tensor]


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, with the weights: (n, H, L_q, d), (n, H, L, d) x 2 -> (n, L_q, H, d), (n, H, L_q, L).

    transformers looks for this name to know that it may set the attention implementation.
    """
    scores = (query * scaling) @ key.transpose(2, 3)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    # torch's kernels sum in float32 in every dtype; autocast would also write float32 tensors and convert them back.
    with without_autocast(scores.device):
        weights = scores.softmax(dim=-1)
    return (F.dropout(weights, dropout, module.training) @ value).transpose(1, 2), weights


def sdpa_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`eager_attention_forward` with torch's fused kernels, which do not return the weights.

    Called directly rather than through transformers' wrapper, whose Python test of the length breaks torch.export and
    torch.fx when the number of queries is dynamic.
    """
    output = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
    return output.transpose(1, 2), None


class VisualPerceiverPatchEmbeddings(nn.Module):
    """Images to tokens: (B, C, H, W) -> (B, N, D), by a linear map of patches, or by a conv stem and a 1x1 projection.

    The linear map is a convolution, so that timm can adapt its input channels.
    """

    def __init__(self, config: VisualPerceiverConfig):
        super().__init__()
        if config.stem == "conv":
            widths = config.stem_widths or []
            stem = ConvStem(
                config.num_channels, widths, config.stem_downsample, config.stem_residual, config.hidden_act
            )
            self.stem: nn.Module = stem
            self.projection = nn.Conv2d(stem.out_channels, config.hidden_size, kernel_size=1)
        else:
            size = config.patch_size
            self.stem = nn.Identity()
            self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=size, stride=size)

    def forward(self, pixel_values: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The stem's features, which further levels read, and the projection (B, D, h, w) of the last one."""
        features = self.stem.features_of(pixel_values) if isinstance(self.stem, ConvStem) else [pixel_values]
        return features, self.projection(features[-1])


class VisualPerceiverEmbeddings(nn.Module):
    """Tokens of an image with learned positions, at one level or several.

    A convolutional stem may have further levels, each of which adds channels. All levels share the positions.
    """

    def __init__(self, config: VisualPerceiverConfig):
        super().__init__()
        self.config = config
        self.patch_embeddings = VisualPerceiverPatchEmbeddings(config)
        self.levels = nn.ModuleList()
        added = config.level_widths or []
        for end in range(1, len(added) + 1):
            level = (config.stem_widths or [], added[:end], config.hidden_size)
            self.levels.append(StemLevel(*level, config.stem_downsample, config.stem_residual, config.hidden_act))
        self.position_embeddings = nn.Parameter(torch.empty(1, config.num_patches, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        x: torch.Tensor | Sequence[torch.Tensor],
        interpolate_pos_encoding: bool = False,
        first: int = 0,
        end: int = 1,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Tokens of the levels from `first` up to `end`.

        Args:
            x: Images (B, C, H, W), or the features of level `first` - 1.
            interpolate_pos_encoding: Allow images of any multiple of the patch size.
            first: The first level.
            end: One after the last level.

        Returns:
            Tokens (B, N, D) of each level, and the features of the last level, from which another call can continue.
        """
        tokens = []
        features = [] if first == 0 else list(x)
        for level in range(first, end):
            if level == 0:
                advice = "`interpolate_pos_encoding=True` takes other sizes, and so does a model loaded with `image_size=...`"
                check_pixel_values(x, self.config, interpolate_pos_encoding, advice)
                images: Any = x  # a tensor, or torch.fx's proxy of one
                features, grid = self.patch_embeddings(images.to(self.patch_embeddings.projection.weight.dtype))
            else:
                features, grid = self.levels[level - 1](features)
            positions: torch.Tensor = self.position_embeddings
            if interpolate_pos_encoding:
                positions = resample_positions(positions, self.config.grid, grid.shape[-2:])
            tokens.append(self.dropout(grid.flatten(2).transpose(1, 2) + positions))  # (B, D, h, w) -> (B, N, D)
        return tokens, features


def resample_positions(positions: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Position embeddings (1, N, D) of an `old` grid of patches (rows, columns), bicubically resampled to a `new` one."""
    if old == new:
        return positions
    grid = positions.float().unflatten(1, old).permute(0, 3, 1, 2)  # (1, N, D) -> (1, D, h, w)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False, antialias=True)
    return grid.flatten(2).transpose(1, 2).to(positions.dtype)


def adapt_checkpoint_tensor(
    name: str, value: torch.Tensor, config: VisualPerceiverConfig, source: Sequence[int]
) -> torch.Tensor:
    """Adapt a checkpoint's tensor to a config with another image size, or with fewer queries.

    Args:
        name: The parameter's name, with or without a prefix.
        value: The checkpoint's tensor.
        config: The model's config.
        source: (height, width) of the checkpoint's images; empty for square ones of unknown size.

    Raises:
        ValueError: If the position embeddings are not those of images of the source's size.
    """
    if name.endswith("cross_attention.queries"):
        # Training orders the queries by importance, so the first ones work without the others.
        return value[: config.num_queries]
    if not name.endswith("embeddings.position_embeddings") or value.shape[1] == config.num_patches:
        return value
    rows, columns = [side // config.patch_size for side in source] or [math.isqrt(value.shape[1])] * 2
    if rows * columns != value.shape[1]:
        raise ValueError(
            f"Expected position embeddings of a {rows}x{columns} grid, as the checkpoint's input size says, "
            f"got {value.shape[1]} of them."
        )
    return resample_positions(value, (rows, columns), config.grid)


class VisualPerceiverMLP(nn.Module):
    """Two linears around the activation: (..., D) -> (..., D)."""

    def __init__(self, config: VisualPerceiverConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.fc2(self.act(self.fc1(x))))


class MultiHeadAttention(nn.Module):
    """Attention between given queries, keys and values, by the config's attention implementation; no parameters."""

    def __init__(self, config: VisualPerceiverConfig, num_heads: int):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.scaling = (config.hidden_size // num_heads) ** -0.5
        self.is_causal = False  # read by transformers' flash attention

    def split_heads(self, x: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
        """(..., parts D) -> `parts` x (..., H, d)."""
        # Not `chunk` and a loop over the parts, which torch.fx cannot trace.
        return x.unflatten(-1, (parts, self.num_heads, -1)).unbind(-3)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend within each of n images.

        Args:
            query: (n, H, L_q, d).
            key: (n, H, L, d).
            value: (n, H, L, d).
            mask: (n, 1, 1, L) bool, true where a key may be read; None reads all.
            need_weights: Return the weights, which takes the eager form.

        Returns:
            (n, L_q, H, d) and the weights (n, H, L_q, L), or None.
        """
        implementation = "eager" if need_weights else self.config._attn_implementation
        # Flash attention takes no such mask, which the masked backend has, and no wider heads.
        beyond_flash = mask is not None or query.shape[-1] > 256
        if implementation in ("sdpa", None) or (beyond_flash and "flash" in implementation):
            attention: Callable[..., Any] = sdpa_attention
        else:
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        return attention(self, query, key, value, mask, dropout=self.attention_dropout, scaling=self.scaling)

    @property
    def attention_dropout(self) -> float:
        """The probability of dropping an attention weight, 0 in evaluation."""
        return self.config.attention_probs_dropout_prob if self.training else 0.0

    def attend_packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout
    ) -> torch.Tensor:
        """Attend within each image of a packed batch; shapes as in `PackedLayout.attend`."""
        if layout.backend == "varlen":
            return layout.attend(self.attend_varlen, query, key, value)
        return layout.attend(lambda q, k, v, mask: self.attend(q, k, v, mask)[0], query, key, value)

    def attend_varlen(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_offsets: torch.Tensor,
        key_offsets: torch.Tensor,
        max_queries: int,
        max_keys: int,
    ) -> torch.Tensor:
        """Attend within images of different lengths by one kernel, of torch or of a flash attention package.

        Args:
            query: (T_q, H, d).
            key: (T, H, d).
            value: (T, H, d).
            query_offsets: (B + 1,) int32, the first query of each image, and T_q.
            key_offsets: (B + 1,) int32, the first key of each image, and T.
            max_queries: Upper bound of an image's queries.
            max_keys: Upper bound of an image's keys.

        Returns:
            (T_q, H, d).
        """
        implementation = self.config._attn_implementation or "sdpa"
        if "flash" not in implementation:
            attention = torch_varlen_attention()
            assert attention is not None, "resolve_backend has looked"
            return attention(query, key, value, query_offsets, key_offsets, max_queries, max_keys)  # scales by d^-1/2
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))  # (1, H, T, d), as one image
        lengths = {"cu_seq_lens_q": query_offsets, "cu_seq_lens_k": key_offsets}
        longest = {"max_length_q": max_queries, "max_length_k": max_keys}
        settings = {"dropout": self.attention_dropout, "scaling": self.scaling}
        return attention(self, query, key, value, None, **settings, **lengths, **longest)[0][0]


class VisualPerceiverSelfAttention(MultiHeadAttention):
    """Self-attention among the active queries: (B, K, D) -> (B, K, D), or packed (T, D) -> (T, D)."""

    def __init__(self, config: VisualPerceiverConfig):
        super().__init__(config, config.num_attention_heads)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        layout: PackedLayout | None = None,
        need_weights: bool = False,
        past: KeysAndValues | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | KeysAndValues | None]:
        """Attention of the tokens, and its weights (B, H, K, K) if `need_weights`.

        `past` holds keys and values, each (B, H, P, d), of P earlier tokens, which the tokens then read too. The mask is then
        (1, 1, K, P + K), and keys and values of all P + K tokens take the place of the weights.
        """
        query, key, value = self.split_heads(self.qkv(x), 3)  # (..., H, d)
        weights: torch.Tensor | KeysAndValues | None = None
        if layout is not None:
            y = self.attend_packed(query, key, value, layout)
        else:
            query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # (B, H, K, d)
            if past is not None:
                key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
            y, weights = self.attend(query, key, value, mask, need_weights)
        return self.dropout(self.proj(y.flatten(-2))), weights if past is None else (key, value)


class VisualPerceiverCrossAttention(MultiHeadAttention):
    """A cross-attention block with learned queries: Q queries read the patches, or one reads the result (the decoder).

    The block has two halves, with query selection between them: a plain call returns softmax(q k^T / sqrt(d)) v, and
    `finish` computes the rest for the queries that stay. All images share the queries, so they are normalised and projected
    once per batch.

    Parameters are used inside `forward` only, because offloading and `fully_shard` load them for its duration.
    """

    def __init__(self, config: VisualPerceiverConfig, num_queries: int, num_heads: int):
        super().__init__(config, num_heads)
        D = config.hidden_size
        self.queries = nn.Parameter(torch.empty(num_queries, D))
        self.norm_queries = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.norm_inputs = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.query = nn.Linear(D, D, bias=config.qkv_bias)
        self.key_value = nn.Linear(D, 2 * D, bias=config.qkv_bias)
        self.proj = nn.Linear(D, D)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.mlp = VisualPerceiverMLP(config)

    def forward(
        self,
        inputs: torch.Tensor | list[torch.Tensor] | KeysAndValues,
        K: int = 1,
        mask: torch.Tensor | None = None,
        layout: PackedLayout | None = None,
        need_weights: bool = False,
        query: torch.Tensor | None = None,
        part: str = "read",
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Read `inputs` with the first K queries: (B, K, D) and the weights (B, H, K, N).

        Args:
            inputs: (B, N, D); a list of them, one for each level that the queries read; packed (T, D); or the result of
                `keys_and_values` for a level.
            K: How many queries read.
            mask: (B, 1, 1, N) bool, true where a token may be read; None reads all.
            layout: Layout of packed inputs. The images of the result are then in packed order.
            need_weights: See `attend`.
            query: (n,) the queries that read, instead of the first K.
            part: `"read"`, or `"finish"` or `"keys_and_values"` for the methods of these names.
        """
        tokens: Any = inputs  # of the other parts a tensor, or torch.fx's proxy of one
        if part == "finish":
            queries = self.queries[: tokens.shape[1]] if query is None else self.queries[query]
            x = queries + self.dropout(self.proj(tokens))
            return x + self.mlp(self.norm(x)), None
        if part == "keys_and_values":
            return self._project(tokens)
        # A copy: a view of a parameter requires a gradient even under no_grad, on which torch's FLOP counter fails.
        queries = self.queries[:K].clone() if query is None else self.queries[query]
        queries = self.query(self.norm_queries(queries)).unflatten(-1, (self.num_heads, -1))  # (K, H, d)
        queries = queries.transpose(0, 1)[None]  # (1, H, K, d)
        if isinstance(inputs, list) and len(inputs) > 1:
            levels = zip(inputs, self.config.query_spans(0, K), strict=True)
            parts = [self._read(queries[:, :, a:b], x, mask, None, need_weights) for x, (_, a, b) in levels]
            weights = torch.cat([w for _, w in parts if w is not None], dim=2) if need_weights else None
            return torch.cat([y for y, _ in parts], dim=1), weights
        return self._read(queries, inputs[0] if isinstance(inputs, list) else inputs, mask, layout, need_weights)

    def _project(self, inputs: torch.Tensor, packed: bool = False) -> KeysAndValues:
        """(B, N, D) -> 2 x (B, H, N, d), or packed (T, D) -> 2 x (T, H, d)."""
        key, value = self.split_heads(self.key_value(self.norm_inputs(inputs)), 2)  # (..., H, d)
        return (key, value) if packed else (key.transpose(1, 2), value.transpose(1, 2))

    def _read(
        self,
        queries: torch.Tensor,
        inputs: torch.Tensor | KeysAndValues,
        mask: torch.Tensor | None,
        layout: PackedLayout | None,
        need_weights: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Let projected queries (1, H, K, d) read one level."""
        key, value = inputs if isinstance(inputs, tuple) else self._project(inputs, packed=layout is not None)
        if layout is not None:
            return self.attend_packed(queries, key, value, layout).flatten(-2), None
        # A view: the projected queries are not copied for each image.
        y, weights = self.attend(queries.expand(key.shape[0], -1, -1, -1), key, value, mask, need_weights)
        return y.flatten(-2), weights

    def finish(self, y: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
        """Output projection, residual and MLP: (B, K, D) -> (B, K, D), or packed (T, D) -> (T, D).

        `query` (T,) is the query of each row of `y`; None is the first K queries.
        """
        return self(y, query=query, part="finish")[0]

    def keys_and_values(self, inputs: torch.Tensor) -> KeysAndValues:
        """Keys and values of the inputs: (B, N, D) -> 2 x (B, H, N, d)."""
        return self(inputs, part="keys_and_values")


class VisualPerceiverLayer(GradientCheckpointingLayer):
    """One self-attention block, pre-norm, as in DeiT: (B, K, D) -> (B, K, D), or packed (T, D) -> (T, D)."""

    def __init__(self, config: VisualPerceiverConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = VisualPerceiverSelfAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisualPerceiverMLP(config)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        layout: PackedLayout | None = None,
        need_weights: bool = False,
        path_scales: torch.Tensor | None = None,
        past: KeysAndValues | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, KeysAndValues]:
        """Run the block; `path_scales` (2, ...), from `PerceiverNetwork.draw_paths`, weights its branches.

        With `past`, keys and values of all tokens are returned too; see `VisualPerceiverSelfAttention.forward`.
        """
        y, keys_and_values = self.attention(self.norm1(x), mask, layout, need_weights, past)
        x = x + (y if path_scales is None else y * path_scales[0])
        y = self.mlp(self.norm2(x))
        x = x + (y if path_scales is None else y * path_scales[1])
        return x if past is None else (x, keys_and_values)


def init_weights(module: nn.Module, std: float) -> None:
    """DeiT's initialisation: truncated normal weights, zero biases. Uses transformers' setters, which skip loaded weights."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
        init.ones_(module.weight)
        init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            statistics: Any = module
            init.zeros_(statistics.running_mean)
            init.ones_(statistics.running_var)
            init.zeros_(statistics.num_batches_tracked)
    elif isinstance(module, ConvBlock):
        # torch's default, smaller than He's: a convolution before a batch norm learns faster with small weights.
        init.kaiming_uniform_(module.conv.weight, a=math.sqrt(5))
    elif isinstance(module, VisualPerceiverEmbeddings):
        init.trunc_normal_(module.position_embeddings, std=std)
        if module.config.query_init == "spatial":
            init.copy_(module.position_embeddings, token_features(*module.config.grid, module.config.hidden_size))
    elif isinstance(module, VisualPerceiverSelfAttention) and module.config.attention_init == "mimetic":
        qkv, proj = mimetic_attention(module.config.hidden_size, module.num_heads)
        init.copy_(module.qkv.weight, qkv)
        init.copy_(module.proj.weight, proj)
    elif isinstance(module, VisualPerceiverCrossAttention):
        init.trunc_normal_(module.queries, std=std)
        D, reads_image = module.config.hidden_size, module.queries.shape[0] == module.config.num_queries
        if module.config.query_init == "spatial" and reads_image and not module.queries.is_meta:
            regions = query_features(len(module.queries), max(module.config.grid), D)
            init.copy_(module.queries, module.queries.detach().cpu() + regions)
            # Scores then compare positions.
            init.copy_(module.query.weight, torch.eye(D))
            weight = module.key_value.weight.detach().cpu().clone()
            weight[:D] = torch.eye(D)
            init.copy_(module.key_value.weight, weight)
