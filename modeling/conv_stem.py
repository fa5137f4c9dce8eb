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

    (B, C_in, h, w) -> (B, C_out, h / stride, w / stride).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, residual: bool = False, act: str = "gelu"):
        super().__init__()
        self.residual = residual
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(out_channels)
        self.act = ACT2FN[act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.norm(self.conv(x)))
        return x + y if self.residual else y


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
        # Channels last is the order in which CPUs convolve fastest, and in which tokens are read afterwards.
        x = x.contiguous(memory_format=torch.channels_last)
        for i, stage in enumerate(self.stages):
            if i > 0 and self.pool:
                x = F.max_pool2d(x, 2)
            x = stage(x)
        return x


class StemLevel(nn.Module):
    """Residual convolutions that go on from the features of a level, and the 1x1 projection that makes tokens of them.

    Args:
        channels: C of the features.
        depth: Number of convolutions.
        width: D of the tokens.
        act: Activation, a name in transformers' ACT2FN.
    """

    def __init__(self, channels: int, depth: int, width: int, act: str = "gelu"):
        super().__init__()
        self.blocks = nn.Sequential(*[ConvBlock(channels, channels, residual=True, act=act) for _ in range(depth)])
        self.projection = nn.Conv2d(channels, width, kernel_size=1)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The level's features (B, C, h, w), and their projection (B, D, h, w)."""
        features = self.blocks(features)
        return features, self.projection(features)


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
