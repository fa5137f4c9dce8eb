"""Configuration of QnA-ViT, and its named architectures."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from .elastic import Budget
from .family_config import FamilyConfig, check_heads
from .query_selection import as_number  # noqa: F401  transformers 5.4 copies what this file imports alone


IMAGENET: dict[str, Any] = {
    "image_size": 224,
    "stem_stride": 4,
    "hidden_sizes": [64, 128, 256, 512],
    "local_depths": [0, 0, 4, 2],
    "qna_depths": [2, 3, 2, 0],
    "qna_heads": [8, 16, 32, 64],
    "local_heads": [2, 4, 8, 16],
    "window_sizes": [7, 7, 14, 7],
    "drop_path_rate": 0.05,
}
# timm name -> what differs from the config's defaults.
QNA_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qna_vit_nano_32": {},
    "qna_vit_tiny_32": {
        "hidden_sizes": [80, 160, 320],
        "local_depths": [0, 8, 1],
        "qna_heads": [10, 20, 40],
        "local_heads": [5, 5, 10],
    },
    "qna_vit_tiny_224": IMAGENET,
    "qna_vit_tiny_7x7_224": {**IMAGENET, "kernel_size": 7},
    "qna_vit_small_224": {**IMAGENET, "local_depths": [0, 0, 12, 2], "qna_depths": [2, 3, 6, 0], "drop_path_rate": 0.2},
    "qna_vit_base_224": {
        **IMAGENET,
        "hidden_sizes": [96, 192, 384, 768],
        "local_depths": [0, 0, 12, 2],
        "qna_depths": [2, 3, 6, 0],
        "qna_heads": [6, 12, 24, 48],
        "local_heads": [3, 6, 12, 24],
        "drop_path_rate": 0.5,
    },
}


@strict
class QnAViTConfig(FamilyConfig):
    """Configuration of QnA-ViT (Arar et al. 2022, "Learned Queries for Efficient Local Attention").

    Static: it has no knobs, and one budget.

    Raises:
        ValueError: If a value is out of its range or two values do not fit together.

    Example:
        >>> QnAViTConfig(num_labels=10).count_macs() / 1e6
        57.077504
    """

    model_type = "qna_vit"
    title: ClassVar[str] = "QnA-ViT"
    about: ClassVar[str] = "Local attention of learned queries; a static network (Arar et al. 2022)."
    citation: ClassVar[str] = (
        "@inproceedings{arar2022learned,\n  title={Learned Queries for Efficient Local Attention},\n  author={Arar, Moab and Shamir, Ariel and Bermano, Amit H.},\n  booktitle={CVPR},\n  year={2022}\n}"
    )
    unit: ClassVar[str] = "networks"
    knobs: ClassVar[Mapping[str, str]] = {}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["used"]
    named: ClassVar[Mapping[str, Mapping[str, Any]]] = QNA_ARCHITECTURES
    modeling_module: ClassVar[str] = "modeling_qna_vit"
    class_prefix: ClassVar[str] = "QnAViT"
    first_conv: ClassVar[Any] = "stem"

    stem_stride: int = 2  # kernel and stride of the first convolution
    # For each stage its width, the numbers of local self-attention blocks and of QnA blocks after them, and their heads.
    hidden_sizes: list[int] | None = None
    local_depths: list[int] | None = None
    qna_depths: list[int] | None = None
    qna_heads: list[int] | None = None
    local_heads: list[int] | None = None
    window_sizes: list[int] | None = None  # of local self-attention
    kernel_size: int = 3  # k, of the QnA layer's windows
    num_queries: int = 2  # of each QnA layer
    mlp_ratio: int = 4
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02  # of the learned scale; linears are normal with variance 1 / fan-in
    drop_path_rate: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        defaults = {
            "hidden_sizes": [32, 64, 128],
            "local_depths": [0, 6, 1],
            "qna_depths": [4, 5, 0],
            "qna_heads": [4, 8, 16],
            "local_heads": [2, 2, 4],
            "window_sizes": [8, 8, 4],
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.check_positive("image_size", "num_channels", "stem_stride", "kernel_size", "num_queries", "mlp_ratio")
        stages = len(self.stages)
        for name in defaults:
            if len(getattr(self, name)) != stages:
                raise ValueError(f"Expected {stages} of `{name}`, one for each stage, got {getattr(self, name)}.")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"Expected `kernel_size` to be odd, got {self.kernel_size}.")
        self.check_choices(hidden_act=ACT2FN)
        if self.image_size % (self.stem_stride * 2 ** (stages - 1)):
            raise ValueError(
                f"Expected `image_size` to be a multiple of {self.stem_stride * 2 ** (stages - 1)}, got {self.image_size}."
            )
        for i, (width, side) in enumerate(self.stages):
            check_heads(width, (self.qna_heads or [])[i], "qna_heads")
            check_heads(width, (self.local_heads or [])[i], "local_heads")
            window = (self.window_sizes or [])[i]
            if (self.local_depths or [])[i] and side % window:
                raise ValueError(f"Expected `window_sizes` to divide the stage's side {side}, got {window}.")
            if i and width != 2 * self.stages[i - 1][0]:
                raise ValueError(f"Expected `hidden_sizes` to double from stage to stage, got {self.hidden_sizes}.")

    @property
    def stages(self) -> list[tuple[int, int]]:
        """Width and side of each stage."""
        return [(width, self.image_size // self.stem_stride // 2**i) for i, width in enumerate(self.hidden_sizes or [])]

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks."""
        return sum(self.local_depths or []) + sum(self.qna_depths or []) + len(self.stages) - 1

    @property
    def hidden_size(self) -> int:
        """Width of the last stage."""
        return (self.hidden_sizes or [])[-1]

    def budgets(self) -> list[Budget]:
        """The full network."""
        return [Budget()]

    def resolve(self, **knobs: Any) -> dict[str, Any]:
        """No knobs.

        Raises:
            ValueError: If a knob is given.
        """
        if knobs:
            raise ValueError(f"Expected no knobs, as the network is static, got {', '.join(sorted(knobs))}.")
        return {}

    def count_macs(self, budget: Budget | None = None, output: Any = None) -> Any:
        """Multiply-accumulates of an image; see `ElasticConfig.count_macs`."""
        self.resolve(**(budget or Budget()).kwargs)
        macs = self.hidden_size * len(self.label_names)
        for i, (C, side) in enumerate(self.stages):
            HW, w, h = side**2, (self.window_sizes or [])[i], (self.qna_heads or [])[i]
            if i == 0:
                macs += HW * self.num_channels * self.stem_stride**2 * C
            r = self.mlp_ratio
            macs += (self.local_depths or [])[i] * HW * ((4 + 2 * r) * C**2 + 2 * w**2 * C)
            macs += (self.qna_depths or [])[i] * self.qna_macs(C, C, h, HW, HW)
            if i + 1 < len(self.stages):
                macs += self.qna_macs(C, 2 * C, (self.qna_heads or [])[i + 1], HW, HW // 4) + HW // 4 * C * 2 * C
        return macs if output is None else torch.full_like(output.used.cpu(), macs)

    def qna_macs(self, C: int, F: int, h: int, HW: int, out: int) -> int:
        """Multiply-accumulates of a QnA block from C to F channels, without a shortcut's convolution."""
        n, k = self.num_queries, self.kernel_size
        return n * C * F + HW * (C * n * h + C * F) + out * (k**2 * n * (F + h) + (1 + 2 * self.mlp_ratio) * F**2)


__all__ = ["QnAViTConfig"]
