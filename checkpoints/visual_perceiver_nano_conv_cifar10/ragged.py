"""Packed batches: images that keep different numbers of tokens, laid end to end without padding.

Linears, norms and MLPs process one (T, D) tensor; T is the number of tokens that all images keep. Only attention needs to
know the image of each token. It has two backends (see docs/inference.md):

- "varlen": one kernel for all images, which takes the first token of each. On CUDA, in half precision.
- "grouped": images are sorted by length, so that those of one length form a dense block for ordinary attention. Everywhere.

A third backend, "masked", does not pack: it keeps the dense batch and masks removed tokens, for export and as a reference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any

import torch


BACKENDS = ("varlen", "grouped", "masked")  # "auto" takes the first one available


def torch_varlen_attention() -> Callable[..., Any] | None:
    """torch's attention for packed batches; None if this torch is too old. The import takes seconds, so it is made here."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def varlen_needs(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float, implementation: str) -> str:
    """The requirement of variable-length attention that is not met, in words; empty if all are.

    Args:
        device: Device of the tokens.
        dtype: Dtype of the attention.
        head_dim: d.
        dropout: Dropout of the attention weights.
        implementation: transformers' name of the attention: `"sdpa"` is torch's kernel, a name with "flash" is that of a
            flash attention package.
    """
    flash = "flash" in implementation
    if device.type != "cuda":
        return "a CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "a GPU of compute capability 8.0"
    if dtype not in (torch.float16, torch.bfloat16):
        return "float16 or bfloat16"
    if head_dim % 8 or head_dim > 256:
        return "heads of a width that is a multiple of 8 and at most 256"
    if dropout and not flash:
        return "no dropout of attention weights"
    if not flash and implementation != "sdpa":
        return "the attention implementation 'sdpa' or a flash attention"
    if not flash and torch_varlen_attention() is None:
        return "a torch with torch.nn.attention.varlen"
    return ""


def resolve_backend(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int = 64,
    dropout: float = 0.0,
    implementation: str = "sdpa",
) -> str:
    """The requested backend, or for `"auto"` the best one available; the other arguments are those of `varlen_needs`.

    Raises:
        ValueError: If there is no such backend, or it is not available.

    Example:
        >>> resolve_backend("auto", torch.device("cpu"), torch.float32)
        'grouped'
    """
    check_backend(requested)
    if requested in ("grouped", "masked"):
        return requested
    needs = varlen_needs(device, dtype, head_dim, dropout, implementation)
    if not needs:
        return "varlen"
    if requested == "auto":
        return "grouped"
    raise ValueError(
        f"Expected a ragged backend that is available on {device.type}, grouped or masked, got 'varlen', which needs {needs}."
    )


def check_backend(name: str) -> None:
    """Raise a `ValueError` unless it is the name of a backend, or `"auto"`."""
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"Expected a ragged backend among auto, {', '.join(BACKENDS)}, got {name!r}.")


def check_values(tokens: torch.Tensor) -> None:
    """Raise a `ValueError` for meta tensors, which have no values to select by."""
    if tokens.is_meta:
        raise ValueError("Expected tokens with values, which `dqs_threshold` needs, got meta tensors.")


@dataclass(frozen=True)
class AttentionGroup:
    """Images of one length, neighbours in a packed batch, which attend in one call.

    Attributes:
        first: Index of the first token.
        images: n.
        length: L, tokens of each.
        mask: (n, 1, L, L) bool, which places may be read; None if all may.
    """

    first: int
    images: int
    length: int
    mask: torch.Tensor | None = None

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        """(T, H, d) of the packed batch -> (n, H, L, d) of this group."""
        x = x[self.first : self.first + self.images * self.length]
        return x.unflatten(0, (self.images, self.length)).transpose(1, 2)

    def causal(self, block: torch.Tensor) -> "AttentionGroup":
        """The group with a mask that lets a token read those whose `block`, (T,), is not above its own."""
        own = self.dense(block[:, None, None])[:, 0, :, 0]  # (n, L)
        return replace(self, mask=(own[:, :, None] >= own[:, None])[:, None])


