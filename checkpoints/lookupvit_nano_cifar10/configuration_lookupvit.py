"""Configuration of LookupViT, and its named architectures."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from .elastic import Budget
from .family_config import FamilyConfig, check_heads
from .query_selection import as_number


# timm name -> what differs from the config's defaults.
LOOKUPVIT_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "lookupvit_nano_patch4_32": {},
    "lookupvit_tiny_patch4_32": {"hidden_size": 192, "num_hidden_layers": 9},
    "lookupvit_small_patch16_224": {
        "image_size": 224,
        "patch_size": 16,
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "max_compressed_size": 10,
    },
    "lookupvit_base_patch16_224": {
        "image_size": 224,
        "patch_size": 16,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_compressed_size": 10,
    },
}


@strict
class LookupViTConfig(FamilyConfig):
    """Configuration of LookupViT (Koner et al. 2024): a ViT on a small grid of compressed tokens, beside the full grid.

    The article has no code; fields marked "open" are choices that it leaves open.

    Raises:
        ValueError: If a value is out of its range or two values do not fit together.

    Example:
        >>> config = LookupViTConfig(num_labels=10)
        >>> [round(config.count_macs(Budget(compressed_size=side)) / 1e6, 1) for side in (2, 5, 8)]
        [15.2, 32.3, 66.2]
    """

    model_type = "lookupvit"
    title: ClassVar[str] = "LookupViT"
    about: ClassVar[str] = (
        "A ViT on a small grid of compressed tokens that gathers from the full grid and writes back to it: `compressed_size` sets the grid (Koner et al. 2024)."
    )
    citation: ClassVar[str] = (
        "@inproceedings{koner2024lookupvit,\n  title={LookupViT: Compressing visual information to a limited number of tokens},\n  author={Koner, Rajat and Jain, Gagan and Jain, Prateek and Tresp, Volker and Paul, Sujoy},\n  booktitle={ECCV},\n  year={2024}\n}"
    )
    unit: ClassVar[str] = "tokens"
    knobs: ClassVar[Mapping[str, str]] = {"grid": "compressed_size"}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["tokens", "compressed_logits", "lookup_logits"]
    named: ClassVar[Mapping[str, Mapping[str, Any]]] = LOOKUPVIT_ARCHITECTURES
    modeling_module: ClassVar[str] = "modeling_lookupvit"
    class_prefix: ClassVar[str] = "LookupViT"
    fixed_image_size: ClassVar[Any] = True
    first_conv: ClassVar[Any] = "embeddings.projection"
    classifiers: ClassVar[Any] = ("head", "lookup_head")

    patch_size: int = 4
    hidden_size: int = 96  # D
    num_hidden_layers: int = 5
    num_attention_heads: int = 3
    max_compressed_size: int = 8  # the largest grid of compressed tokens, rows or columns
    mlp_ratio: float | int = 4  # p, relative width of the compressed tokens' MLP
    lookup_mlp_ratio: float | int = 0.5  # 1 / q, relative width of the lookup tokens' MLP
    # Open: how compressed tokens write back. "transpose" uses the transposed weights of the gathering attention, as the article
    # says; "softmax" a softmax of its transposed scores, so that each lookup token receives an average.
    infusion: str = "transpose"
    classify_with: str = "both"  # at inference: "both" classifiers, averaged, or the "compressed" tokens' alone
    hidden_act: str = "gelu"
    qkv_bias: bool = True
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    compressed_size: Any = None  # the default budget: side of the grid of compressed tokens; None is the largest

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        sizes = ("image_size", "num_channels", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        self.check_positive(*sizes, "max_compressed_size")
        check_heads(self.hidden_size, self.num_attention_heads)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"Expected `image_size` to be a multiple of `patch_size`, got {self.image_size} and {self.patch_size}."
            )
        if self.max_compressed_size > self.image_size // self.patch_size:
            raise ValueError(
                f"Expected `max_compressed_size` to be at most {self.image_size // self.patch_size}, the grid of patches, "
                f"got {self.max_compressed_size}."
            )
        self.check_choices(infusion=("transpose", "softmax"), classify_with=("both", "compressed"), hidden_act=ACT2FN)
        self.resolve(compressed_size=self.compressed_size)

    @property
    def num_patches(self) -> int:
        """N, the number of lookup tokens."""
        return (self.image_size // self.patch_size) ** 2

    def budgets(self) -> list[Budget]:
        """Grids from 2 x 2 to the largest."""
        sides = range(min(2, self.max_compressed_size), self.max_compressed_size)
        return [*(Budget(compressed_size=side) for side in sides), Budget()]

    def resolve(self, **knobs: Any) -> dict[str, Any]:
        """Validate the knob: a side, (rows, columns), or a side for each image; None is the largest grid.

        Raises:
            ValueError: If a value is out of its range, or there is no such knob.
        """
        self.check_knobs(knobs)
        most = self.max_compressed_size
        size: Any = as_number(knobs.get("compressed_size"))
        size = most if size is None else size
        each = isinstance(size, torch.Tensor)
        values = size.tolist() if each else list(size) if isinstance(size, (list, tuple)) else [size]
        if any(isinstance(v, bool) or not isinstance(v, int) or not 1 <= v <= most for v in values) or not (
            each or not isinstance(size, (list, tuple)) or len(values) == 2
        ):
            raise ValueError(
                f"Expected `compressed_size` to be an integer in [1, {most}] or two of them, got {size!r}."
            )
        return {"compressed_size": size if each else values[0] if len(set(values)) == 1 else tuple(values)}

    def count_macs(self, budget: Budget | None = None, output: Any = None) -> Any:
        """Multiply-accumulates of an image; see `ElasticConfig.count_macs`."""
        size = self.resolve(**(self.default_budget if budget is None else budget).kwargs)["compressed_size"]
        if output is not None:
            return torch.tensor([self.macs_of(tokens) for tokens in output.used.tolist()])
        return self.macs_of(size**2 if isinstance(size, int) else size[0] * size[1])

    def macs_of(self, M: int) -> int:
        """Multiply-accumulates with M compressed tokens."""
        N, D, labels = self.num_patches, self.hidden_size, len(self.label_names)
        wide, narrow = int(D * self.mlp_ratio), int(D * self.lookup_mlp_ratio)
        block = (3 * N * M + 2 * M**2) * D + (2 * M + 4 * M + M + 3 * N) * D**2 + 2 * M * D * wide + 2 * N * D * narrow
        heads = 2 if self.classify_with == "both" else 1
        return N * self.num_channels * self.patch_size**2 * D + self.num_hidden_layers * block + heads * D * labels


__all__ = ["LookupViTConfig"]
