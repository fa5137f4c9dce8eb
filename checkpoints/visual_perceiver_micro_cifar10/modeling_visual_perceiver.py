"""The Visual Perceiver (Dancette & Cord 2022): image models that read patches with as many queries as they need.

An image becomes N patch tokens; Q learned queries read them once by cross-attention; the first K of them, or those that
Dynamic Query Selection keeps, go through the self-attention blocks; one output query reads the result.

Shapes: B images, N input tokens, Q learned queries, K active queries, D width, H heads, d = D / H, T tokens of a packed
batch. The parts below and `PerceiverParts`, which strings them together, are shared by the `PreTrainedModel`s in this file
and by timm's model in `timm_visual_perceiver.py`, so that one file of weights serves both.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, load_state_dict
from transformers.processing_utils import Unpack
from transformers.utils.generic import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_groups import AttentionGroup  # noqa: F401  likewise
from .configuration_visual_perceiver import VisualPerceiverConfig
from .conv_stem import ConvBlock, ConvStem, StemLevel
from .elastic import Budget, ElasticModel, GraphPlan, Pass, check_pixel_values, reference_model
from .engines import create_engine
from .macs import count_macs  # noqa: F401  likewise
from .query_selection import cosine_similarities, keep_dissimilar, select_queries, without_autocast
from .ragged import PackedLayout, check_backend, resolve_backend, torch_varlen_attention
from .spatial_init import mimetic_attention, query_features, token_features


@dataclass
class VisualPerceiverModelOutput(ModelOutput):
    """What `VisualPerceiverModel` returns.

    Attributes:
        last_hidden_state: (B, K, D) tokens after the self-attention blocks; rows of removed queries are zero.
        pooler_output: (B, D) the output query's token after the decoder and its norm.
        active_queries: (B, Q) bool, the queries that each image used; `active_queries.sum(1)` is its K.
        hidden_states: The (B, K, D) input of every block and the output of the last, if asked for.
        attentions: The (B, H, K, K) attention of every block, if asked for.
        cross_attentions: One (B, H, K, N) tensor: what each query reads, if asked for.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    active_queries: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None

    @property
    def used(self) -> torch.Tensor:
        """(B,) the number of queries that each image used."""
        assert self.active_queries is not None
        return self.active_queries.sum(1)