def attention_groups(lengths: Sequence[int]) -> tuple[AttentionGroup, ...]:
    """Cut a packed batch into groups of one length, given the ascending lengths of its images."""
    groups, first = [], 0
    for length, run in groupby(lengths):
        groups.append(AttentionGroup(first, len(list(run)), length))
        first += groups[-1].images * length
    return tuple(groups)


def marked(mask: torch.Tensor, count: int) -> torch.Tensor:
    """`mask.nonzero()` with a known number of rows, so that the host does not wait for the GPU."""
    return torch.nonzero_static(mask, size=count) if mask.is_cuda else mask.nonzero()


@dataclass  # not frozen: torch 2.8's compiler makes constants of a frozen one's fields
class PackedLayout:
    """The image and the query of each token of a packed batch.

    Attributes:
        shape: (B, K) of the dense batch.
        image: (T,) the image of each token.
        query: (T,) the query of each token, ascending within an image.
        backend: Attention backend, `"grouped"` or `"varlen"`.
        order: (B,) the image at each position of the packed order; None is the order of the batch.
        offsets: (B + 1,) int32, the first token of each image in packed order, and T; None unless `"varlen"`. Longer if
            `from_mask` rounds T up.
        groups: Runs of images that attend in one call; empty unless `"grouped"`.

    Example:
        >>> keep = torch.tensor([[True, True, False], [True, False, False]])
        >>> layout = PackedLayout.from_mask(keep)
        >>> layout.image.tolist(), layout.query.tolist(), [(group.images, group.length) for group in layout.groups]
        ([1, 0, 0], [0, 0, 1], [(1, 1), (1, 2)])
    """

    shape: tuple[int, int]
    image: torch.Tensor
    query: torch.Tensor
    backend: str = "grouped"
    order: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    groups: tuple[AttentionGroup, ...] = ()

    @classmethod
    @torch.compiler.disable  # a compiler would make constants of this batch's lengths
    def from_mask(cls, keep: torch.Tensor, backend: str = "grouped", round_to: int = 1) -> "PackedLayout":
        """Lay out the tokens that `keep`, (B, K) bool, marks. Every image must keep at least one.

        With `"varlen"`, T is rounded up to a multiple of `round_to`. The extra rows repeat a token and count as further images;
        nothing reads them, but `unpack` cannot be used.
        """
        check_values(keep)
        B, K = keep.shape
        lengths, order = keep.sum(dim=1), None
        if backend == "grouped":
            lengths, order = lengths.sort(stable=True)
            keep = keep[order]
        # Only here does the host wait for the device: T and the shapes of groups depend on the lengths.
        known = lengths.tolist()
        if min(known) == 0:
            raise ValueError("Expected every image to keep at least one query, got an image that keeps none.")
        image, query = marked(keep, sum(known)).unbind(1)
        if backend == "varlen":
            T = -(-sum(known) // round_to) * round_to
            ends = lengths.cumsum(0)
            if round_to > 1:
                excess = ends[-1] + K * torch.arange(1, -(-round_to // K) + 1, device=keep.device)
                ends = torch.cat([ends, excess.clamp(max=T)])
                image, query = (torch.nn.functional.pad(x, (0, T - len(x))) for x in (image, query))
            return cls((B, K), image, query, backend, offsets=torch.nn.functional.pad(ends.int(), (1, 0)))
        assert order is not None
        return cls((B, K), order[image], query, order=order, groups=attention_groups(known))

    @classmethod
    def prefix(
        cls, B: int, K: int, device: torch.device | str | None = None, backend: str = "grouped"
    ) -> "PackedLayout":
        """The layout of B images that all keep their first K tokens."""
        image, query = torch.arange(B, device=device).repeat_interleave(K), torch.arange(K, device=device).repeat(B)
        if backend == "varlen":
            offsets = torch.arange(0, B * K + 1, K, dtype=torch.int32, device=device)
            return cls((B, K), image, query, backend, offsets=offsets)
        return cls((B, K), image, query, groups=(AttentionGroup(0, B, K),))

    @classmethod
    def join(cls, layouts: Sequence["PackedLayout"]) -> "PackedLayout":
        """Join the layouts of several batches of one backend; images keep their order."""
        images = [0, *accumulate(layout.shape[0] for layout in layouts)]
        tokens = [0, *accumulate(layout.num_tokens for layout in layouts)]
        parts = list(zip(layouts, images, tokens, strict=False))
        order, offsets = None, None
        groups: tuple[AttentionGroup, ...] = ()
        if layouts[0].backend == "varlen":
            starts = [layout.offsets[:-1] + first for layout, _, first in parts if layout.offsets is not None]
            end = starts[0].new_full((1,), tokens[-1])
            offsets = torch.cat([*starts, end])
        else:
            order = torch.cat([layout.positions + first for layout, first, _ in parts])
            groups = tuple(
                replace(group, first=group.first + first) for layout, _, first in parts for group in layout.groups
            )
        return cls(
            shape=(images[-1], max(layout.shape[1] for layout in layouts)),
            image=torch.cat([layout.image + first for layout, first, _ in parts]),
            query=torch.cat([layout.query for layout in layouts]),
            backend=layouts[0].backend,
            order=order,
            offsets=offsets,
            groups=groups,
        )

    def causal(self, blocks: torch.Tensor) -> "PackedLayout":
        """The layout for attention in which a query reads the queries of its own and of earlier blocks.

        Args:
            blocks: (Q,) the block of each query.
        """
        block = blocks[self.query]  # (T,)
        return replace(self, groups=tuple(group.causal(block) for group in self.groups))

    @property
    def num_tokens(self) -> int:
        """T; the host does not wait for the device."""
        return self.image.shape[0]

    @property
    def positions(self) -> torch.Tensor:
        """(B,) the image at each position of the packed order."""
        return torch.arange(self.shape[0], device=self.image.device) if self.order is None else self.order

    def pack(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, K, D) -> (T, D)."""
        return tokens[self.image, self.query]

    def unpack(self, tokens: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (B, K, D), rows of absent tokens zero."""
        dense = tokens.new_zeros(*self.shape, tokens.shape[-1])
        return dense.index_put((self.image, self.query), tokens)

    def unsort(self, images: torch.Tensor) -> torch.Tensor:
        """(B, ...) in packed order -> (B, ...) in the order of the batch."""
        return images if self.order is None else torch.empty_like(images).index_copy(0, self.order, images)

    def attend(
        self, attention: Callable[..., Any], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Attention within each image.

        Args:
            attention: Attention of dense blocks, for groups: maps query (n, H, L_q, d), key and value (n, H, L, d) and a mask
                (n, 1, L, L) or None to (n, L_q, H, d). For variable lengths, see `MultiHeadAttention.attend_varlen`.
            query: (T, H, d) for self-attention, or (1, H, 1, d), the same for every image.
            key: (T, H, d).
            value: (T, H, d).

        Returns:
            (T, H, d) for self-attention, else (B, 1, H, d) in packed order.
        """
        if self.backend == "grouped":
            return self.attend_grouped(attention, query, key, value)
        B, K = self.shape
        if query.ndim == 3:
            return attention(query, key, value, self.offsets, self.offsets, K, K)
        ones = torch.arange(B + 1, dtype=torch.int32, device=key.device)
        query = query[:, :, 0].repeat(B, 1, 1)  # (1, H, 1, d) -> (B, H, d)
        assert self.offsets is not None
        return attention(query, key, value, ones, self.offsets[: B + 1], 1, K)[:, None]

    # The compiler would unroll the loop for the groups of this batch. It must not see their number either, so this method
    # takes the whole layout.
    @torch.compiler.disable
    def attend_grouped(
        self, attention: Callable[..., Any], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """`attend`, a group at a time."""
        outputs = []
        for group in self.groups:
            k, v = group.dense(key), group.dense(value)
            if query.ndim == 3:
                outputs.append(attention(group.dense(query), k, v, group.mask).flatten(0, 1))
            else:
                outputs.append(attention(query.expand(group.images, -1, -1, -1), k, v, group.mask))
        return torch.cat(outputs)
