"""timm classifiers behind the protocol of elastic models, with one budget, to compare elastic models with."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from .elastic import Budget, ElasticConfig
from .optimized import OptimizableModel


class StaticConfig(ElasticConfig):
    """The config of a timm classifier: all images cost the same.

    Args:
        config: transformers' config of the classifier.
        macs: Multiply-accumulates of an image.
    """

    model_type = "timm_wrapper"
    unit = "passes"
    knobs = {}
    title = "timm classifier"

    def __init__(self, config: TimmWrapperConfig, macs: int):
        self.id2label, self.pretrained_cfg, self.macs = config.id2label, config.pretrained_cfg, macs
        self.num_channels, *self.image_size = config.pretrained_cfg["input_size"]

    def budgets(self) -> list[Budget]:
        """The full network alone."""
        return [Budget()]

    def resolve(self, **knobs: Any) -> dict[str, Any]:
        """Nothing, as there are no knobs.

        Raises:
            ValueError: If a knob is given.
        """
        if knobs:
            raise ValueError(f"Expected no knobs for a timm classifier, got {', '.join(knobs)}.")
        return {}

    def count_macs(self, budget: Budget | None = None, output: Any = None) -> Any:
        """Multiply-accumulates of an image, as torch counts them (half of its operations)."""
        return self.macs if output is None else torch.full((len(output.logits),), self.macs)


@dataclass
class StaticOutput(ImageClassifierOutput):
    """Logits (B, labels), and `used` (B,): one pass per image."""

    used: torch.Tensor | None = None


class StaticClassifier(nn.Module, OptimizableModel):
    """A timm classifier with one budget.

    Args:
        network: The classifier in transformers' `TimmWrapper`.

    Example:
        >>> config = TimmWrapperConfig(architecture="cifar_resnet20", pretrained_cfg={"input_size": [3, 32, 32]})
        >>> StaticClassifier(TimmWrapperForImageClassification(config)).config.count_macs()
        40812672
    """

    def __init__(self, network: TimmWrapperForImageClassification):
        super().__init__()
        self.network = network.eval()
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            network(torch.zeros(1, *network.config.pretrained_cfg["input_size"]))
        self.config = StaticConfig(network.config, counter.get_total_flops() // 2)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.network.dtype

    def forward(self, pixel_values: torch.Tensor) -> StaticOutput:
        """Classify images (B, C, H, W)."""
        logits = self.network(pixel_values).logits
        return StaticOutput(logits=logits, used=torch.ones(logits.shape[0], dtype=torch.int64, device=logits.device))


__all__ = ["StaticClassifier", "StaticConfig", "StaticOutput"]
