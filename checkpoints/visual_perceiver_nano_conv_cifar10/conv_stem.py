"""A convolutional stem: from an image to a grid of features, by stages of 3x3 convolutions."""

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN


DOWNSAMPLINGS = ("pool", "stride")


class ConvBlock(nn.Module):
    """A 3x3 convolution, batch norm and an activation, with a shortcut around them if `residual`.

    (B, C_in, h, w) -> (B, C_out, h / stride, w / stride). The shortcut adds the input, or `shortcut` if given.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, residual: bool = False, act: str = "gelu"):
        super().__init__()
        self.residual = residual
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(out_channels)
        self.act = ACT2FN[act]

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        y = self.act(self.norm(self.conv(x)))
        return y + (x if shortcut is None else shortcut) if self.residual else y


class ConvStem(nn.Module):
    """Stages of convolutions, each at half the resolution of the one before: (B, C, H, W) -> (B, D_stem, H / s, W / s).

    Early convolutions help transformers train (Xiao et al. 2021, "Early Convolutions Help Transformers See Better"); on
    CIFAR-10, compact ones rely on them (Hassani et al. 2021).

    Args:
        in_channels: C of the images.
        widths: For each stage the output channels of its convolutions. A stage may be empty: with `"stride"`,
            `[[], [48]]` begins with a convolution of stride 2.
        downsample: Between stages: `"pool"` (max pooling) or `"stride"` (of the next stage's first convolution).
        residual: Give each convolution that keeps its number of channels and its resolution a shortcut.
        act: Activation, a name in transformers' ACT2FN.

    Raises:
        ValueError: If the widths or the downsampling are not as described.

    Example:
        >>> stem = ConvStem(3, [[24], [48], [96]])
        >>> stem(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 96, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[Sequence[int]],
        downsample: str = "pool",
        residual: bool = False,
        act: str = "gelu",
    ):
        super().__init__()
        check_stem(widths, downsample)
        self.pool = downsample == "pool"
        self.stages = nn.ModuleList()
        channels = in_channels
        for i, stage in enumerate(widths):
            blocks = nn.Sequential()
            for j, width in enumerate(stage):
                stride = 2 if i > 0 and j == 0 and not self.pool else 1
                shortcut = residual and width == channels and stride == 1
                blocks.append(ConvBlock(channels, width, stride, shortcut, act))
                channels = width
            self.stages.append(blocks)
        self.out_channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.features_of(x)[-1]

    def features_of(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The inputs of all convolutions but the first, and then the output; a `StemLevel` reads them."""
        # CPUs convolve fastest with channels last, and the tokens are read in this order.
        x = x.contiguous(memory_format=torch.channels_last)
        results = []
        for i, stage in enumerate(self.stages):
            if i > 0 and self.pool:
                x = F.max_pool2d(x, 2)
            for block in stage.children():
                results.append(x)
                x = block(x)
        return [*results[1:], x]


class StemLevel(nn.Module):
    """A level of a stem: further channels for all convolutions but the first, and a projection to tokens.

    All levels share the first convolution. The others read the channels of their own and of earlier levels, so that no
    level repeats the work of another, as in progressive networks (Rusu et al. 2016).

    Args:
        widths: `stem_widths`.
        added: `level_widths` up to this level.
        hidden_size: D of the tokens.
        downsample: As in `ConvStem`.
        residual: As in `ConvStem`, for the channels of this level.
        act: Activation, a name in transformers' ACT2FN.
    """

    def __init__(
        self,
        widths: Sequence[Sequence[int]],
        added: Sequence[int],
        hidden_size: int,
        downsample: str = "pool",
        residual: bool = False,
        act: str = "gelu",
    ):
        super().__init__()
        *levels, new = level_channels(widths, added)
        before = [widths[0][0], *(sum(old) for old in zip(*levels, strict=True))]
        first, *stages = [i for i, stage in enumerate(widths) for _ in stage]
        begins = [b > a for a, b in itertools.pairwise([first, *stages])]
        self.pooled = [begin and downsample == "pool" for begin in begins]
        self.blocks = nn.ModuleList()
        for k, width in enumerate(new):
            channels = before[k] + (new[k - 1] if k > 0 else 0)
            stride = 2 if begins[k] and not self.pooled[k] else 1
            shortcut = residual and k > 0 and width == new[k - 1] and stride == 1
            self.blocks.append(ConvBlock(channels, width, stride, shortcut, act))
        # Channels of the features that the level reads, and how many times finer than the tokens they are.
        strides = [2 if begin and not pooled else 1 for begin, pooled in zip(begins, self.pooled, strict=True)]
        finer = [2 ** (len(widths) - 2 - i + stride) for i, stride in zip(stages, strides, strict=True)]
        self.inputs: list[tuple[int, int]] = list(zip(before, [*finer, 1], strict=True))
        self.projection = nn.Conv2d(before[-1] + new[-1], hidden_size, kernel_size=1)

    def forward(self, features: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Map the features of the level before, as in `ConvStem.features_of`, to those of this level and tokens (B, D, h, w)."""
        shared, *others = features
        x, joined = self.blocks[0](shared), [shared]
        for k, before in enumerate(others, start=1):
            if k < len(self.blocks) and self.pooled[k]:
                x = F.max_pool2d(x, 2)
            joined.append(torch.cat([before, x], dim=1))
            if k < len(self.blocks):
                x = self.blocks[k](joined[k], x)
        return joined, self.projection(joined[-1])


def level_channels(widths: Sequence[Sequence[int]], added: Sequence[int]) -> list[list[int]]:
    """For each level, the channels of all convolutions but the first.

    Example:
        >>> level_channels([[16, 24], [48]], [8])
        [[24, 48], [8, 16]]
    """
    _, *own = itertools.chain(*widths)
    return [own, *([width * more // own[0] for width in own] for more in added)]


def stem_macs(in_channels: int, widths: Sequence[Sequence[int]], height: int, width: int) -> int:
    """Multiply-accumulates of a stem for one image of `height` x `width` pixels.

    Example:
        >>> stem_macs(3, [[24], [48], [96]], 32, 32) / 1e6
        5.971968
    """
    macs, channels = 0, in_channels
    for i, stage in enumerate(widths):
        area = (height >> i) * (width >> i)
        for out_channels in stage:
            macs += 9 * channels * out_channels * area
            channels = out_channels
    return macs


def level_macs(widths: Sequence[Sequence[int]], added: Sequence[int], height: int, width: int) -> tuple[int, int]:
    """Multiply-accumulates of the last `StemLevel` for one image without its projection, and the channels that it projects.

    Example:
        >>> level_macs([[16, 24], [48]], [8], 32, 32)
        (2359296, 64)
    """
    levels = level_channels(widths, added)
    _, *stages = [i for i, stage in enumerate(widths) for _ in stage]
    macs, channels = 0, widths[0][0]
    for i, new, total in zip(stages, levels[-1], map(sum, zip(*levels, strict=True)), strict=True):
        macs += 9 * channels * new * (height >> i) * (width >> i)
        channels = total
    return macs, channels


def check_stem(widths: Sequence[Sequence[int]], downsample: str) -> None:
    """Raise a `ValueError` unless these are the arguments of a `ConvStem`."""
    integers = all(isinstance(w, int) and not isinstance(w, bool) and w >= 1 for w in itertools.chain(*widths))
    if not widths or not integers or not any(widths):
        raise ValueError(
            f"Expected the stem's widths as a list of stages, each a list of positive integers, got {widths!r}."
        )
    if downsample not in DOWNSAMPLINGS:
        raise ValueError(f"Expected the stem's downsampling to be pool or stride, got {downsample!r}.")
    if downsample == "stride" and not all(widths[1:]):
        raise ValueError(f"Expected a convolution in every stage that downsamples by its stride, got {widths!r}.")
