"""LookupViT as a timm model; importing this file registers its architectures."""

from typing import Any

import torch

from .elastic import check_pixel_values
from .modeling_lookupvit import LookupViTParts, LookupViTPreTrainedModel
from .timm_family import TimmClassifier, register_architectures


class LookupViT(LookupViTParts, TimmClassifier):
    """LookupViT with timm's interface; `forward_features` gives the compressed tokens, then the lookup tokens.

    Example:
        >>> import timm
        >>> model = timm.create_model("lookupvit_nano_patch4_32").eval()
        >>> model(torch.zeros(2, 3, 32, 32), compressed_size=3).shape
        torch.Size([2, 10])
    """

    pretrained_class = LookupViTPreTrainedModel

    def build_heads(self) -> None:
        """A classifier for each kind of tokens."""
        self.head, self.lookup_head = self.new_head(), self.new_head()

    def forward_features(self, x: torch.Tensor, **knobs: Any) -> torch.Tensor:
        """Compressed tokens, then lookup tokens: (B, C, S, S) -> (B, M + N, D)."""
        check_pixel_values(x, self.config)
        return torch.cat(self.run(x, self.config.knobs_for(**knobs)["compressed_size"]), dim=1)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool and classify: (B, M + N, D) -> (B, classes), or with `pre_logits` the mean compressed token (B, D)."""
        N = self.config.num_patches
        first, second = self.head_drop(x[:, :-N].mean(1)), self.head_drop(x[:, -N:].mean(1))
        if pre_logits or self.config.classify_with == "compressed":
            return first if pre_logits else self.head(first)
        return (self.head(first) + self.lookup_head(second)) / 2


register_architectures(LookupViT)
