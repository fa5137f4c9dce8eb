"""QnA-ViT as a timm model; importing this file registers its architectures."""

from typing import Any

import torch

from .configuration_qna_vit import QnAViTConfig
from .modeling_qna_vit import QnAViTParts, init_weights
from .timm_family import TimmClassifier, register_architectures


class QnAViT(TimmClassifier, QnAViTParts):
    """QnA-ViT with timm's interface.

    Example:
        >>> import timm
        >>> model = timm.create_model("qna_vit_nano_32").eval()
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    config_class = QnAViTConfig
    base_prefix = "qna_vit"
    initialise = staticmethod(init_weights)
    build_parts = QnAViTParts.build_parts

    def forward_features(self, x: torch.Tensor, **knobs: Any) -> torch.Tensor:
        """Positions of the last stage: (B, C, S, S) -> (B, N, D)."""
        self.knobs_of(knobs)
        return self.run(x)


register_architectures(__name__, QnAViT)