@dataclass
class VisualPerceiverImageClassifierOutput(ModelOutput):
    """What `VisualPerceiverForImageClassification` returns.

    Attributes:
        loss: The classification loss, if `labels` were given.
        logits: (B, labels).
        active_queries: (B, Q) bool, the queries that each image used; `active_queries.sum(1)` is its K.
        hidden_states: As in `VisualPerceiverModelOutput`.
        attentions: As in `VisualPerceiverModelOutput`.
        cross_attentions: As in `VisualPerceiverModelOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    active_queries: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None

    @property
    def used(self) -> torch.Tensor:
        """(B,) the number of queries that each image used."""
        assert self.active_queries is not None
        return self.active_queries.sum(1)


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

    By its name transformers knows that `set_attn_implementation` can be obeyed.
    """
    scores = (query * scaling) @ key.transpose(2, 3)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    # torch's kernels add up in float32 whatever the dtype. Autocast would have float32 tensors written and converted back as
    # well.
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
    """`eager_attention_forward` by torch's fused kernels, without the weights.

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
        """Features that levels of the stem go on from, and the projection (B, D, h, w) of the last of them."""
        features = self.stem.features_of(pixel_values) if isinstance(self.stem, ConvStem) else [pixel_values]
        return features, self.projection(features[-1])


class VisualPerceiverEmbeddings(nn.Module):
    """Tokens of an image with learned positions, at one level or several.

    A convolutional stem may have further levels, each of which adds channels to those before. They share the positions, and
    are computed for the queries that read them.
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
            x: Images (B, C, H, W), or if `first` is not 0 the features of the level before it.
            interpolate_pos_encoding: Take images of any multiple of the patch size.
            first: Level to begin with.
            end: One after the last level.

        Returns:
            For each level (B, N, D), and the features of the last, from which `forward` can go on.
        """
        tokens = []
        features = [] if isinstance(x, torch.Tensor) else list(x)
        for level in range(first, end):
            if isinstance(x, torch.Tensor) and level == 0:
                check_pixel_values(x, self.config, any_size=interpolate_pos_encoding)
                features, grid = self.patch_embeddings(x.to(self.patch_embeddings.projection.weight.dtype))
            else:
                features, grid = self.levels[level - 1](features)
            positions: torch.Tensor = self.position_embeddings
            if interpolate_pos_encoding:
                height, width = self.config.image_height_width
                size = self.config.patch_size
                positions = resample_positions(positions, (height // size, width // size), grid.shape[-2:])
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
    """What a model of this config takes from a checkpoint of another image size, or with more queries than it has.

    Args:
        name: The parameter's name, with or without a prefix.
        value: The checkpoint's.
        config: The model's.
        source: (height, width) of the checkpoint's images; empty for square ones of unknown size.

    Raises:
        ValueError: If the position embeddings are not those of images of the source's size.
    """
    if name.endswith("cross_attention.queries"):
        # Queries are trained in the order of their worth, so the first ones are a network of their own.
        return value[: config.num_queries]
    if not name.endswith("embeddings.position_embeddings") or value.shape[1] == config.num_patches:
        return value
    size = config.patch_size
    rows, columns = [side // size for side in source] or [math.isqrt(value.shape[1])] * 2
    if rows * columns != value.shape[1]:
        raise ValueError(
            f"Expected position embeddings of a {rows}x{columns} grid, as the checkpoint's input size says, "
            f"got {value.shape[1]} of them."
        )
    height, width = config.image_height_width
    return resample_positions(value, (rows, columns), (height // size, width // size))


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
            need_weights: Fused kernels do not give the weights, so the eager form runs when they are needed.

        Returns:
            (n, L_q, H, d) and the weights (n, H, L_q, L), or None.
        """
        implementation = "eager" if need_weights else self.config._attn_implementation
        # Flash attention takes no mask of this form, which the reference form of a ragged batch has, and no wider heads.
        beyond_flash = mask is not None or query.shape[-1] > 256
        if implementation in ("sdpa", None) or (beyond_flash and "flash" in implementation):
            attention: Callable = sdpa_attention
        else:
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        return attention(self, query, key, value, mask, dropout=self.attention_dropout, scaling=self.scaling)

    @property
    def attention_dropout(self) -> float:
        """The probability to drop an attention weight at present."""
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
            query_offsets: (B + 1,) int32, where the queries of each image begin, and T_q.
            key_offsets: (B + 1,) int32, likewise of keys and values.
            max_queries: No image has more.
            max_keys: No image has more.

        Returns:
            (T_q, H, d).
        """
        implementation = self.config._attn_implementation or "sdpa"
        if "flash" not in implementation:
            attention = torch_varlen_attention()
            assert attention is not None, "resolve_backend has looked"
            return attention(query, key, value, query_offsets, key_offsets, max_queries, max_keys)  # scales by d^-1/2
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))  # (1, H, T, d), as if of one image
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
        """Attention of the tokens, and its weights (B, H, K, K) if they are needed.

        With `past`, keys and values of P earlier tokens, each (B, H, P, d), the tokens are new ones that read those as well.
        The mask is then (1, 1, K, P + K), and in place of the weights come keys and values of all P + K tokens.
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
    """A cross-attention block with its learned queries: Q of them read the patches, or one reads the result (decoder).

    The block comes in two halves, with query selection between them: a plain call gives what the queries read,
    softmax(q k^T / sqrt(d)) v, and `finish` all the rest, for those queries that stay. The queries are the same for every
    image, so they are normalised and projected once for the whole batch.

    Every use of a parameter is inside `forward`, around which offloading and `fully_shard` bring the parameters and take
    them away again.
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
            inputs: (B, N, D), or a list of them, the tokens of each level that the queries read; packed (T, D); or what
                `keys_and_values` made of a level.
            K: How many queries read.
            mask: (B, 1, 1, N) bool, true where a token may be read; None reads all.
            layout: Layout of packed inputs. The images of the result are then in packed order.
            need_weights: See `attend`.
            query: (n,) the queries that read, instead of the first K.
            part: `"finish"` and `"keys_and_values"` are the methods of these names.
        """
        if part == "finish":
            assert isinstance(inputs, torch.Tensor)
            queries = self.queries[: inputs.shape[1]] if query is None else self.queries[query]
            x = queries + self.dropout(self.proj(inputs))
            return x + self.mlp(self.norm(x)), None
        if part == "keys_and_values":
            assert isinstance(inputs, torch.Tensor)
            return self._project(inputs)
        # A copy, because a view of a parameter claims to require a gradient even under no_grad, which torch's FLOP
        # counter cannot take.
        queries = self.queries[:K].clone() if query is None else self.queries[query]
        queries = self.query(self.norm_queries(queries)).unflatten(-1, (self.num_heads, -1))  # (K, H, d)
        queries = queries.transpose(0, 1)[None]  # (1, H, K, d)
        if isinstance(inputs, list) and len(inputs) > 1:
            levels = zip(inputs, self.config.query_spans(0, K), strict=True)
            parts = [self._read(queries[:, :, a:b], x, mask, None, need_weights) for x, (_, a, b) in levels]
            weights = torch.cat([w for _, w in parts if w is not None], dim=2) if need_weights else None
            return torch.cat([y for y, _ in parts], dim=1), weights
        return self._read(queries, inputs[0] if isinstance(inputs, list) else inputs, mask, layout, need_weights)

    def _project(self, inputs: torch.Tensor) -> KeysAndValues:
        """(B, N, D) -> 2 x (B, H, N, d), or packed (T, D) -> 2 x (T, H, d)."""
        key, value = self.split_heads(self.key_value(self.norm_inputs(inputs)), 2)  # (..., H, d)
        return (key, value) if inputs.ndim == 2 else (key.transpose(1, 2), value.transpose(1, 2))

    def _read(
        self,
        queries: torch.Tensor,
        inputs: torch.Tensor | KeysAndValues,
        mask: torch.Tensor | None,
        layout: PackedLayout | None,
        need_weights: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What projected queries (1, H, K, d) read from one level."""
        key, value = self._project(inputs) if isinstance(inputs, torch.Tensor) else inputs
        if layout is not None:
            return self.attend_packed(queries, key, value, layout).flatten(-2), None
        # A view: the projected queries are not copied for each image.
        y, weights = self.attend(queries.expand(key.shape[0], -1, -1, -1), key, value, mask, need_weights)
        return y.flatten(-2), weights

    def finish(self, y: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
        """Output projection, residual and MLP of what was read: (B, K, D) -> (B, K, D), or packed (T, D) -> (T, D).

        `query` (T,) says which query each row of `y` belongs to; without it they are the first K.
        """
        return self(y, query=query, part="finish")[0]

    def keys_and_values(self, inputs: torch.Tensor) -> KeysAndValues:
        """As the queries read them: (B, N, D) -> 2 x (B, H, N, d)."""
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
        """The block; `path_scales` (2, ...), from `PerceiverParts.draw_paths`, weights the branches of each image or token.

        With `past`, the tokens come after earlier ones, and keys and values of all are returned too; see
        `VisualPerceiverSelfAttention.forward`.
        """
        y, keys_and_values = self.attention(self.norm1(x), mask, layout, need_weights, past)
        x = x + (y if path_scales is None else y * path_scales[0])
        y = self.mlp(self.norm2(x))
        x = x + (y if path_scales is None else y * path_scales[1])
        return x if past is None else (x, keys_and_values)


@dataclass(frozen=True)
class ActiveTokens:
    """The tokens on their way through the network, in one of three forms.

    Dense: `tokens` (B, K, D), every image uses all K. Masked: `tokens` (B, K, D), `keep` (B, K) says which count.
    Packed: `tokens` (T, D), `layout` says whose they are; the removed ones are gone.
    """

    tokens: torch.Tensor
    keep: torch.Tensor | None = None
    layout: PackedLayout | None = None

    @property
    def mask(self) -> torch.Tensor | None:
        """Of the keys that attention may read, (B, 1, 1, K); only the masked form needs one."""
        return None if self.keep is None or self.layout is not None else self.keep[:, None, None, :]

    def dense(self) -> torch.Tensor:
        """(B, K, D), rows of removed queries zero."""
        if self.layout is not None:
            return self.layout.unpack(self.tokens)
        return self.tokens if self.keep is None else self.tokens * self.keep[..., None]

    def packed(self, backend: str = "grouped") -> "ActiveTokens":
        """The packed form of dense tokens, for a ragged backend; packed ones stay as they are."""
        if self.layout is not None:
            return self
        assert self.keep is None, "the masked form is for reference and is not packed"
        B, K, _ = self.tokens.shape
        return ActiveTokens(self.tokens.flatten(0, 1), layout=PackedLayout.prefix(B, K, self.tokens.device, backend))

    @staticmethod
    def join(batches: Sequence["ActiveTokens"], backend: str = "grouped") -> "ActiveTokens":
        """Several batches as one packed batch, their images one after the other."""
        batches = [batch.packed(backend) for batch in batches]
        layout = PackedLayout.join([batch.layout for batch in batches if batch.layout is not None])
        return ActiveTokens(torch.cat([batch.tokens for batch in batches]), layout=layout)


class PerceiverParts:
    """The network itself, mixed into transformers' and timm's model classes: build, read, select, process, decode."""

    config: VisualPerceiverConfig
    training: bool  # nn.Module's

    def build_parts(self, config: VisualPerceiverConfig) -> None:
        """Create the submodules and parameters; their names are those of the state dict in both libraries."""
        self.embeddings = VisualPerceiverEmbeddings(config)
        self.cross_attention = VisualPerceiverCrossAttention(
            config, config.num_queries, config.num_cross_attention_heads
        )
        self.layers = nn.ModuleList(VisualPerceiverLayer(config) for _ in range(config.num_hidden_layers))
        # timm's pruning removes these two.
        self.decoder: VisualPerceiverCrossAttention | None = VisualPerceiverCrossAttention(
            config, 1, config.num_attention_heads
        )
        self.norm: nn.Module = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self._ragged_backend = "auto"

    @property
    def ragged_backend(self) -> str:
        """How images that keep different numbers of queries share a batch, on this device, in this dtype or autocast.

        `"varlen"`, `"grouped"` or `"masked"`; see `ragged.py`. `set_ragged_backend` asks for one of them.
        """
        return self.ragged_backend_for(self.cross_attention.queries)

    def set_ragged_backend(self, backend: str = "auto") -> None:
        """Choose how images that keep different numbers of queries share a batch; `"auto"` is the best that there is.

        Raises:
            ValueError: If there is no such backend, or not on the model's device.
        """
        check_backend(backend)
        # Of the dtypes, the one that takes every backend: the model may yet run under autocast.
        resolve_backend(backend, self.cross_attention.queries.device, torch.bfloat16)
        self._ragged_backend = backend

    def ragged_backend_for(self, tokens: torch.Tensor) -> str:
        """`ragged_backend`, for tokens of this device and dtype.

        Raises:
            ValueError: If the backend that was asked for is not available there.
        """
        config, device = self.config, tokens.device
        autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
        requested = self._ragged_backend
        if config.trunk_attention == "block_causal":
            if requested == "varlen":
                raise ValueError("Expected a ragged backend that takes masks, grouped or masked, got 'varlen'.")
            requested = "grouped" if requested == "auto" else requested
        return resolve_backend(
            requested,
            device,
            torch.get_autocast_dtype(device.type) if autocast else tokens.dtype,
            config.hidden_size // config.num_attention_heads,
            config.attention_probs_dropout_prob if self.training else 0.0,
            config._attn_implementation or "sdpa",
        )

    def read(
        self, pixel_values: torch.Tensor, K: int, interpolate_pos_encoding: bool = False, need_weights: bool = False
    ) -> torch.Tensor:
        """Cross-attention outputs of the first K queries: (B, C, H, W) -> (B, K, D). The outputs do not depend on K."""
        return self.look(pixel_values, K, interpolate_pos_encoding, need_weights)[0]

    def look(
        self, pixel_values: torch.Tensor, K: int, interpolate_pos_encoding: bool = False, need_weights: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `read`, and the weights of the cross-attention, (B, H, K, N), if they are needed."""
        levels = len(self.config.query_spans(0, K))
        inputs, _ = self.embeddings(pixel_values, interpolate_pos_encoding, end=levels)
        return self.cross_attention(inputs, K, need_weights=need_weights)

    def begin(
        self,
        pixel_values: torch.Tensor,
        K: int | torch.Tensor,
        threshold: float | None = None,
        interpolate_pos_encoding: bool = False,
        need_weights: bool = False,
        masked: bool = False,
    ) -> ActiveTokens:
        """Read images and select queries: all before the trunk.

        Args:
            pixel_values: (B, C, H, W).
            K: The first K queries, for all images or for each, (B,).
            threshold: Threshold of the selection among them; None does not select.
            interpolate_pos_encoding: Take images of any multiple of the patch size.
            need_weights: Compute the weights of the cross-attention, for hooks that record them.
            masked: Keep the tokens dense, with a mask.
        """
        if not isinstance(K, torch.Tensor):
            y = self.read(pixel_values, K, interpolate_pos_encoding, need_weights)
            return self.select(y, threshold, masked)
        if len(K) != len(pixel_values):
            raise ValueError(f"Expected `num_active_queries` of {len(pixel_values)} images, got {len(K)}.")
        K = K.to(pixel_values.device)
        y = self.read_each(pixel_values, K, interpolate_pos_encoding, need_weights)
        keep = torch.arange(y.shape[1], device=y.device) < K[:, None]  # (B, K)
        if threshold is not None:
            keep = keep & select_queries(y.detach(), threshold, self.config.dqs_reference)
        return self.keep_queries(y, keep, masked)

    def read_each(
        self, pixel_values: torch.Tensor, K: torch.Tensor, interpolate_pos_encoding: bool, need_weights: bool
    ) -> torch.Tensor:
        """As `read`, with a K for each image; levels of a stem are computed for those images that need them."""
        most = int(K.max())
        spans = self.config.query_spans(0, most)
        if need_weights or len(spans) == 1:
            return self.read(pixel_values, most, interpolate_pos_encoding, need_weights)
        images, features, y = torch.arange(len(K), device=K.device), [pixel_values], None
        for level, first, end in spans:
            going_on = K[images] > first
            images, features = images[going_on], [x[going_on] for x in features]
            x = features[0] if level == 0 else features
            (tokens,), features = self.embeddings(x, interpolate_pos_encoding, level, level + 1)
            part, _ = self.cross_attention(tokens, query=torch.arange(first, end, device=K.device))
            if y is None:
                y = part.new_zeros(len(K), most, part.shape[-1])
            y = y.index_put((images[:, None], torch.arange(first, end, device=K.device)), part)
        assert y is not None
        return y

    def select(self, y: torch.Tensor, threshold: float | None, masked: bool = False) -> ActiveTokens:
        """Drop queries by their cross-attention outputs `y`, (B, K, D), and finish the block for those that stay."""
        if threshold is None:
            return ActiveTokens(self.cross_attention.finish(y))
        keep = select_queries(y.detach(), threshold, self.config.dqs_reference)
        return self.keep_queries(y, keep, masked)

    def keep_queries(self, y: torch.Tensor, keep: torch.Tensor, masked: bool = False) -> ActiveTokens:
        """Finish the cross-attention block for the queries that `keep`, (B, K) bool, marks."""
        backend = self.ragged_backend_for(y)
        if masked or backend == "masked":
            return ActiveTokens(self.cross_attention.finish(y), keep)
        return self.packed(y, PackedLayout.from_mask(keep, backend), keep)

    def packed(self, y: torch.Tensor, layout: PackedLayout, keep: torch.Tensor | None = None) -> ActiveTokens:
        """Finish the cross-attention block for the queries of a layout."""
        return ActiveTokens(self.cross_attention.finish(layout.pack(y), layout.query), keep, layout)

    def draw_paths(self, active: ActiveTokens) -> Sequence[torch.Tensor | None]:
        """Stochastic depth (Huang et al. 2016): for each block, the weights of its two branches for each image.

        With a probability that grows linearly to `config.drop_path_rate` in the last block, an image skips a branch;
        those that take it are scaled up for it. Drawn for all blocks at once, outside of them, so that the blocks are
        one piece of code to a compiler.

        Returns:
            (2, B, 1, 1) per block, or (2, T, 1) for packed tokens; None for all where nothing is dropped.
        """
        if self.config.drop_path_rate == 0 or not self.training:
            return [None] * len(self.layers)
        x, layout = active.tokens, active.layout
        rates = torch.linspace(0, self.config.drop_path_rate, self.config.num_hidden_layers, device=x.device)
        rates = rates[: len(self.layers), None, None]
        images = x.shape[0] if layout is None else layout.shape[0]
        survives = torch.rand(len(self.layers), 2, images, device=x.device) >= rates
        scales = (survives / (1 - rates)).to(x.dtype)
        return (scales[..., None, None] if layout is None else scales[..., layout.image, None]).unbind()

    def process(self, active: ActiveTokens, **record: bool) -> ActiveTokens:
        """The self-attention blocks."""
        x = active.tokens
        mask, layout = self.trunk_masks(active)
        for layer, path_scales in zip(self.layers, self.draw_paths(active), strict=True):
            x = layer(x, mask, layout, path_scales=path_scales, **record)
        return ActiveTokens(x, active.keep, active.layout)

    def trunk_masks(self, active: ActiveTokens) -> tuple[torch.Tensor | None, PackedLayout | None]:
        """What the blocks are told of who may read whom: a mask (B or 1, 1, K or 1, K) of dense tokens, a layout of packed ones."""
        if self.config.trunk_attention == "full":
            return active.mask, active.layout
        blocks = self.query_block(active.tokens.device)
        if active.layout is not None:
            return None, active.layout.causal(blocks)
        blocks = blocks[: active.tokens.shape[1]]
        mask = (blocks[:, None] >= blocks)[None, None]  # (1, 1, K, K)
        if self.training and self.config.block_drop_rate:
            alone = torch.rand(len(active.tokens), 1, 1, 1, device=blocks.device) < self.config.block_drop_rate
            mask = torch.where(alone, blocks[:, None] == blocks, mask)  # (B, 1, K, K)
        return (mask if active.mask is None else mask & active.mask), None

    def query_block(self, device: torch.device) -> torch.Tensor:
        """(Q,) the block of each query in a block-causal trunk."""
        ends = torch.tensor(self.config.block_ends, device=device)
        return torch.bucketize(torch.arange(self.config.num_queries, device=device), ends, right=True)

    def forward_passes(
        self, pixel_values: torch.Tensor, passes: Sequence[Pass], packed: bool | None = None
    ) -> list[torch.Tensor]:
        """What the output query reads in each of several passes.

        The queries' outputs do not depend on each other: patches, keys, values and cross-attention are computed once. The
        trunk runs once if it is block-causal and the passes are all images at ends of blocks, or if they are packed.

        Args:
            pixel_values: (B, C, H, W), normalised.
            passes: Which images at which budgets.
            packed: Run the trunk once on the packed batch of all passes, instead of once for each; None is on a GPU.

        Returns:
            For each pass (n, D), n being its images.

        Raises:
            ValueError: If the images or a budget are not as described.
        """
        knobs = [self.config.resolve(**p.budget.kwargs) for p in passes]
        K = [k["num_active_queries"] for k in knobs]
        y = self.read(pixel_values, max(K))
        if self.config.trunk_attention == "block_causal" and self.are_nested(passes, knobs):
            tokens = self.process(self.select(y, None)).tokens
            return [self.decode(ActiveTokens(tokens[:, :k])) for k in K]
        thresholds = [None if k["dqs_threshold"] == math.inf else k["dqs_threshold"] for k in knobs]
        parts = zip(passes, K, thresholds, strict=True)
        batches = [self.select(y[p.images, :k], t) for p, k, t in parts]
        backend = self.ragged_backend_for(y)
        packed = y.is_cuda if packed is None else packed
        if not packed or len(batches) == 1 or backend == "masked":
            return [self.decode(self.process(batch)) for batch in batches]
        pooled = self.decode(self.process(ActiveTokens.join(batches, backend)))
        return list(pooled.split([len(range(*p.images.indices(len(y)))) for p in passes]))

    def are_nested(self, passes: Sequence[Pass], knobs: Sequence[dict[str, Any]]) -> bool:
        """Whether passes are all images at ends of blocks, whose tokens a block-causal trunk has on the way to the last."""
        ends = {*self.config.block_ends, max(k["num_active_queries"] for k in knobs)}
        return all(
            k["dqs_threshold"] == math.inf and p.images == slice(None) and k["num_active_queries"] in ends
            for p, k in zip(passes, knobs, strict=True)
        )

    def decode(self, active: ActiveTokens) -> torch.Tensor:
        """What the output query reads from the active tokens, normalised: (B, D)."""
        assert self.decoder is not None
        if self.config.decoder_reads == "last_block":
            active = self.last_block(active)
        y, _ = self.decoder(active.tokens, mask=active.mask, layout=active.layout)
        pooled = self.norm(self.decoder.finish(y))[:, 0]  # (B, 1, D) -> (B, D)
        return pooled if active.layout is None else active.layout.unsort(pooled)

    def last_block(self, active: ActiveTokens) -> ActiveTokens:
        """The tokens of the last block of queries that each image uses."""
        K = active.tokens.shape[1] if active.layout is None else active.layout.shape[1]
        if active.layout is None and active.keep is None and isinstance(K, int):
            return ActiveTokens(active.tokens[:, self.config.first_decoded(K) :])
        keep, blocks = active.keep, self.query_block(active.tokens.device)[:K]
        if active.layout is not None:
            keep = torch.zeros(active.layout.shape, dtype=torch.bool, device=blocks.device)
            keep[active.layout.image, active.layout.query] = True
        elif keep is None:
            keep = torch.ones(active.tokens.shape[:2], dtype=torch.bool, device=blocks.device)
        last = torch.where(keep, blocks, -1).amax(1, keepdim=True)  # (B, 1)
        keep = keep & (blocks == last)
        if active.layout is None:
            return ActiveTokens(active.tokens, keep)
        layout = PackedLayout.from_mask(keep, active.layout.backend)
        return ActiveTokens(layout.pack(active.layout.unpack(active.tokens)), keep, layout)

    def active_queries(self, active: ActiveTokens) -> torch.Tensor:
        """(B, Q) bool: the queries that each image used."""
        keep = active.keep
        if keep is None:
            keep = torch.ones(active.tokens.shape[:2], dtype=torch.bool, device=active.tokens.device)
        return F.pad(keep, (0, self.config.num_queries - keep.shape[1]))


class VisualPerceiverPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and saving; what each class supports."""

    config: VisualPerceiverConfig
    config_class = VisualPerceiverConfig
    base_model_prefix = "visual_perceiver"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisualPerceiverEmbeddings", "VisualPerceiverCrossAttention", "VisualPerceiverLayer"]
    _input_embed_layer = "patch_embeddings"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": VisualPerceiverLayer,
        "attentions": VisualPerceiverSelfAttention,
        "cross_attentions": OutputRecorder(VisualPerceiverCrossAttention, index=1, layer_name="cross_attention"),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.config.initializer_range)

    @staticmethod
    def _load_pretrained_model(
        model: Any,
        state_dict: Any,
        checkpoint_files: list[str] | None,
        load_config: Any,
        expected_keys: list[str] | None = None,
    ) -> tuple[Any, Any]:
        """As transformers', then what it found to be of another size is adapted, if it can be."""
        info, offloaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )
        config, cfg = model.config, model.config.pretrained_cfg or {}
        for mismatch in sorted(info.mismatched_keys, key=str):
            name = mismatch[0]
            if not name.endswith(("embeddings.position_embeddings", "cross_attention.queries")):
                continue
            files = [state_dict] if state_dict is not None else map(load_state_dict, checkpoint_files or ())
            value = next(
                tensors[key] for tensors in files for key in tensors if key.endswith(name) or name.endswith(key)
            )
            try:
                value = adapt_checkpoint_tensor(name, value, config, cfg.get("input_size", ())[-2:])
            except ValueError:
                if load_config.ignore_mismatched_sizes:
                    continue  # a fresh one, as for all else
                raise
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            place = next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))
            before = getattr(module, attribute)
            if value.shape != before.shape:
                continue
            parameter: Any = nn.Parameter(value.to(place, before.dtype), requires_grad=before.requires_grad)
            parameter._is_hf_initialized = True
            setattr(module, attribute, parameter)
            info.mismatched_keys.discard(mismatch)
        return info, offloaded


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
        # torch's default, smaller than He's: with a batch norm behind it, a convolution of small weights learns faster.
        init.kaiming_uniform_(module.conv.weight, a=math.sqrt(5))
    elif isinstance(module, VisualPerceiverEmbeddings):
        init.trunc_normal_(module.position_embeddings, std=std)
        if module.config.query_init == "spatial":
            height, width = (side // module.config.patch_size for side in module.config.image_height_width)
            init.copy_(module.position_embeddings, token_features(height, width, module.config.hidden_size))
    elif isinstance(module, VisualPerceiverSelfAttention) and module.config.attention_init == "mimetic":
        qkv, proj = mimetic_attention(module.config.hidden_size, module.num_heads)
        init.copy_(module.qkv.weight, qkv)
        init.copy_(module.proj.weight, proj)
    elif isinstance(module, VisualPerceiverCrossAttention):
        init.trunc_normal_(module.queries, std=std)
        D, reads_image = module.config.hidden_size, module.queries.shape[0] == module.config.num_queries
        if module.config.query_init == "spatial" and reads_image and not module.queries.is_meta:
            grid = max(module.config.image_height_width) // module.config.patch_size
            init.copy_(module.queries, module.queries.detach().cpu() + query_features(len(module.queries), grid, D))
            # Scores are then those of similar positions.
            init.copy_(module.query.weight, torch.eye(D))
            weight = module.key_value.weight.detach().cpu().clone()
            weight[:D] = torch.eye(D)
            init.copy_(module.key_value.weight, weight)


class VisualPerceiverModel(VisualPerceiverPreTrainedModel, PerceiverParts):
    """The Visual Perceiver without a head.

    Example:
        >>> model = VisualPerceiverModel(VisualPerceiverConfig()).eval()
        >>> output = model(torch.zeros(2, 3, 32, 32), num_active_queries=16)
        >>> output.last_hidden_state.shape, output.pooler_output.shape
        (torch.Size([2, 16, 192]), torch.Size([2, 192]))
    """

    def __init__(self, config: VisualPerceiverConfig):
        super().__init__(config)
        self.build_parts(config)
        self.post_init()
        # transformers initialises modules that own parameters themselves; these two set those of their children.
        if not self.cross_attention.queries.is_meta:
            for module in self.modules():
                if isinstance(module, (ConvBlock, VisualPerceiverSelfAttention)):
                    self._init_weights(module)

    # `hidden_states[-1]` is the last block's output as it is, with the rows of removed queries not yet zeroed.
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        num_active_queries: int | torch.Tensor | None = None,
        dqs_threshold: float | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VisualPerceiverModelOutput:
        """Compute the tokens of the active queries and what the output query reads from them.

        Args:
            pixel_values: (B, C, H, W), normalised.
            num_active_queries: K in [1, Q]: use the first K queries; or a K for each image, (B,). None is the config's
                value, or Q.
            dqs_threshold: Drop, per image, each of those queries whose cross-attention output has a cosine above this
                with that of an earlier one (section 3.4); at least -1, and 1 keeps all. None is the config's value, or
                no selection; infinity is no selection whatever the config says. With hidden states or attentions asked for, all K run and the dropped are masked.
            interpolate_pos_encoding: Take images of any multiple of the patch size by resampling the positions.
            **kwargs: transformers' `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            ValueError: If the images, K or the threshold are not as described.
        """
        K, threshold = self.config.operating_point(num_active_queries, dqs_threshold)
        need_weights, need_states = (
            bool(getattr(self.config, name, False) if kwargs.get(name) is None else kwargs[name])
            for name in ("output_attentions", "output_hidden_states")
        )
        # Recorded tensors are dense, (B, K, ...), so recording takes the masked form.
        record = {"need_weights": True} if need_weights else {}
        masked = need_weights or need_states
        active = self.begin(pixel_values, K, threshold, interpolate_pos_encoding, need_weights, masked)
        active = self.process(active, **record)
        return VisualPerceiverModelOutput(
            last_hidden_state=active.dense(),
            pooler_output=self.decode(active),
            active_queries=self.active_queries(active),
        )


@dataclass
class IncrementalState:
    """Images that have been answered with some queries, and can be with more.

    With a block-causal trunk going on repeats nothing but queries of a block that was not complete. With the paper's, in
    which all queries see each other, the image is read once and the trunk runs anew.

    Attributes:
        parts: The network.
        head: The classifier.
        keys_and_values: Keys and values of the images' tokens, each (B, H, N, d), as the queries of the level read them.
        level: Level of the stem that has been computed.
        features: Those of that level, (B, C, h, w) of several resolutions, from which the next goes on.
        tokens: (B, K, D) after the cross-attention block.
        past: Keys and values of the K tokens in each block of the trunk, each (B, H, K, d); empty with the paper's trunk.
        processed: (B, K, D) tokens after the trunk.
        versions: Versions of the weights when the images were read.
    """

    parts: PerceiverParts
    head: nn.Module
    keys_and_values: KeysAndValues
    level: int
    features: list[torch.Tensor]
    tokens: torch.Tensor
    past: list[KeysAndValues]
    processed: torch.Tensor
    versions: tuple[tuple[int, int], ...]

    @classmethod
    @torch.no_grad()
    def read(cls, parts: PerceiverParts, head: nn.Module, pixel_values: torch.Tensor) -> "IncrementalState":
        """Read images; see `VisualPerceiverForImageClassification.start`."""
        cross = parts.cross_attention
        (inputs,), features = parts.embeddings(pixel_values)  # (B, N, D)
        none = inputs[:, :0]
        past: list[KeysAndValues] = []
        if parts.config.trunk_attention == "block_causal":
            heads = parts.config.num_attention_heads
            empty = none.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, 0, d)
            past = [(empty, empty)] * len(parts.layers)
        return cls(parts, head, cross.keys_and_values(inputs), 0, features, none, past, none, weight_versions(parts))

    @property
    def num_active_queries(self) -> int:
        """K so far; 0 before the first answer."""
        return self.tokens.shape[1]

    @torch.no_grad()
    def extend(self, num_active_queries: int | None = None) -> VisualPerceiverImageClassifierOutput:
        """Answer with the first K queries, or all, going on from those that there are.

        Raises:
            ValueError: If K is out of its range or smaller than before, or the weights have changed since.
        """
        parts, before = self.parts, self.num_active_queries
        K = parts.config.resolve(num_active_queries=num_active_queries)["num_active_queries"]
        if before > K:
            raise ValueError(f"Expected at least the {before} queries that there are, got {K}.")
        if weight_versions(parts) != self.versions:
            raise ValueError(
                "Expected the weights that read the images, got others: the model has changed; start anew."
            )
        if before < K:
            self.add(K)
        pooled = parts.decode(ActiveTokens(self.processed))
        active = parts.active_queries(ActiveTokens(self.processed))
        return VisualPerceiverImageClassifierOutput(logits=self.head(pooled), active_queries=active)

    def add(self, K: int) -> None:
        """Compute the tokens of the queries that are missing to the first K."""
        parts, cross, before = self.parts, self.parts.cross_attention, self.num_active_queries
        for level, first, end in parts.config.query_spans(before, K):
            if level > self.level:
                (inputs,), self.features = parts.embeddings(self.features, first=level, end=level + 1)
                self.keys_and_values, self.level = cross.keys_and_values(inputs), level
            new = torch.arange(first, end, device=self.tokens.device)
            y, _ = cross(self.keys_and_values, query=new)
            self.tokens = torch.cat([self.tokens, cross.finish(y, new)], dim=1)  # (B, K, D)
        if parts.config.trunk_attention == "full":
            self.processed = parts.process(ActiveTokens(self.tokens)).tokens
            return
        # Queries of a block see all of it, so a block that was cut off begins anew.
        start = max(end for end in [0, *parts.config.block_ends] if end <= before)
        blocks = parts.query_block(self.tokens.device)
        mask = (blocks[start:K, None] >= blocks[:K])[None, None]  # (1, 1, n, K)
        x = self.tokens[:, start:]
        for i, layer in enumerate(parts.layers):
            key, value = self.past[i]
            x, self.past[i] = layer(x, mask, past=(key[:, :, :start], value[:, :, :start]))
        self.processed = torch.cat([self.processed[:, :start], x], dim=1)

    def __getitem__(self, images: torch.Tensor) -> "IncrementalState":
        """The state of some of the images: (B,) bool or indices."""
        return replace(
            self,
            keys_and_values=(self.keys_and_values[0][images], self.keys_and_values[1][images]),
            features=[x[images] for x in self.features],
            tokens=self.tokens[images],
            past=[(key[images], value[images]) for key, value in self.past],
            processed=self.processed[images],
        )


