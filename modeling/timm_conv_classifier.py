"""Small convolutional classifiers for timm: the conv stem with a linear head, and CIFAR's ResNets.

They are baselines for a Visual Perceiver with a stem, and quick teachers. Importing this file registers them with timm.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, downsample_conv
from torch import nn

from .conv_stem import ConvStem
from .elastic import default_preprocessing


__all__ = ["CifarResNet", "ConvStemClassifier"]


class ConvStemClassifier(nn.Module):
    """A `ConvStem`, pooling and a linear classifier: (B, C, H, W) -> (B, classes).

    Its `stem` has the parameters of the stem of a Visual Perceiver with these widths, which can load it.

    Example:
        >>> import timm
        >>> model = timm.create_model("conv_stem_classifier_32", widths=[[24], [48], [96]])
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        widths: Sequence[Sequence[int]] = ((24,), (48,), (96,)),
        downsample: str = "pool",
        residual: bool = False,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        act_layer: str = "gelu",
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.stem = ConvStem(in_chans, widths, downsample, residual, act_layer)
        self.num_features = self.head_hidden_size = self.stem.out_channels
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear classifier."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new classifier, and another `global_pool` unless None."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, features, h, w)."""
        return self.stem(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, features, h, w) -> (B, classes), or (B, features) with `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class CifarResNet(nn.Module):
    """timm's basic blocks as He et al. (2016, section 4.2) stack them for CIFAR: three stages, no early pooling.

    A shortcut that changes the number of channels is a 1x1 convolution (option B of that paper).

    Args:
        blocks: Number of blocks in each stage; the network has 6 `blocks` + 2 layers.
        widths: Channels of the three stages.
        num_classes: Outputs of the classifier; 0 for none.
        in_chans: Channels of an image.
        global_pool: Pooling, as in timm's `ClassifierHead`.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        blocks: int = 3,
        widths: Sequence[int] = (16, 32, 64),
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = widths[-1]
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(widths[0]), nn.ReLU()
        self.stages = nn.Sequential()
        channels = widths[0]
        for i, width in enumerate(widths):
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                shortcut = None if channels == width else downsample_conv(channels, width, 1, stride=stride)
                self.stages.append(BasicBlock(channels, width, stride, shortcut))
                channels = width
        self.head = ClassifierHead(channels, num_classes, global_pool, drop_rate)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear classifier."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new classifier, and another `global_pool` unless None."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, widths[-1], H / 4, W / 4)."""
        x = x.contiguous(memory_format=torch.channels_last)
        return self.stages(self.act1(self.bn1(self.conv1(x))))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, features, h, w) -> (B, classes), or (B, features) with `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _cfg() -> dict[str, Any]:
    return {"url": "", "num_classes": 10, "input_size": (3, 32, 32), "pool_size": (8, 8), **default_preprocessing(32)}


default_cfgs = generate_default_cfgs(
    {
        "conv_stem_classifier_32.untrained": {**_cfg(), "first_conv": "stem.stages.0.0.conv", "classifier": "head.fc"},
        "cifar_resnet20.untrained": {**_cfg(), "first_conv": "conv1", "classifier": "head.fc"},
        "cifar_resnet56.untrained": {**_cfg(), "first_conv": "conv1", "classifier": "head.fc"},
    }
)


@register_model
def conv_stem_classifier_32(pretrained: bool = False, **kwargs: Any) -> ConvStemClassifier:
    """A conv stem (24, 48 and 96 channels) with pooling and a linear classifier, for 32x32 images."""
    return build_model_with_cfg(ConvStemClassifier, "conv_stem_classifier_32", pretrained, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """CIFAR's ResNet-20: 0.27 M parameters, 41 M multiply-accumulates at 32x32."""
    return build_model_with_cfg(CifarResNet, "cifar_resnet20", pretrained, **{"blocks": 3, **kwargs})


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """CIFAR's ResNet-56: 0.86 M parameters, 126 M multiply-accumulates at 32x32."""
    return build_model_with_cfg(CifarResNet, "cifar_resnet56", pretrained, **{"blocks": 9, **kwargs})
