"""QnA-ViT as a timm model; importing this file registers its architectures."""

from typing import Any

import torch

from .modeling_qna_vit import QnAViTParts, QnAViTPreTrainedModel
from .timm_family import TimmClassifier, register_architectures


class QnAViT(QnAViTParts, TimmClassifier):
    """QnA-ViT with timm's interface.

    Example:
        >>> import timm
        >>> model = timm.create_model("qna_vit_nano_32").eval()
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    pretrained_class = QnAViTPreTrainedModel

    def forward_features(self, x: torch.Tensor, **knobs: Any) -> torch.Tensor:
        """Positions of the last stage: (B, C, S, S) -> (B, N, D)."""
        self.config.knobs_for(**knobs)
        return self.run(x)


register_architectures(QnAViT)