def weight_versions(parts: PerceiverParts) -> tuple[tuple[int, int], ...]:
    """What changes when a weight does: its identity, and how often it was written to.

    Offloaded weights, which are new tensors each time they are used, are left out.
    """
    assert isinstance(parts, nn.Module)
    return tuple((id(p), 0 if p.is_inference() else p._version) for p in parts.parameters() if not p.is_meta)


OPTIMISE_AGAIN = "load a model with `image_size=...` (timm: `img_size=...`) and optimise that"


class OptimizedVisualPerceiver(nn.Module):
    """A classifier as `optimize_for_inference` makes it: a snapshot of the weights, called as the model is.

    Attributes:
        config: The model's.
        dtype: Dtype that it computes in.
        device: Where the images have to be.
    """

    def __init__(self, parts: PerceiverParts, head: nn.Module, **settings: Any):
        super().__init__()
        check_weights(parts)
        self.config, self.engine = copy.deepcopy(parts.config), create_engine(parts, head, **settings)
        self.dtype, self.device = self.engine.dtype, self.engine.device
        self.eval()

    def check_images(self, pixel_values: torch.Tensor) -> None:
        """Raise a `ValueError` unless the engine can read these images."""
        check_pixel_values(pixel_values, self.config, advice=OPTIMISE_AGAIN)
        if pixel_values.device != self.device:
            raise ValueError(f"Expected images on {self.device}, where the engine computes, got {pixel_values.device}.")

    def _apply(self, fn: Callable, recurse: bool = True) -> "OptimizedVisualPerceiver":
        raise RuntimeError("An optimised model stays as it is; move or convert the model, then optimise that.")

    def classify(
        self,
        pixel_values: torch.Tensor,
        num_active_queries: int | torch.Tensor | None = None,
        dqs_threshold: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, labels) and the active queries (B, Q)."""
        K, threshold = self.config.operating_point(num_active_queries, dqs_threshold)
        self.check_images(pixel_values)
        return self.engine(pixel_values, K, threshold)

    def start(self, pixel_values: torch.Tensor) -> Any:
        """Read images, to answer with few queries first and with more later, as the model's `start` does."""
        self.check_images(pixel_values)
        if hasattr(self.engine, "start"):
            return self.engine.start(pixel_values)
        return IncrementalState.read(self.engine.parts, self.engine.head, pixel_values.to(self.dtype))

    def forward(
        self,
        pixel_values: torch.Tensor,
        num_active_queries: int | torch.Tensor | None = None,
        dqs_threshold: float | None = None,
    ) -> VisualPerceiverImageClassifierOutput:
        """Classify images, as `VisualPerceiverForImageClassification` does, without gradients or recorded states."""
        logits, active = self.classify(pixel_values, num_active_queries, dqs_threshold)
        return VisualPerceiverImageClassifierOutput(logits=logits, active_queries=active)


