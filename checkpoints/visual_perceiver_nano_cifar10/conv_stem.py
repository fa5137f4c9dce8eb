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
        return self.stages_of(x)[-1]

    def stages_of(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What each stage makes of the images."""
        # Channels last is the order in which CPUs convolve fastest, and in which tokens are read afterwards.
        x = x.contiguous(memory_format=torch.channels_last)
        results = []
        for i, stage in enumerate(self.stages):
            if i > 0 and self.pool:
                x = F.max_pool2d(x, 2)
            x = stage(x)
            results.append(x)
        return results


class StemLevel(nn.Module):
    """A level of a stem: convolutions that go on from the features of the level before, and a projection to tokens.

    With `fine` channels it works at two resolutions, as networks for anytime prediction do (Huang et al. 2018, "Multi-Scale
    Dense Networks"): features of the stem's last stage but one go on as well, and are added to those of the last.

    Args:
        channels: C of the features.
        depth: Number of convolutions, or with `fine` of steps of three.
        width: D of the tokens.
        act: Activation, a name in transformers' ACT2FN.
        fine: Channels of the features at twice the resolution, 0 for none.
    """

    def __init__(self, channels: int, depth: int, width: int, act: str = "gelu", fine: int = 0):
        super().__init__()
        self.channels = channels
        self.fine = nn.ModuleList()
        self.down = nn.ModuleList()
        if fine:
            self.fine.extend(ConvBlock(fine, fine, residual=True, act=act) for _ in range(depth))
            self.down.extend(ConvBlock(fine, channels, stride=2, act=act) for _ in range(depth))
        self.blocks = nn.ModuleList(ConvBlock(channels, channels, residual=True, act=act) for _ in range(depth))
        self.projection = nn.Conv2d(channels, width, kernel_size=1)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The level's features (B, C', h, w), in the form that they come in, and their projection (B, D, h, w)."""
        if not self.fine:
            for block in self.blocks:
                features = block(features)
            return features, self.projection(features)
        coarse, fine = features[:, : self.channels], F.pixel_shuffle(features[:, self.channels :], 2)
        for go_on, down, block in zip(self.fine, self.down, self.blocks, strict=True):
            fine = go_on(fine)
            coarse = block(coarse + down(fine))
        return joined_features(coarse, fine), self.projection(coarse)


def joined_features(coarse: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
    """Features of two resolutions as one tensor: (B, C, h, w) and (B, F, 2h, 2w) -> (B, C + 4F, h, w)."""
    return torch.cat([coarse, F.pixel_unshuffle(fine, 2)], dim=1)


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


def level_macs(widths: Sequence[Sequence[int]], depth: int, area: int, resolutions: int) -> int:
    """Multiply-accumulates of a `StemLevel` without its projection, for `area` tokens.

    Example:
        >>> level_macs([[16], [40], [96]], 1, 64, 2) / 1e6
        11.206656
    """
    coarse = widths[-1][-1]
    macs = 9 * coarse**2 * area
    if resolutions == 2:
        fine = widths[-2][-1]
        macs += 9 * fine**2 * 4 * area + 9 * fine * coarse * area
    return depth * macs


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
