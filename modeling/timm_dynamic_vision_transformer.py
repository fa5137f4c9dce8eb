"""The Dynamic Vision Transformer as a timm model; importing this file registers its architectures."""

from typing import Any

import torch
from torch import nn

from .elastic import check_pixel_values
from .modeling_dynamic_vision_transformer import DynamicVisionTransformerParts, DynamicVisionTransformerPreTrainedModel
from .timm_family import TimmClassifier, register_architectures


class DynamicVisionTransformer(DynamicVisionTransformerParts, TimmClassifier):
    """Dynamic Vision Transformer with timm's interface.

    `forward_features` and `forward_head` run all exits; `forward` takes `exit_thresholds` and `max_exit`.

    Example:
        >>> import timm
        >>> model = timm.create_model("dvt_nano_32").eval()
        >>> model(torch.zeros(2, 3, 32, 32), max_exit=1).shape
        torch.Size([2, 10])
    """

    pretrained_class = DynamicVisionTransformerPreTrainedModel

    def build_heads(self) -> None:
        """A classifier for each exit."""
        self.heads = nn.ModuleList(self.new_head() for _ in range(self.config.num_exits))

    @property
    def head(self) -> nn.Module:  # type: ignore[override]
        """The classifier of the last exit."""
        return self.heads[-1]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifiers, one for each exit."""
        return self.heads

    def forward_features(self, x: torch.Tensor, **knobs: Any) -> torch.Tensor:
        """Tokens of the last exit, which `forward_head` classifies: (B, C, S, S) -> (B, T, D).

        Raises:
            ValueError: If the images are not as described, or images would stop at an earlier exit, by the knobs or the config.
        """
        given, full = self.config.knobs_for(**knobs), self.config.resolve()
        if given != full:
            raise ValueError(
                f"Expected `max_exit` {full['max_exit']} and infinite `exit_thresholds` for the features of the last exit, got "
                f"{given['max_exit']} and {given['exit_thresholds']}; `model(x, max_exit=...)` classifies at an earlier one."
            )
        check_pixel_values(x, self.config)
        reused = None
        for stage in self.exits:
            tokens, reused = stage(x, reused)
        return tokens

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """The class token: (B, T, D) -> (B, D)."""
        return x[:, 0]

    def forward(self, x: torch.Tensor, **knobs: Any) -> torch.Tensor:
        """Classify images, each at the first exit that is sure enough: (B, C, S, S) -> (B, classes).

        Args:
            x: Normalised images.
            **knobs: `exit_thresholds` and `max_exit`, as in `DynamicVisionTransformerForImageClassification.forward`.
        """
        heads = [nn.Sequential(self.head_drop, head) for head in self.heads]
        given = self.config.knobs_for(**knobs)
        return self.run(x, self.answer_with(heads), given["max_exit"], given["exit_thresholds"])[0]


register_architectures(DynamicVisionTransformer)