class VisualPerceiverForImageClassification(VisualPerceiverPreTrainedModel, ElasticModel):
    """The Visual Perceiver with a linear classifier on the output query's token.

    Example:
        >>> config = VisualPerceiverConfig(num_labels=10)
        >>> model = VisualPerceiverForImageClassification(config).eval()
        >>> model(torch.zeros(2, 3, 32, 32), num_active_queries=8).logits.shape
        torch.Size([2, 10])
    """

    # The loss is a mean over the batch. Otherwise transformers' Trainer takes it for a share of what it accumulates, and
    # does not divide it by the number of batches.
    accepts_loss_kwargs = False

    def __init__(self, config: VisualPerceiverConfig):
        super().__init__(config)
        self.num_labels = len(config.label_names)
        self.visual_perceiver = VisualPerceiverModel(config)
        self.head = nn.Linear(config.hidden_size, self.num_labels) if self.num_labels > 0 else nn.Identity()
        self.post_init()

    @property
    def ragged_backend(self) -> str:
        """See `PerceiverParts.ragged_backend`.

        Example:
            >>> VisualPerceiverForImageClassification(VisualPerceiverConfig()).ragged_backend
            'grouped'
        """
        return self.visual_perceiver.ragged_backend

    def set_ragged_backend(self, backend: str = "auto") -> None:
        """See `PerceiverParts.set_ragged_backend`."""
        self.visual_perceiver.set_ragged_backend(backend)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_active_queries: int | torch.Tensor | None = None,
        dqs_threshold: float | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VisualPerceiverImageClassifierOutput:
        """Classify images at the compute budget that `num_active_queries` and `dqs_threshold` set.

        Args:
            pixel_values: (B, C, H, W), normalised.
            labels: (B,) class indices, -100 for images that do not count; or what the config's `problem_type` asks for, (B, labels).
            num_active_queries: As in `VisualPerceiverModel.forward`.
            dqs_threshold: As in `VisualPerceiverModel.forward`.
            interpolate_pos_encoding: As in `VisualPerceiverModel.forward`.
            **kwargs: transformers' `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            ValueError: If the images, K, the threshold or, on a CPU, the labels are not as described.
        """
        outputs = self.visual_perceiver(
            pixel_values,
            num_active_queries=num_active_queries,
            dqs_threshold=dqs_threshold,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **kwargs,
        )
        logits = self.head(outputs.pooler_output)
        loss = None
        if labels is not None:
            if self.config.problem_type in (None, "single_label_classification") and self.num_labels > 1:
                check_labels(labels, self.num_labels)
            loss = self.loss_function(labels, logits, self.config)
        return VisualPerceiverImageClassifierOutput(
            loss=loss,
            logits=logits,
            active_queries=outputs.active_queries,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )

    def forward_budgets(self, pixel_values: torch.Tensor, passes: Sequence[Pass]) -> list[torch.Tensor]:
        """The logits (n, labels) of each pass's n images: images are read once; see `PerceiverParts.forward_passes`.

        Example:
            >>> from hf_visual_perceiver.modeling.elastic import Budget
            >>> model = VisualPerceiverForImageClassification(VisualPerceiverConfig(num_labels=10)).eval()
            >>> full, half = model.forward_budgets(torch.zeros(2, 3, 32, 32), [Pass(), Pass(Budget(num_active_queries=32))])
            >>> half.shape
            torch.Size([2, 10])
        """
        pooled = self.visual_perceiver.forward_passes(pixel_values, passes, self.packs_passes)
        return [self.head(x) for x in pooled]

    @property
    def skips_parameters(self) -> bool:
        """Levels of a stem have no part in a small budget."""
        return self.config.num_levels > 1

    @property
    def stem(self) -> nn.Module:
        """What makes features of an image, before they are projected to tokens; a convolutional one can be trained alone."""
        return self.visual_perceiver.embeddings.patch_embeddings.stem

    def blocks(self) -> Iterable[nn.Module]:
        """The self-attention blocks."""
        return self.visual_perceiver.layers

    def as_graph(self, budget: Budget | None = None) -> GraphPlan:
        """A graph with t as an input, and K as another unless the budget fixes it; see `ElasticModel.as_graph`."""
        config = self.config
        K, t = config.operating_point()
        inputs, fixed = {"dqs_threshold": torch.tensor(1.0)}, {}
        if budget is None:
            inputs["num_active_queries"] = torch.tensor(config.num_queries)
        else:
            knobs = config.resolve(**budget.kwargs)
            if knobs["dqs_threshold"] != math.inf:
                raise ValueError(
                    f"Expected a budget of K, as t is an input of the graph, got {budget.short(config.knobs)}."
                )
            K = fixed["num_active_queries"] = knobs["num_active_queries"]
        facts = {
            "num_queries": config.num_queries,
            "num_active_queries": fixed.get("num_active_queries"),
            "default_num_active_queries": K,
            "default_dqs_threshold": 1.0 if t is None else t,
        }
        module = VisualPerceiverGraph(self, fixed.get("num_active_queries"))
        return GraphPlan(module, inputs, fixed, ("logits", "active_queries"), facts)

    @torch.inference_mode()
    def check_budgets(self, pixel_values: torch.Tensor) -> list[Budget]:
        """Several K, each without and with thresholds that lie clear of these images' cosines."""
        Q = self.config.num_queries
        cosines = cosine_similarities(self.visual_perceiver.read(pixel_values, Q))
        thresholds = [None, *(clear_threshold(cosines, t) for t in (0.6, 0.8, 0.95))]
        budgets = [*(K for K in (1, 2, 7, 16, 64) if Q > K), Q]
        return [Budget(num_active_queries=K, dqs_threshold=t) for K in budgets for t in thresholds]

    def forward_chosen(
        self, pixel_values: torch.Tensor, budgets: Sequence[Budget], choose: Callable[[torch.Tensor], torch.Tensor]
    ) -> VisualPerceiverImageClassifierOutput:
        """Classify each image at a budget that is chosen by what its queries have read.

        Args:
            pixel_values: (B, C, H, W), normalised.
            budgets: Ascending budgets that set K only.
            choose: Maps what the queries of the last budget read, (B, K, D), to places in `budgets`, (B,).
        """
        parts = self.visual_perceiver
        steps = [self.config.resolve(**budget.kwargs)["num_active_queries"] for budget in budgets]
        y = parts.read(pixel_values, steps[-1])
        K = torch.tensor(steps, device=y.device)[choose(y)]
        active = parts.process(parts.keep_queries(y, torch.arange(y.shape[1], device=y.device) < K[:, None]))
        return VisualPerceiverImageClassifierOutput(
            logits=self.head(parts.decode(active)), active_queries=parts.active_queries(active)
        )

    def look(self, pixel_values: torch.Tensor, budget: Budget | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """What the first K queries read, (B, K, D), and from where, (B, K, rows, columns): the mean over heads.

        Args:
            pixel_values: (B, C, H, W), normalised.
            budget: Sets K; None is all queries.
        """
        config = self.config
        y, weights = self.visual_perceiver.look(
            pixel_values, config.resolve(**(budget or Budget()).kwargs)["num_active_queries"]
        )
        assert weights is not None, "look needs them"
        rows, columns = (side // config.patch_size for side in config.image_height_width)
        return y, weights.mean(1).unflatten(-1, (rows, columns))  # (B, H, K, N) -> (B, K, h, w)

    def start(self, pixel_values: torch.Tensor) -> IncrementalState:
        """Read images, to answer with few queries first and with more later: `state.extend(K)`.

        Args:
            pixel_values: (B, C, H, W), normalised.

        Example:
            >>> config = VisualPerceiverConfig(num_labels=10, trunk_attention="block_causal")
            >>> model = VisualPerceiverForImageClassification(config).eval()
            >>> state = model.start(torch.zeros(2, 3, 32, 32))
            >>> few, more = state.extend(4), state.extend(16)  # 12 more queries; nothing is computed twice
            >>> torch.allclose(more.logits, model(torch.zeros(2, 3, 32, 32), num_active_queries=16).logits, atol=1e-5)
            True
        """
        return IncrementalState.read(self.visual_perceiver, self.head, pixel_values)

    def optimize_for_inference(
        self,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        num_threads: int | None = None,
        int8: bool | None = None,
    ) -> OptimizedVisualPerceiver:
        """A snapshot of this model that answers faster; later changes of this model do not reach it.

        Logits of onnxruntime are this model's to 1e-4 in float32. There are no gradients, hidden states or attentions.

        Args:
            dtype: Dtype to compute in, such as `torch.bfloat16` on CPUs that have it; None is the model's.
            backend: `"onnxruntime"`, which computes in float32 on CPUs, or `"torch"`, this model's own modules. None is
                onnxruntime where it can, if hf_visual_perceiver is imported.
            num_threads: Threads of onnxruntime; None is torch's number.
            int8: Have onnxruntime compute linears in 8 bits.

        Raises:
            ValueError: If the backend does not take the settings, weights are offloaded, or a linear has been replaced, as
                an adapter does until it is merged.
            ImportError: If onnxruntime is not installed.

        Example:
            >>> model = VisualPerceiverForImageClassification(VisualPerceiverConfig(num_labels=10)).eval()
            >>> fast = model.optimize_for_inference(backend="torch")
            >>> fast(torch.zeros(2, 3, 32, 32), num_active_queries=8).logits.shape
            torch.Size([2, 10])
        """
        settings = {"backend": backend, "num_threads": num_threads, "int8": int8 or None}
        return OptimizedVisualPerceiver(self.visual_perceiver, self.head, dtype=dtype, **settings)


class VisualPerceiverGraph(nn.Module):
    """A classifier whose knobs are tensors, so that a graph can have them as inputs.

    Args:
        model: The classifier; a copy of it is kept, in float32 and on the CPU.
        num_active_queries: K of a graph that has no such input.
    """

    def __init__(self, model: "VisualPerceiverForImageClassification", num_active_queries: int | None = None):
        super().__init__()
        self.model = reference_model(model).requires_grad_(False)
        # Fused attention cannot be exported with a dynamic number of queries before torch 2.15.
        self.model.set_attn_implementation("eager")
        self.num_active_queries = num_active_queries

    def forward(
        self, pixel_values: torch.Tensor, dqs_threshold: torch.Tensor, num_active_queries: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, labels) and the active queries (B, Q) bool.

        Args:
            pixel_values: (B, C, H, W), normalised.
            dqs_threshold: A float32 scalar; 1 keeps all.
            num_active_queries: An int64 scalar, unless K is fixed.
        """
        parts, Q = self.model.visual_perceiver, self.model.config.num_queries
        K: Any = self.num_active_queries
        if num_active_queries is not None:
            K = num_active_queries.clamp(1, Q).item()
            torch._check(K >= 1)
            torch._check(K <= Q)
        if num_active_queries is None or self.model.config.num_levels == 1:
            y = parts.read(pixel_values, K)  # (B, K, D)
        else:  # how many levels K asks for is not a fixed piece of graph, so all are computed
            y = parts.read(pixel_values, Q)[:, :K]
        too_similar = cosine_similarities(y) > dqs_threshold  # (B, K, K)
        # To Q, so that the rule is a fixed piece of graph; what is not there is similar to nothing.
        keep = keep_dissimilar(F.pad(too_similar, (0, Q - K, 0, Q - K)), self.model.config.dqs_reference)[:, :K]
        active = parts.process(parts.keep_queries(y, keep, masked=True))
        return self.model.head(parts.decode(active)), parts.active_queries(active)


def clear_threshold(cosines: torch.Tensor, threshold: float, reach: float = 0.01) -> float:
    """The middle of the widest gap between cosines near `threshold`, so that rounding cannot tip a query over it.

    Args:
        cosines: What is compared with the threshold.
        threshold: From 1 on it stays as it is.
        reach: How far from it to look.

    Example:
        >>> round(clear_threshold(torch.tensor([0.5, 0.795, 0.8, 0.806]), 0.8), 4)
        0.803
    """
    if threshold >= 1:
        return threshold
    near = cosines.double().flatten()
    near = near[(near - threshold).abs() < reach].sort().values
    edges = torch.cat([near.new_tensor([threshold - reach]), near, near.new_tensor([threshold + reach])])
    widest = edges.diff().argmax()
    return ((edges[widest] + edges[widest + 1]) / 2).item()


def check_weights(parts: PerceiverParts) -> None:
    """Raise a `ValueError` if weights cannot be copied, or a linear's do not say what it does, as it is of another class."""
    assert isinstance(parts, nn.Module)
    without = [name for name, p in parts.named_parameters() if p.is_meta]
    if without:
        raise ValueError(
            f"Expected weights in memory, got meta tensors such as {without[0]}: optimise before offloading, and what is loaded."
        )
    names = {"query", "key_value", "qkv", "proj", "fc1", "fc2"}
    for path, module in parts.named_modules():
        if path.rpartition(".")[2] in names and not isinstance(module, nn.Linear):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise ValueError(f"Expected plain linears, got {kind} at {path}; merge adapters before optimising.")


def check_labels(labels: torch.Tensor, num_labels: int) -> None:
    """Raise a `ValueError` for class indices outside [0, num_labels) that are not -100, which the loss ignores.

    Only where looking is free: on an accelerator it would make the host wait, and under compile break the graph.
    """
    if labels.is_floating_point() or labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    labels = labels[labels != -100]
    if labels.numel() and not (labels.min() >= 0 and labels.max() < num_labels):
        raise ValueError(
            f"Expected labels in [0, {num_labels}), got values from {labels.min().item()} to {labels.max().item()}; "
            "only -100 is ignored."
        )


__all__ = [
    "OptimizedVisualPerceiver",
    "VisualPerceiverForImageClassification",
    "VisualPerceiverModel",
    "VisualPerceiverPreTrainedModel",
]
