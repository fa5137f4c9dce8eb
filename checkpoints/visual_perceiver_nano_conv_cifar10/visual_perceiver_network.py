"""The network of a Visual Perceiver, which transformers' and timm's classes share.

Shapes: B images, K active queries, Q learned queries, D width, T tokens of a packed batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_visual_perceiver import VisualPerceiverConfig
from .elastic import Pass
from .query_selection import select_queries
from .ragged import PackedLayout, check_backend, resolve_backend
from .visual_perceiver_layers import VisualPerceiverCrossAttention, VisualPerceiverEmbeddings, VisualPerceiverLayer


@dataclass(frozen=True)
class DenseTokens:
    """Tokens (B, K, D) on their way through the network; `keep`, (B, K) bool or None for all, marks those that count."""

    tokens: torch.Tensor
    keep: torch.Tensor | None = None
    layout: ClassVar[None] = None

    @property
    def mask(self) -> torch.Tensor | None:
        """(B, 1, 1, K) bool, the keys that attention may read; None if it may read all."""
        return None if self.keep is None else self.keep[:, None, None, :]

    def kept(self) -> torch.Tensor:
        """(B, K) bool, the queries that each image uses."""
        x = self.tokens
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if self.keep is None else self.keep

    def dense(self) -> torch.Tensor:
        """(B, K, D), rows of removed queries zero."""
        return self.tokens if self.keep is None else self.tokens * self.keep[..., None]

    def only(self, keep: torch.Tensor) -> "DenseTokens":
        """The tokens that `keep`, (B, K) bool, marks."""
        return DenseTokens(self.tokens, keep)

    def packed(self, backend: str) -> "PackedTokens":
        """The packed form, for a ragged backend."""
        assert self.keep is None, "masked tokens are a reference and are not packed"
        B, K, _ = self.tokens.shape
        return PackedTokens(self.tokens.flatten(0, 1), PackedLayout.prefix(B, K, self.tokens.device, backend))


@dataclass(frozen=True)
class PackedTokens:
    """Tokens (T, D) without the removed ones; the methods do what those of `DenseTokens` do."""

    tokens: torch.Tensor
    layout: PackedLayout
    mask: ClassVar[None] = None

    def kept(self) -> torch.Tensor:
        keep = torch.zeros(self.layout.shape, dtype=torch.bool, device=self.tokens.device)
        keep[self.layout.image, self.layout.query] = True
        return keep

    def dense(self) -> torch.Tensor:
        return self.layout.unpack(self.tokens)

    def only(self, keep: torch.Tensor) -> "PackedTokens":
        layout = PackedLayout.from_mask(keep, self.layout.backend)
        return PackedTokens(layout.pack(self.dense()), layout)

    def packed(self, backend: str) -> "PackedTokens":
        return self

    @staticmethod
    def join(batches: Sequence["ActiveTokens"], backend: str) -> "PackedTokens":
        """Pack several batches into one, whose images follow each other."""
        packed = [batch.packed(backend) for batch in batches]
        layout = PackedLayout.join([batch.layout for batch in packed])
        return PackedTokens(torch.cat([batch.tokens for batch in packed]), layout)


ActiveTokens: TypeAlias = DenseTokens | PackedTokens


class PerceiverNetwork:
    """The network, mixed into transformers' and timm's model classes: build, read, select, process, decode."""

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
        """How images that keep different numbers of queries share a batch on this device, in this dtype or autocast.

        `"varlen"`, `"grouped"` or `"masked"`, see `ragged.py`; `set_ragged_backend` chooses one.
        """
        return self.ragged_backend_for(self.cross_attention.queries)

    def set_ragged_backend(self, backend: str = "auto") -> None:
        """Choose how images that keep different numbers of queries share a batch; `"auto"` is the best one available.

        Raises:
            ValueError: If there is no such backend, or it is not available on the model's device.
        """
        check_backend(backend)
        # All backends take bfloat16, in which the model may later run under autocast.
        resolve_backend(backend, self.cross_attention.queries.device, torch.bfloat16)
        self._ragged_backend = backend

    def ragged_backend_for(self, tokens: torch.Tensor) -> str:
        """`ragged_backend` for the device and dtype of these tokens.

        Raises:
            ValueError: If the chosen backend is not available there.
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
        """Cross-attention outputs of the first K queries, which do not depend on K: (B, C, H, W) -> (B, K, D)."""
        return self.look(pixel_values, K, interpolate_pos_encoding, need_weights)[0]

    def look(
        self, pixel_values: torch.Tensor, K: int, interpolate_pos_encoding: bool = False, need_weights: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The result of `read`, and the weights of the cross-attention, (B, H, K, N), if `need_weights`."""
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
        """Read images and select queries; `process` continues with the result.

        Args:
            pixel_values: (B, C, H, W).
            K: Use the first K queries; an integer, or (B,) with a K for each image.
            threshold: Threshold of the selection among them; None does not select.
            interpolate_pos_encoding: Allow images of any multiple of the patch size.
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
        """`read` with a K for each image; a level of the stem runs only on the images that need it."""
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
        """Select queries by their cross-attention outputs `y`, (B, K, D), and finish the block for them."""
        if threshold is None:
            return DenseTokens(self.cross_attention.finish(y))
        keep = select_queries(y.detach(), threshold, self.config.dqs_reference)
        return self.keep_queries(y, keep, masked)

    def keep_queries(self, y: torch.Tensor, keep: torch.Tensor, masked: bool = False) -> ActiveTokens:
        """Finish the cross-attention block for the queries that `keep`, (B, K) bool, marks."""
        backend = self.ragged_backend_for(y)
        if masked or backend == "masked":
            return DenseTokens(self.cross_attention.finish(y), keep)
        layout = PackedLayout.from_mask(keep, backend)
        return PackedTokens(self.cross_attention.finish(layout.pack(y), layout.query), layout)

    def draw_paths(self, active: ActiveTokens) -> Sequence[torch.Tensor | None]:
        """Stochastic depth (Huang et al. 2016): for each block, random weights of its two branches for each image.

        An image skips a branch with a probability that grows linearly to `config.drop_path_rate` in the last block, and the
        branches that run are scaled up. The weights are drawn outside of the blocks, so that a compiler sees equal blocks.

        Returns:
            (2, B, 1, 1) per block, or (2, T, 1) for packed tokens; None per block if nothing is dropped.
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
        """Run the self-attention blocks."""
        x = active.tokens
        mask, layout = self.trunk_masks(active)
        for layer, path_scales in zip(self.layers, self.draw_paths(active), strict=True):
            x = layer(x, mask, layout, path_scales=path_scales, **record)
        return replace(active, tokens=x)

    def trunk_masks(self, active: ActiveTokens) -> tuple[torch.Tensor | None, PackedLayout | None]:
        """The mask (B or 1, 1, K or 1, K) of the blocks for dense tokens, or their layout for packed ones."""
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
        """Run several passes over a batch and decode each.

        Patches and cross-attention are computed once, as queries do not depend on each other. The trunk runs once if the
        passes are packed, or if it is block-causal and every pass takes all images at the end of a block.

        Args:
            pixel_values: (B, C, H, W), normalised.
            passes: Which images at which budgets.
            packed: Run the trunk once on the packed batch of all passes, instead of once for each; None does so on a GPU.

        Returns:
            (n, D) for each pass of n images.

        Raises:
            ValueError: If the images or a budget are not as described.
        """
        knobs = [self.config.resolve(**p.budget.kwargs) for p in passes]
        K = [k["num_active_queries"] for k in knobs]
        y = self.read(pixel_values, max(K))
        if self.config.trunk_attention == "block_causal" and self.are_nested(passes, knobs):
            tokens = self.process(self.select(y, None)).tokens
            return [self.decode(DenseTokens(tokens[:, :k])) for k in K]
        thresholds = [None if k["dqs_threshold"] == math.inf else k["dqs_threshold"] for k in knobs]
        parts = zip(passes, K, thresholds, strict=True)
        batches = [self.select(y[p.images, :k], t) for p, k, t in parts]
        backend = self.ragged_backend_for(y)
        packed = y.is_cuda if packed is None else packed
        if not packed or len(batches) == 1 or backend == "masked":
            return [self.decode(self.process(batch)) for batch in batches]
        pooled = self.decode(self.process(PackedTokens.join(batches, backend)))
        return list(pooled.split([len(range(*p.images.indices(len(y)))) for p in passes]))

    def are_nested(self, passes: Sequence[Pass], knobs: Sequence[dict[str, Any]]) -> bool:
        """Whether every pass takes all images at the end of a block, so that one run of a block-causal trunk serves all."""
        ends = {*self.config.block_ends, max(k["num_active_queries"] for k in knobs)}
        return all(
            k["dqs_threshold"] == math.inf and p.images == slice(None) and k["num_active_queries"] in ends
            for p, k in zip(passes, knobs, strict=True)
        )

    def decode(self, active: ActiveTokens) -> torch.Tensor:
        """The output query's token after it reads the active tokens, normalised: (B, D)."""
        assert self.decoder is not None
        if self.config.decoder_reads == "last_block":
            active = self.last_block(active)
        y, _ = self.decoder(active.tokens, mask=active.mask, layout=active.layout)
        pooled = self.norm(self.decoder.finish(y))[:, 0]  # (B, 1, D) -> (B, D)
        return pooled if active.layout is None else active.layout.unsort(pooled)

    def last_block(self, active: ActiveTokens) -> ActiveTokens:
        """The tokens of the last block of queries that each image uses."""
        if isinstance(active, DenseTokens) and active.keep is None and isinstance(K := active.tokens.shape[1], int):
            return DenseTokens(active.tokens[:, self.config.first_decoded(K) :])
        keep = active.kept()  # (B, K)
        blocks = torch.where(keep, self.query_block(keep.device)[: keep.shape[1]], -1)
        return active.only(keep & (blocks == blocks.amax(1, keepdim=True)))

    def active_queries(self, active: ActiveTokens) -> torch.Tensor:
        """(B, Q) bool, the queries that each image uses."""
        keep = active.kept()
        return F.pad(keep, (0, self.config.num_queries - keep.shape[1]))
