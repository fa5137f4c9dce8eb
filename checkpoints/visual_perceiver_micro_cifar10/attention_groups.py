"""Groups of images of a packed batch that attend in one call: images of one length, or of similar lengths with padding.

Each call of an attention kernel has a fixed cost, so many small groups are slow. Padding wastes work, and its mask slows
the kernel down. The cheapest way to cut the sorted lengths into groups is a shortest path.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch


@dataclass(frozen=True)
class GroupCost:
    """The cost of attention within a group; the unit is one token of an unpadded group.

    Attributes:
        call: Fixed cost of a call.
        padded_call: Fixed cost of a call with a mask, which includes moving tokens to their padded places and back.
        padded_token: Cost of each place of a padded group.
    """

    call: float
    padded_call: float
    padded_token: float

    def of(self, images: int, length: int, equal: bool) -> float:
        """The cost of a group of images that all have `length` tokens (`equal`), or at most `length`."""
        places = images * length
        return self.call + places if equal else self.padded_call + self.padded_token * places


# Other devices never pad. On a CPU a call costs as much as 30 tokens, a padded call 40 and a padded token 1.6, and the
# cheapest groups were no faster than groups of one length. On a GPU a call costs far more than a token; these values are
# assumptions.
COSTS = {"cuda": GroupCost(call=2000, padded_call=4000, padded_token=1.5)}


@dataclass(frozen=True)
class AttentionGroup:
    """Images that are neighbours in a packed batch and attend in one call.

    Attributes:
        first: Index of the first token.
        tokens: Number of tokens.
        images: n.
        length: L, tokens of the longest.
        rows: (n L,) the token at each place of the padded block; None if all are L long.
        places: (tokens,) the place of each token in the padded block; None if all are L long.
        mask: (n, 1, 1 or L, L) bool, which places may be read; None if all may.
    """

    first: int
    tokens: int
    images: int
    length: int
    rows: torch.Tensor | None = None
    places: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        """(T, H, d) of the packed batch -> (n, H, L, d) of this group."""
        x = x[self.first : self.first + self.tokens] if self.rows is None else x[self.rows]
        return x.unflatten(0, (self.images, self.length)).transpose(1, 2)

    def packed(self, y: torch.Tensor) -> torch.Tensor:
        """(n, L, H, d) -> (tokens, H, d)."""
        y = y.flatten(0, 1)
        return y if self.places is None else y[self.places]

    def causal(self, block: torch.Tensor) -> "AttentionGroup":
        """The group with a mask (n, 1, L, L) that lets a token read those whose `block`, (T,), is not above its own."""
        own = self.dense(block[:, None, None])[:, 0, :, 0]  # (n, L)
        mask = (own[:, :, None] >= own[:, None])[:, None]
        return replace(self, mask=mask if self.mask is None else mask & self.mask)

    def moved(self, tokens: int) -> "AttentionGroup":
        """The group with `tokens` more tokens before it."""
        return replace(self, first=self.first + tokens, rows=None if self.rows is None else self.rows + tokens)


def attention_groups(
    lengths: torch.Tensor, known: Sequence[int], cost: GroupCost | None = None
) -> tuple[AttentionGroup, ...]:
    """Cut a packed batch into groups of one length, or on devices in `COSTS` into the cheapest groups.

    Args:
        lengths: (B,) tokens of each image, ascending.
        known: The same numbers as Python's integers.
        cost: Cost of attention; None is the device's entry in `COSTS`.
    """
    values, counts = zip(*((length, len(list(run))) for length, run in groupby(known)), strict=True)
    cost = cost or COSTS.get(lengths.device.type)
    ends = boundaries(values, counts, cost) if cost else range(1, len(values) + 1)
    groups, image, token, start = [], 0, 0, 0
    for end in ends:
        images, length = sum(counts[start:end]), values[end - 1]
        tokens = sum(n * L for n, L in zip(counts[start:end], values[start:end], strict=True))
        group = AttentionGroup(token, tokens, images, length)
        groups.append(group if end - start == 1 else padded(group, lengths[image : image + images]))
        image, token, start = image + images, token + tokens, end
    return tuple(groups)


def boundaries(values: Sequence[int], counts: Sequence[int], cost: GroupCost) -> list[int]:
    """Where to cut ascending distinct lengths, `counts` images of each, so that the groups cost least together.

    Returns:
        The end of each group, as an index into `values`; the last is their number.

    Example:
        >>> cost = GroupCost(call=10, padded_call=10, padded_token=1)
        >>> boundaries([1, 2, 3, 40], [1, 1, 1, 1], cost)
        [3, 4]
    """
    best, cut = [0.0], [0]  # for the first j lengths: the least cost, and the start of the last group
    for j in range(1, len(values) + 1):
        options, images = [], 0
        for i in range(j - 1, -1, -1):
            images += counts[i]
            options.append((best[i] + cost.of(images, values[j - 1], equal=i == j - 1), i))
        least, begin = min(options)
        best.append(least)
        cut.append(begin)
    ends = [len(values)]
    while cut[ends[-1]]:
        ends.append(cut[ends[-1]])
    return ends[::-1]


def padded(group: AttentionGroup, lengths: torch.Tensor) -> AttentionGroup:
    """The group with rows, places and mask for images of these `lengths`, (n,); the host does not wait for the device."""
    place = torch.arange(group.length, device=lengths.device)
    mask = place < lengths[:, None]  # (n, L)
    start = group.first + lengths.cumsum(0) - lengths
    # Empty places repeat the image's last token; no query reads them.
    rows = start[:, None] + torch.minimum(place, lengths[:, None] - 1)
    return replace(
        group, rows=rows.flatten(), places=marked(mask.flatten(), group.tokens)[:, 0], mask=mask[:, None, None]
    )


def marked(mask: torch.Tensor, count: int) -> torch.Tensor:
    """`mask.nonzero()` with a known number of rows, so that the host does not wait for the GPU."""
    return torch.nonzero_static(mask, size=count) if mask.is_cuda else mask.nonzero()


__all__ = ["AttentionGroup", "GroupCost", "attention_groups", "boundaries"]
