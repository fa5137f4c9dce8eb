"""Outputs of the Visual Perceiver, and its incremental inference."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput

from .visual_perceiver_layers import KeysAndValues
from .visual_perceiver_network import DenseTokens, PerceiverNetwork


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


@dataclass
class IncrementalState:
    """Images that were classified with some queries, and can be classified again with more.

    A block-causal trunk repeats only the queries of an incomplete block. The paper's trunk, in which all queries see each
    other, repeats all of them; the image is read once.

    Attributes:
        parts: The network.
        owner: The model or engine; its `head` classifies.
        keys_and_values: Keys and values of the images' tokens at this level, each (B, H, N, d).
        level: The last level of the stem that was computed.
        features: Features of that level, (B, C, h, w) of several resolutions, which the next level reads.
        tokens: (B, K, D) after the cross-attention block.
        past: Keys and values of the K tokens in each block of the trunk, each (B, H, K, d); empty with the paper's trunk.
        processed: (B, K, D) tokens after the trunk.
        weights: What the network consisted of when the images were read.
    """

    parts: PerceiverNetwork
    owner: Any
    keys_and_values: KeysAndValues
    level: int
    features: list[torch.Tensor]
    tokens: torch.Tensor
    past: list[KeysAndValues]
    processed: torch.Tensor
    weights: "WeightSnapshot"

    @classmethod
    @torch.no_grad()
    def read(cls, parts: PerceiverNetwork, owner: Any, pixel_values: torch.Tensor) -> "IncrementalState":
        """Read images; see `VisualPerceiverForImageClassification.start`."""
        cross = parts.cross_attention
        (inputs,), features = parts.embeddings(pixel_values)  # (B, N, D)
        none = inputs[:, :0]
        past: list[KeysAndValues] = []
        if parts.config.trunk_attention == "block_causal":
            heads = parts.config.num_attention_heads
            empty = none.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, 0, d)
            past = [(empty, empty)] * len(parts.layers)
        weights = WeightSnapshot(parts, owner.head)
        return cls(parts, owner, cross.keys_and_values(inputs), 0, features, none, past, none, weights)

    @property
    def num_active_queries(self) -> int:
        """K so far; 0 before the first answer."""
        return self.tokens.shape[1]

    @torch.no_grad()
    def extend(self, num_active_queries: int | None = None) -> VisualPerceiverImageClassifierOutput:
        """Classify with the first K queries, or all, of which the earlier ones are not repeated.

        Raises:
            ValueError: If K is out of its range, not the same for all images or smaller than before, or the model has
                changed.
        """
        parts, before = self.parts, self.num_active_queries
        K = parts.config.queries_of_all(num_active_queries, least=before)
        if not self.weights.are_those_of(parts, self.owner.head):
            raise ValueError(
                "Expected the weights that read the images, got others: the model has changed; call `start` again."
            )
        if before < K:
            self.add(K)
        pooled = parts.decode(DenseTokens(self.processed))
        active = parts.active_queries(DenseTokens(self.processed))
        return VisualPerceiverImageClassifierOutput(logits=self.owner.head(pooled), active_queries=active)

    def add(self, K: int) -> None:
        """Compute the missing tokens of the first K queries."""
        parts, cross, before = self.parts, self.parts.cross_attention, self.num_active_queries
        for level, first, end in parts.config.query_spans(before, K):
            if level > self.level:
                (inputs,), self.features = parts.embeddings(self.features, first=level, end=level + 1)
                self.keys_and_values, self.level = cross.keys_and_values(inputs), level
            new = torch.arange(first, end, device=self.tokens.device)
            y, _ = cross(self.keys_and_values, query=new)
            self.tokens = torch.cat([self.tokens, cross.finish(y, new)], dim=1)  # (B, K, D)
        if parts.config.trunk_attention == "full":
            self.processed = parts.process(DenseTokens(self.tokens)).tokens
            return
        # Queries see all of their block, so an incomplete block is repeated.
        start = max(end for end in [0, *parts.config.block_ends] if end <= before)
        blocks = parts.query_block(self.tokens.device)
        mask = (blocks[start:K, None] >= blocks[:K])[None, None]  # (1, 1, n, K)
        x = self.tokens[:, start:]
        for i, layer in enumerate(parts.layers):
            key, value = self.past[i]
            x, self.past[i] = layer(x, mask, past=(key[:, :, :start], value[:, :, :start]))
        self.processed = torch.cat([self.processed[:, :start], x], dim=1)

    def __getitem__(self, images: torch.Tensor) -> "IncrementalState":
        """The state of some of the images, given as (B,) bool or as indices."""
        return replace(
            self,
            keys_and_values=(self.keys_and_values[0][images], self.keys_and_values[1][images]),
            features=[x[images] for x in self.features],
            tokens=self.tokens[images],
            past=[(key[images], value[images]) for key, value in self.past],
            processed=self.processed[images],
        )


class WeightSnapshot:
    """Modules, weights and statistics at one moment, to notice later changes: writes, replacements, another dtype or device.

    Offloaded tensors are left out, as they are new at each use. torch does not count writes in place to `.data`.

    Args:
        *roots: Modules, which are taken with all that is in them.
    """

    def __init__(self, *roots: Any):
        self.roots = roots
        modules = [module for root in roots for module in root.modules()]
        self.children = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self.tensors = [
            (slots, name, tensor, *state_of(tensor))
            for m in modules
            for slots in (m._parameters, m._buffers)
            for name, tensor in slots.items()
            if tensor is not None and not tensor.is_meta
        ]

    def are_those_of(self, *roots: Any) -> bool:
        """Whether the roots are the same, and nothing in them has changed."""
        # Slots are looked up one by one, as walking through the modules would take longer than a small network.
        return (
            all(a is b for a, b in zip(self.roots, roots, strict=True))
            and all(slots.get(name) is child for slots, name, child in self.children)
            and all(
                slots.get(name) is tensor and state_of(tensor) == (version, place)
                for slots, name, tensor, version, place in self.tensors
            )
        )


def state_of(tensor: torch.Tensor) -> tuple[int, int]:
    """The number of writes to a tensor, and its address in memory, which assignments to `.data` and `.to` change."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter)  # others may have no memory of their own
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr() if plain else 0
