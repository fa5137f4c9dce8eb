"""Configuration of the Dynamic Vision Transformer, and its named architectures."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from .elastic import Budget
from .family_config import FamilyConfig, check_heads
from .query_selection import as_number


# What the networks on T2T-ViT (Yuan et al. 2021) have in common.
T2T_VIT_224: dict[str, Any] = {
    "image_size": 224,
    "stem": "t2t",
    "patches": [[14, 8, 3], [11, 6, 5], [7, 4, 2]],
    "soft_splits": [[3, 2, 1], [3, 2, 1]],
    "stem_dropout_prob": 0.1,
    "positions": "sinusoid",
    "reuse_hidden_size": 128,
    "reuse_size": 48,
    "qkv_bias": False,
    "layer_norm_eps": 1e-5,
}
# timm name -> what differs from the config's defaults.
DVT_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "dvt_nano_32": {},
    "dvt_nano_2exits_32": {
        "hidden_size": 80,
        "intermediate_size": 320,
        "reuse_hidden_size": 40,
        "reuse_size": 15,
        "patches": [[8, 8, 0], [4, 4, 0]],
    },
    "dvt_tiny_32": {
        "hidden_size": 160,
        "intermediate_size": 640,
        "num_hidden_layers": 9,
        "num_attention_heads": 5,
        "reuse_hidden_size": 80,
        "reuse_size": 30,
    },
    "dvt_deit_small_224": {
        "image_size": 224,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "patches": [[32, 32, 0], [23, 23, 3], [16, 16, 0]],
        "reuse_hidden_size": 128,
        "reuse_size": 48,
    },
    "dvt_t2t_vit_12_224": {
        **T2T_VIT_224,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
    },
    "dvt_t2t_vit_14_224": {
        **T2T_VIT_224,
        "hidden_size": 384,
        "intermediate_size": 1152,
        "num_hidden_layers": 14,
        "num_attention_heads": 6,
    },
}


@strict
class DynamicVisionTransformerConfig(FamilyConfig):
    """Configuration of a Dynamic Vision Transformer (Wang et al. 2021): several transformers, each with more tokens.

    Raises:
        ValueError: If a value is out of its range or two values do not fit together.

    Example:
        >>> config = DynamicVisionTransformerConfig(num_labels=10)
        >>> config.grids, [round(config.count_macs(b) / 1e6, 1) for b in config.budgets()]
        ([(4, 4), (6, 6), (8, 8)], [7.2, 25.2, 59.7])
    """

    model_type = "dynamic_vision_transformer"
    title: ClassVar[str] = "Dynamic Vision Transformer"
    about: ClassVar[str] = (
        "Transformers of ever more tokens, one after the other: `max_exit` sets the last one for all images, and with `exit_thresholds` an image stops at the first that is sure enough (Wang et al. 2021)."
    )
    citation: ClassVar[str] = (
        "@inproceedings{wang2021not,\n  title={Not All Images are Worth 16x16 Words: Dynamic Transformers for Efficient Image Recognition},\n  author={Wang, Yulin and Huang, Rui and Song, Shiji and Huang, Zeyi and Huang, Gao},\n  booktitle={NeurIPS},\n  year={2021}\n}"
    )
    unit: ClassVar[str] = "exits"
    knobs: ClassVar[Mapping[str, str]] = {"exit": "max_exit", "p": "exit_thresholds"}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["exits", "exit_logits"]

    named: ClassVar[Mapping[str, Mapping[str, Any]]] = DVT_ARCHITECTURES
    modeling_module: ClassVar[str] = "modeling_dynamic_vision_transformer"
    class_prefix: ClassVar[str] = "DynamicVisionTransformer"
    classifiers: ClassVar[Any] = "heads"

    hidden_size: int = 64  # D
    num_hidden_layers: int = 8  # in each exit's transformer
    num_attention_heads: int = 2
    intermediate_size: int = 256  # of the MLPs
    # What makes the tokens: "patch", a convolution, as in DeiT; or "t2t", soft splits with Performers between them, as in T2T-ViT.
    stem: str = "patch"
    # For each exit the kernel, stride and padding of the convolution, or of the first soft split.
    patches: list[list[int]] | None = None
    soft_splits: list[list[int]] | None = None  # "t2t": those of the soft splits that follow, in every exit
    stem_hidden_size: int = 64  # "t2t": width of the tokens between soft splits
    num_random_features: int = 32  # "t2t": with which a Performer estimates the kernel of its attention
    stem_dropout_prob: float | int = 0.0  # "t2t": in the Performers
    positions: str = "learned"  # or "sinusoid", which is fixed
    feature_reuse: bool = True  # later exits read the tokens of the one before
    relation_reuse: bool = True  # and the scores of its attention
    reuse_hidden_size: int = 32  # u, width of the MLP that prepares the tokens for reuse
    reuse_size: int = 12  # e, channels of a reused token
    hidden_act: str = "gelu"
    qkv_bias: bool = True
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    # Default budget: an image stops at an exit where its top probability is at least the threshold, and at `max_exit`.
    exit_thresholds: Any = None
    max_exit: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.patches is None:
            self.patches = [[8, 8, 0], [7, 5, 0], [4, 4, 0]]
        sizes = ("image_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads")
        self.check_positive(*sizes, "intermediate_size", "reuse_hidden_size", "reuse_size")
        self.check_positive("stem_hidden_size", "num_random_features")
        check_heads(self.hidden_size, self.num_attention_heads)
        self.check_choices(stem=("patch", "t2t"), positions=("learned", "sinusoid"), hidden_act=ACT2FN)
        if self.stem == "t2t":
            self.soft_splits = [[3, 2, 1], [3, 2, 1]] if self.soft_splits is None else self.soft_splits
            if not self.soft_splits:
                raise ValueError("Expected `soft_splits` to be at least one with `stem` 't2t', got [].")
        elif self.soft_splits is not None:
            raise ValueError(f"Expected `soft_splits` to be None with `stem` 'patch', got {self.soft_splits}.")
        for patch in self.patches:
            side = self.image_size
            for i, split in enumerate([patch, *(self.soft_splits or [])]):
                kernel, stride, padding = split if len(split) == 3 else (0, 0, 0)
                if kernel < 1 or stride < 1 or padding < 0 or kernel > side + 2 * padding:
                    field, what = ("soft_splits", "grids") if i else ("patches", "images")
                    raise ValueError(
                        f"Expected `{field}` to be [kernel, stride, padding] that fit {what} of {side}, got {split}."
                    )
                side = (side + 2 * padding - kernel) // stride + 1
        sides = [side for side, _ in self.grids]
        if not sides or any(a > b for a, b in itertools.pairwise(sides)):
            raise ValueError(f"Expected `patches` of at least one exit, with grids that grow, got grids of {sides}.")
        self.check_choices(hidden_act=ACT2FN)
        thresholds = self.resolve(max_exit=self.max_exit, exit_thresholds=self.exit_thresholds)["exit_thresholds"]
        if isinstance(self.exit_thresholds, Iterable):
            self.exit_thresholds = thresholds  # Python's numbers, which config.json can store

    @property
    def fixed_image_size(self) -> bool:
        """Whether weights fit images of `image_size` alone."""
        return self.positions == "learned"

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Rows and columns of each exit's tokens."""
        return [(self.sides(i)[-1],) * 2 for i in range(self.num_exits)]

    @property
    def num_exits(self) -> int:
        """E, the number of exits."""
        return len(self.patches or [])

    def splits(self, exit: int) -> list[list[int]]:
        """Kernel, stride and padding of the convolution or the soft splits that make an exit's tokens, in their order."""
        return [(self.patches or [])[exit], *(self.soft_splits or [])]

    def sides(self, exit: int) -> list[int]:
        """Rows, and columns, of the grid after each of `splits`."""
        side, sides = self.image_size, []
        for kernel, stride, padding in self.splits(exit):
            side = (side + 2 * padding - kernel) // stride + 1
            sides.append(side)
        return sides

    def budgets(self) -> list[Budget]:
        """All images at each exit."""
        return [*(Budget(max_exit=i) for i in range(1, self.num_exits)), Budget()]

    def count_passes(self, budgets: Sequence[Budget], shared: bool) -> float:
        """As in `ElasticConfig`; one run to the last exit serves the earlier exits too."""
        if shared and not any(self.is_adaptive(budget) for budget in budgets):
            return max(self.count_macs(budget) for budget in budgets)
        return super().count_passes(budgets, shared)

    @property
    def nested_steps(self) -> list[int]:
        """All exits."""
        return list(range(1, self.num_exits + 1))

    def adaptive_budgets(self) -> list[Budget]:
        """One threshold for all exits."""
        return [Budget(exit_thresholds=[p] * (self.num_exits - 1)) for p in (0.5, 0.7, 0.8, 0.9, 0.95)]

    def stopping_budget(self, thresholds: Sequence[float]) -> Budget:
        """A threshold for each exit but the last."""
        return Budget(exit_thresholds=[float(t) for t in thresholds])

    def is_adaptive(self, budget: Budget) -> bool:
        """Whether an image can stop early."""
        return any(t != math.inf for t in self.resolve(**budget.kwargs)["exit_thresholds"])

    def resolve(self, **knobs: Any) -> dict[str, Any]:
        """Validate both knobs; missing thresholds become infinity, at which no image stops early.

        Raises:
            ValueError: If a value is out of its range, or there is no such knob.
        """
        self.check_knobs(knobs)
        E = self.num_exits
        last, thresholds = as_number(knobs.get("max_exit")), as_number(knobs.get("exit_thresholds"))
        last = E if last is None else last
        if isinstance(last, bool) or not isinstance(last, int) or not 1 <= last <= E:
            raise ValueError(f"Expected `max_exit` to be an integer in [1, {E}], got {last!r}.")
        several = isinstance(thresholds, Iterable)
        values = [as_number(t) for t in thresholds] if several else [math.inf if thresholds is None else thresholds]
        if (several and len(values) != E - 1) or any(
            isinstance(t, bool) or not isinstance(t, (int, float)) or not t >= 0 for t in values
        ):
            raise ValueError(
                f"Expected `exit_thresholds` to be a number of at least 0 or {E - 1} of them, where infinity stops no image, "
                f"got {thresholds!r}."
            )
        return {"max_exit": last, "exit_thresholds": [float(t) for t in (values if several else values * (E - 1))]}

    def count_macs(self, budget: Budget | None = None, output: Any = None) -> Any:
        """Multiply-accumulates of an image; see `ElasticConfig.count_macs`.

        With thresholds and without `output`, counts an image that goes to the last exit.
        """
        last = self.resolve(**(self.default_budget if budget is None else budget).kwargs)["max_exit"]
        after = [0]
        for i in range(self.num_exits):
            after.append(after[-1] + self.exit_macs(i))
        return after[last] if output is None else torch.tensor(after)[output.used.cpu()]

    def exit_macs(self, exit: int) -> int:
        """Multiply-accumulates of one exit's transformer, classifier and reuse of the exit before."""
        D, L, H, M = self.hidden_size, self.num_hidden_layers, self.num_attention_heads, self.intermediate_size
        T = self.grids[exit][0] * self.grids[exit][1] + 1
        macs = self.stem_macs(exit) + L * (T * (4 * D**2 + 2 * D * M) + 2 * T**2 * D)
        if exit and self.feature_reuse:
            before = self.grids[exit - 1][0] * self.grids[exit - 1][1] + 1
            u, e = self.reuse_hidden_size, self.reuse_size
            macs += L * (before * (D * u + u * e) + T * e * M)
        if exit and self.relation_reuse:
            before = self.grids[exit - 1][0] * self.grids[exit - 1][1] + 1
            macs += 6 * (H * L) ** 2 * before**2
        return macs + D * len(self.label_names)

    def stem_macs(self, exit: int) -> int:
        """The part of `exit_macs` that makes tokens of an image."""
        d, m = self.stem_hidden_size, self.num_random_features
        *inner, last = [side**2 for side in self.sides(exit)]
        channels, macs = self.num_channels, 0
        for N, (kernel, _, _) in zip(inner, self.splits(exit), strict=False):
            # A Performer: queries, keys and values; features of the first two; sums over keys, read by queries; three linears.
            macs += N * (3 * channels * kernel**2 * d + 2 * m * d + (2 * d + 1) * m + 3 * d**2)
            channels = d
        return macs + last * channels * self.splits(exit)[-1][0] ** 2 * self.hidden_size


__all__ = ["DynamicVisionTransformerConfig"]
