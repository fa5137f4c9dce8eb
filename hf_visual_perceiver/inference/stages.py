"""The Visual Perceiver in stages that `onnx_graphs.py` exports: cross-attention, selection, trunk, extension.

Cross-attention is one stage if all queries run at once. To add queries later, a further stage runs them on the tokens
that the first one returned.

The arithmetic is that of `modeling/modeling_visual_perceiver.py`, on the same modules, written for a short graph. The
queries that an image uses are passed as indices, so that one graph serves every budget, selection and padding.

Shapes: B images, N tokens, Q queries, k of them in a call, P before it, D width, H heads, d = D / H, L blocks.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hf_visual_perceiver.inference.onnx_graphs import Stage
from hf_visual_perceiver.modeling import VisualPerceiverConfig
from hf_visual_perceiver.modeling.query_selection import cosine_similarities


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(n, k, D) -> (n, H, k, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention written out: (n, H, k, d) x 3 -> (n, k, D); `bias` is added to the scores."""
    scores = (query @ key.transpose(2, 3)) * scaling
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


class PerceiverStage(nn.Module):
    """A stage that holds the network, with the parameter names of a classifier's state dict."""

    block: torch.Tensor  # (Q,) index of each query's block in a block-causal trunk

    def __init__(self, parts: Any, head: nn.Module):
        super().__init__()
        self.visual_perceiver, self.head = parts, head
        self.config: VisualPerceiverConfig = parts.config
        ends = torch.tensor(self.config.block_ends)
        block = torch.bucketize(torch.arange(self.config.num_queries), ends, right=True)
        self.register_buffer("block", block, persistent=False)

    def tokens(self, embedded: torch.Tensor) -> torch.Tensor:
        """Prepare a level's tokens (B, N, D): normalise them; with several heads, make keys and values (B, N, 2 D)."""
        cross = self.visual_perceiver.cross_attention
        inputs = cross.norm_inputs(embedded)
        return inputs if cross.num_heads == 1 else cross.key_value(inputs)

    def ask(self, tokens: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Compute cross-attention outputs (n, k, D) of the queries (k,) from the output of `tokens` for n images."""
        cross, D = self.visual_perceiver.cross_attention, self.config.hidden_size
        queries = cross.query(cross.norm_queries(F.embedding(query, cross.queries)[None]))  # (1, k, D)
        if cross.num_heads == 1:
            # q . (W_k x) = (W_k^T q) . x, and the sum of a (W_v x) is W_v times that of a x: no token needs a key or a value.
            # The key's bias adds the same constant to all scores of a query, which the softmax cancels.
            key_weight, value_weight = cross.key_value.weight.split(D)
            read = attend(split_heads(queries @ key_weight, 1), tokens[:, None], tokens[:, None], cross.scaling)
            bias = None if cross.key_value.bias is None else cross.key_value.bias[D:]
            return F.linear(read, value_weight, bias)
        key, value = (split_heads(part, cross.num_heads) for part in tokens.split(D, -1))
        return attend(split_heads(queries, cross.num_heads), key, value, cross.scaling)

    def finish(self, y: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Run the rest of the cross-attention block: (n, k, D) of the queries (n, k) or (k,) -> (n, k, D)."""
        cross = self.visual_perceiver.cross_attention
        x = F.embedding(query, cross.queries) + cross.proj(y)
        return x + cross.mlp(cross.norm(x))

    def answer(self, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Run the decoder, its norm and the head: the decoder's keys and values (n, H, k, d) -> (n, labels)."""
        decoder = self.visual_perceiver.decoder
        query = split_heads(decoder.query(decoder.norm_queries(decoder.queries[None])), decoder.num_heads)
        x = decoder.queries + decoder.proj(attend(query, key, value, decoder.scaling, bias))
        x = x + decoder.mlp(decoder.norm(x))
        return self.head(self.visual_perceiver.norm(x))[:, 0]

    def keys_and_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the decoder's keys and values: (n, k, D) -> (n, H, k, d) x 2."""
        decoder = self.visual_perceiver.decoder
        key, value = decoder.key_value(decoder.norm_inputs(x)).split(self.config.hidden_size, -1)
        return split_heads(key, decoder.num_heads), split_heads(value, decoder.num_heads)


class ReadStage(PerceiverStage):
    """Cross-attention: a level's prepared tokens (B, N, D or 2 D) and queries (k,) of that level -> (B, k, D)."""

    def forward(self, tokens: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return self.ask(tokens, query)


class LevelStage(PerceiverStage):
    """A level of the stem, and what queries (k,) of it read.

    Images (B, C, H, W), or the packed features of the level before, to cross-attention outputs (B, k, D), what further
    queries of the level can read (B, N, D or 2 D), and unless it is the last its features.
    """

    def __init__(self, parts: Any, head: nn.Module, level: int):
        super().__init__(parts, head)
        self.level = level

    def forward(self, x: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, ...]:
        embeddings = self.visual_perceiver.embeddings
        before = self.unpacked(x) if self.level else x
        (tokens,), features = embeddings(before, first=self.level, end=self.level + 1)
        tokens = self.tokens(tokens)
        y = self.ask(tokens, query)
        return (y, tokens) if self.level == self.config.num_levels - 1 else (y, tokens, packed(features))

    def unpacked(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Features of the level before, each (B, C, h, w), from (B, their number) as `packed` makes it."""
        size = self.config.patch_size
        rows, columns = (side // size for side in self.config.image_height_width)
        inputs = self.visual_perceiver.embeddings.levels[self.level - 1].inputs
        shapes = [(channels, finer * rows, finer * columns) for channels, finer in inputs]
        ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
        # Slices, as ONNX Runtime's quantization does not know how large the parts of a split are.
        parts = [x[:, start:end] for start, end in itertools.pairwise([0, *ends])]
        return [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]


def packed(features: Sequence[torch.Tensor]) -> torch.Tensor:
    """Features of several resolutions, each (B, C, h, w), as one tensor, whose parts are copied as they lie in memory."""
    return torch.cat([x.flatten(1) for x in features], dim=1)


class SelectStage(nn.Module):
    """Which queries are kept at a threshold if compared with all earlier ones: (B, k, D) -> (B, k) bool."""

    def forward(self, y: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        place = torch.arange(y.shape[1], device=y.device)
        # The rule of `keep_dissimilar` with the reference "all".
        too_similar = (cosine_similarities(y) > threshold) & (place[:, None] > place)
        return ~too_similar.any(-1)


class TrunkStage(PerceiverStage):
    """Logits (n, labels) from tokens `y`, (n, k, D), of queries (n, k); `keep`, (n, k), marks those that count."""

    def forward(self, y: torch.Tensor, query: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        x = self.finish(y, query)
        seen = keep[:, None, None, :]  # (n, 1, 1, k)
        bias = decoder_bias = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        if self.config.trunk_attention == "block_causal":
            block = self.block[query]  # (n, k)
            earlier = block[:, None, :, None] >= block[:, None, None, :]
            bias = torch.where(seen & earlier, 0.0, torch.finfo(torch.float32).min)
        if self.config.decoder_reads == "last_block":
            blocks = torch.where(keep, self.block[query], -1)  # (n, k)
            last = blocks == blocks.amax(1, keepdim=True)
            decoder_bias = torch.where((keep & last)[:, None, None, :], 0.0, torch.finfo(torch.float32).min)
        for layer in self.visual_perceiver.layers:
            attention, H = layer.attention, layer.attention.num_heads
            parts = attention.qkv(layer.norm1(x)).split(self.config.hidden_size, -1)
            query, key, value = (split_heads(part, H) for part in parts)
            x = x + attention.proj(attend(query, key, value, attention.scaling, bias))
            x = x + layer.mlp(layer.norm2(x))
        return self.answer(*self.keys_and_values(x), decoder_bias)


class ExtendStage(PerceiverStage):
    """Logits of a block-causal trunk that continues from earlier queries.

    Maps the tokens `y`, (n, k, D), of the new queries (k,), and the keys and values of the P earlier ones in each block
    and the decoder, (n, 2 (L + 1), H, P, d), to logits (n, labels) and the keys and values of all P + k.
    """

    def forward(self, y: torch.Tensor, query: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.finish(y, query)
        reach = torch.arange(past.shape[3] + y.shape[1], device=y.device)
        seen = self.block[query][:, None] >= self.block[reach]  # (k, P + k)
        bias = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        kept = []
        for i, layer in enumerate(self.visual_perceiver.layers):
            attention, H = layer.attention, layer.attention.num_heads
            new = attention.qkv(layer.norm1(x)).split(self.config.hidden_size, -1)
            queries, key, value = (split_heads(part, H) for part in new)
            key, value = torch.cat([past[:, 2 * i], key], dim=2), torch.cat([past[:, 2 * i + 1], value], dim=2)
            kept += [key, value]
            x = x + attention.proj(attend(queries, key, value, attention.scaling, bias))
            x = x + layer.mlp(layer.norm2(x))
        key, value = self.keys_and_values(x)
        key, value = torch.cat([past[:, -2], key], dim=2), torch.cat([past[:, -1], value], dim=2)
        read = None
        if self.config.decoder_reads == "last_block":
            read = torch.where(self.block[reach] == self.block[reach[-1:]], 0.0, torch.finfo(torch.float32).min)
        return self.answer(key, value, read), torch.stack([*kept, key, value], dim=1)


def stages_of(parts: Any, head: nn.Module) -> dict[str, Stage]:
    """Create the stages of a network.

    They are one `level_i` per level of the stem, `read`, `select` if queries are compared with all earlier ones,
    `trunk`, and `extend` if the trunk is block-causal.
    """
    config: VisualPerceiverConfig = parts.config
    D, H, L, N = config.hidden_size, config.num_attention_heads, config.num_hidden_layers, config.num_patches
    n, k, p = 3, min(5, config.num_queries), 2
    x = torch.zeros(n, config.num_channels, *config.image_height_width)
    tokens, places = torch.zeros(n, k, D), torch.arange(k)
    images, of_image = {0: "images"}, {0: "images", 1: "queries"}
    stages = {}
    for level in range(config.num_levels):
        last = level == config.num_levels - 1
        stages[f"level_{level}"] = Stage(
            LevelStage(parts, head, level),
            {"x": x, "query": places},
            {"x": images, "query": {0: "queries"}},
            ("y", "tokens") if last else ("y", "tokens", "features"),
        )
        if not last:
            with torch.no_grad():
                x = stages[f"level_{level}"].module(x, places)[2]
    stages["read"] = Stage(
        ReadStage(parts, head),
        {"tokens": torch.zeros(n, N, D if config.num_cross_attention_heads == 1 else 2 * D), "query": places},
        {"tokens": images, "query": {0: "queries"}},
        ("y",),
    )
    if config.dqs_reference == "all":
        stages["select"] = Stage(
            SelectStage(), {"y": tokens, "threshold": torch.tensor(0.5)}, {"y": of_image, "threshold": {}}, ("keep",)
        )
    stages["trunk"] = Stage(
        TrunkStage(parts, head),
        {"y": tokens, "query": places.repeat(n, 1), "keep": torch.ones(n, k, dtype=torch.bool)},
        {"y": of_image, "query": of_image, "keep": of_image},
        ("logits",),
    )
    if config.trunk_attention == "block_causal":
        stages["extend"] = Stage(
            ExtendStage(parts, head),
            {"y": tokens, "query": places, "past": torch.zeros(n, 2 * (L + 1), H, p, D // H)},
            {"y": of_image, "query": {0: "queries"}, "past": {0: "images", 3: "earlier"}},
            ("logits", "past_and_new"),
        )
    return stages
