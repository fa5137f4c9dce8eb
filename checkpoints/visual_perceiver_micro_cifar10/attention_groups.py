"""Which images of a packed batch attend together: those of one length as a dense block, or near ones padded to the longest.

A call of an attention kernel costs a fixed time, so many small groups are slow; a padded token is work for nothing, and a
mask slows the kernel down. Where to cut the sorted lengths so that the sum is least is a shortest path.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch


@dataclass(frozen=True)
class GroupCost:
    """What attention within a group costs, in units of a token of an unpadded group.

    Attributes:
        call: Cost of a call, however small.
        padded_call: Cost of a call with a mask, with what brings tokens to their padded places and back.
        padded_token: Cost of each place in such a group.
    """

    call: float
    padded_call: float
    padded_token: float

    def of(self, images: int, length: int, equal: bool) -> float:
        """Of a group of images that are all `length` long, or up to it."""
        places = images * length
        return self.call + places if equal else self.padded_call + self.padded_token * places


# Devices that are not here never pad: on a CPU, where a call costs as much as 30 tokens, a padded one 40 and a padded token 1.6, the
# cuts of least cost were no faster than equal lengths alone. On a GPU a call is dear beside a token; these are assumptions.
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
        places: (tokens,) the place of each token in the padded block; None likewise.
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
        """The group in a batch that has so many tokens before it."""
        return replace(self, first=self.first + tokens, rows=None if self.rows is None else self.rows + tokens)


def attention_groups(
    lengths: torch.Tensor, known: Sequence[int], cost: GroupCost | None = None
) -> tuple[AttentionGroup, ...]:
    """Cut a packed batch into groups: of equal lengths, or where padding can pay, those that cost least on its device.

    Args:
        lengths: (B,) tokens of each image, ascending.
        known: The same, on the host.
        cost: Cost of attention; None takes the device's entry in `COSTS`.
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
    best, cut = [0.0], [0]  # of the first j lengths: the least cost, and where their last group begins
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
    """The group with what it takes to pad images of these `lengths`, (n,), all of it computed without the host."""
    place = torch.arange(group.length, device=lengths.device)
    mask = place < lengths[:, None]  # (n, L)
    start = group.first + lengths.cumsum(0) - lengths
    # Places that hold nothing repeat the image's last token: any will do, as no query may read them.
    rows = start[:, None] + torch.minimum(place, lengths[:, None] - 1)
    return replace(
        group, rows=rows.flatten(), places=marked(mask.flatten(), group.tokens)[:, 0], mask=mask[:, None, None]
    )


def marked(mask: torch.Tensor, count: int) -> torch.Tensor:
    """`mask.nonzero()`, of which there are `count`: knowing it, the host need not wait for a GPU to say."""
    return torch.nonzero_static(mask, size=count) if mask.is_cuda else mask.nonzero()


__all__ = ["AttentionGroup", "GroupCost", "attention_groups", "boundaries"]
