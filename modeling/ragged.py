"""Packed batches: images that keep different numbers of tokens, laid end to end without padding."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PackedLayout:
    """Where each token of a packed batch comes from.

    Linears, norms and MLPs see one (T, D) tensor, T being the number of tokens that all images keep together. Images
    are sorted by their number of tokens, so that those of equal length are neighbours and form a dense (n, L, D) block
    for attention: no token is padded, and no attention mask is needed.

    Attributes:
        shape: (B, K) of the dense batch.
        image: (T,) the image of each token.
        query: (T,) the query of each token, ascending within an image.
        order: (B,) the image at each position of the packed order.
        groups: (first token, images, tokens per image) of each run of images of equal length.

    Example:
        >>> keep = torch.tensor([[True, True, False], [True, False, False]])
        >>> layout = PackedLayout.from_mask(keep)
        >>> layout.image.tolist(), layout.query.tolist(), layout.groups
        ([1, 0, 0], [0, 0, 1], [(0, 1, 1), (1, 1, 2)])
    """

    shape: tuple[int, int]
    image: torch.Tensor
    query: torch.Tensor
    order: torch.Tensor
    groups: list[tuple[int, int, int]]

    @classmethod
    def from_mask(cls, keep: torch.Tensor) -> "PackedLayout":
        """Lay out the tokens that `keep`, (B, K) bool, marks. Every image must keep at least one."""
        lengths, order = keep.sum(dim=1).sort(stable=True)
        position, query = keep[order].nonzero(as_tuple=True)
        # Here the host waits for the device: it has to know the shapes of the blocks.
        values, counts = (x.tolist() for x in lengths.unique_consecutive(return_counts=True))
        if values[0] == 0:
            raise ValueError("Expected every image to keep at least one query, got an image that keeps none.")
        groups, first = [], 0
        for length, images in zip(values, counts, strict=True):
            groups.append((first, images, length))
            first += images * length
        B, K = keep.shape
        return cls((B, K), order[position], query, order, groups)

    @classmethod
    def prefix(cls, B: int, K: int, device: torch.device | str | None = None) -> "PackedLayout":
        """The layout of B images that all keep their first K tokens."""
        order = torch.arange(B, device=device)
        query = torch.arange(K, device=device).repeat(B)
        return cls((B, K), order.repeat_interleave(K), query, order, [(0, B, K)])

    @classmethod
    def join(cls, layouts: Sequence["PackedLayout"]) -> "PackedLayout":
        """One layout of several batches, one after the other; nothing is sorted anew."""
        images = [0, *itertools.accumulate(layout.shape[0] for layout in layouts)]
        tokens = [0, *itertools.accumulate(layout.num_tokens for layout in layouts)]
        parts = list(zip(layouts, images, tokens, strict=False))
        return cls(
            shape=(images[-1], max(layout.shape[1] for layout in layouts)),
            image=torch.cat([layout.image + first for layout, first, _ in parts]),
            query=torch.cat([layout.query for layout in layouts]),
            order=torch.cat([layout.order + first for layout, first, _ in parts]),
            groups=[(start + first, n, length) for layout, _, first in parts for start, n, length in layout.groups],
        )

    @property
    def num_tokens(self) -> int:
        """T, known without asking the device."""
        return sum(images * length for _, images, length in self.groups)

    def pack(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, K, D) -> (T, D)."""
        return tokens[self.image, self.query]

    def unpack(self, tokens: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (B, K, D), rows of absent tokens zero."""
        dense = tokens.new_zeros(*self.shape, tokens.shape[-1])
        return dense.index_put((self.image, self.query), tokens)

    def unsort(self, images: torch.Tensor) -> torch.Tensor:
        """(B, ...) in packed order -> (B, ...) in the order of the batch."""
        return torch.empty_like(images).index_copy(0, self.order, images)

    def attend(self, attention: Callable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention within each image.

        Args:
            attention: Maps query (n, H, L_q, d), key and value (n, H, L, d) to (n, L_q, H, d).
            query: (T, H, d) for self-attention, or (1, H, L_q, d), the same for every image.
            key: (T, H, d).
            value: (T, H, d).

        Returns:
            (T, H, d) for self-attention, else (B, L_q, H, d) in packed order.
        """
        shared_query = query.ndim == 4
        outputs = []
        for first, images, length in self.groups:
            rows = slice(first, first + images * length)
            # (n * L, H, d) -> (n, H, L, d)
            q, k, v = (
                x.expand(images, -1, -1, -1) if x.ndim == 4 else x[rows].unflatten(0, (images, length)).transpose(1, 2)
                for x in (query, key, value)
            )
            output = attention(q, k, v)
            outputs.append(output if shared_query else output.flatten(0, 1))
        return torch.cat(outputs)
