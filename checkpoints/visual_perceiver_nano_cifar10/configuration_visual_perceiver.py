"""Configuration of the Visual Perceiver, and its named architectures."""

import math
import operator
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from .conv_stem import check_stem
from .elastic import Budget
from .family_config import FamilyConfig, check_heads
from .macs import count_decoder_macs, count_extension_macs, count_macs, count_trunk_macs
from .query_selection import as_number, checked_threshold


# timm name -> what differs from the paper's model. Widths of the 224 models are DeiT's.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "visual_perceiver_nano_patch4_32": {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 6},
    "visual_perceiver_tiny_patch4_32": {},
    "visual_perceiver_nano_conv_32": {
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "stem": "conv",
        "stem_widths": [[16], [32], [64]],
    },
    "visual_perceiver_micro_conv_32": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "stem": "conv",
        "stem_widths": [[16], [40], [96]],
    },
    "visual_perceiver_micro_levels_32": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_queries": 32,
        "stem": "conv",
        "stem_widths": [[24, 12], [12, 48], [48, 48], [48]],
        "stem_residual": True,
        "patch_size": 8,
        "level_starts": [1, 2, 4, 8, 16],
        "level_widths": [12, 8, 12, 16, 8],
        "hidden_act": "relu",  # faster than GELU on CPUs
        "trunk_attention": "block_causal",
        "decoder_reads": "last_block",
    },
    "visual_perceiver_tiny_conv_32": {
        "num_hidden_layers": 8,
        "stem": "conv",
        "stem_widths": [[32], [64, 64], [128, 128]],
        "stem_residual": True,
    },
    "visual_perceiver_tiny_patch16_224": {"image_size": 224, "patch_size": 16, "num_queries": 196},
    "visual_perceiver_small_patch16_224": {
        "image_size": 224,
        "patch_size": 16,
        "num_queries": 196,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_attention_heads": 6,
    },
    "visual_perceiver_base_patch16_224": {
        "image_size": 224,
        "patch_size": 16,
        "num_queries": 196,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
    },
}


@strict
class VisualPerceiverConfig(FamilyConfig):
    """Configuration of a Visual Perceiver; the defaults are the paper's CIFAR-10 model (section 3).

    Raises:
        ValueError: If a value is out of its range or two values do not fit together.

    Example:
        >>> config = VisualPerceiverConfig.from_architecture("visual_perceiver_nano_patch4_32", num_labels=10)
        >>> config.hidden_size, config.num_patches
        (96, 64)
    """

    model_type = "visual_perceiver"
    unit: ClassVar[str] = "queries"
    knobs: ClassVar[Mapping[str, str]] = {"K": "num_active_queries", "t": "dqs_threshold"}
    title: ClassVar[str] = "Visual Perceiver"
    about: ClassVar[str] = (
        "`num_active_queries` (K) uses the first K of its learned queries, `dqs_threshold` (t) drops, per image, the queries "
        "that read nearly the same as an earlier one (Dynamic Query Selection, Dancette & Cord 2022). Fewer queries are less "
        "work and less time. MACs with t include reading and comparing all queries before some are dropped."
    )
    citation: ClassVar[str] = """@inproceedings{dancette2022dynamic,
  title={Dynamic Query Selection for Fast Visual Perceiver},
  author={Dancette, Corentin and Cord, Matthieu},
  booktitle={CVPR Workshops},
  year={2022}
}"""
    named: ClassVar[Mapping[str, Mapping[str, Any]]] = ARCHITECTURES
    modeling_module: ClassVar[str] = "modeling_visual_perceiver"
    class_prefix: ClassVar[str] = "VisualPerceiver"
    square: ClassVar[bool] = False
    timm_names: ClassVar[Mapping[str, str]] = {
        **FamilyConfig.timm_names,
        "hidden_size": "embed_dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
        "num_cross_attention_heads": "num_cross_heads",
        "hidden_act": "act_layer",
        "layer_norm_eps": "norm_eps",
        "hidden_dropout_prob": "proj_drop_rate",
        "attention_probs_dropout_prob": "attn_drop_rate",
    }
    # transformers' Trainer hands every other output to `compute_metrics`, which expects the logits.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["active_queries"]

    image_size: int | list[int] | tuple[int, int] = 32  # type: ignore[assignment]  # pixels, or (height, width)
    patch_size: int = 4  # pixels
    hidden_size: int = 192  # D
    num_hidden_layers: int = 12  # self-attention blocks between cross-attention and decoder
    num_attention_heads: int = 3  # in the blocks and the decoder
    intermediate_size: int = 768  # width of every MLP
    num_queries: int = 64  # Q
    num_cross_attention_heads: int = 1  # the paper's attention maps need one
    # How an image becomes tokens: "patch", the paper's linear map of patches, or "conv", stages of 3x3 convolutions with batch
    # norm and a 1x1 projection. `stem_widths` has the output channels of each stage's convolutions. Each stage halves the
    # resolution, so patch_size = 2 ** (stages - 1).
    stem: str = "patch"
    stem_widths: list[list[int]] | None = None
    stem_downsample: str = "pool"  # between stages: "pool" (max pooling), or "stride" of the next convolution
    stem_residual: bool = False  # a shortcut around each convolution that keeps its channels and resolution
    # Levels of a convolutional stem: queries from `level_starts[i]` on read a stem whose second convolution has
    # `level_widths[i]` more channels, and later ones in proportion; see `StemLevel`. None is one level.
    level_starts: list[int] | None = None
    level_widths: list[int] | None = None
    # Which queries see each other in the blocks: "full", all (the paper), or "block_causal": a query sees those of its own and
    # of earlier blocks, so that the tokens of the first K queries do not depend on later ones.
    trunk_attention: str = "full"
    query_blocks: list[int] | None = None  # where blocks of queries end; None is 1, 2, 4, 8, ... up to Q
    # What the output query reads: "all" tokens (the paper), or those of the "last_block" that an image uses, which have seen
    # all others in a block-causal trunk. Trained for all budgets, an output query that reads all tokens relies on the first
    # ones, which every budget has.
    decoder_reads: str = "all"
    # In training with a block-causal trunk, the probability that an image's queries see only their own block. Without it,
    # later blocks copy what earlier ones have read, and their levels of the stem learn little.
    block_drop_rate: float | int = 0.0
    # How queries and positions start: "random", or "spatial": the first K queries tile the image for every power of two K.
    query_init: str = "random"
    # How attention in the blocks starts: "random", or "mimetic", similar to trained networks (Trockman & Kolter 2023).
    attention_init: str = "random"
    hidden_act: str = "gelu"
    qkv_bias: bool = True
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02  # standard deviation of the truncated normal
    hidden_dropout_prob: float | int = 0.0  # after projections, MLPs and position embeddings
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0  # stochastic depth of the last block; grows linearly from 0 at the first
    # The default budget, for arguments of `forward` of the same name that are None.
    num_active_queries: Any = None  # K: use the first K queries; None is all
    dqs_threshold: Any = None  # t: drop queries more similar than this to an earlier one; None is off
    dqs_reference: str = "all"  # selection compares with "all" earlier queries, or only with "kept" ones

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if isinstance(self.image_size, (list, tuple)):
            self.image_size = list(self.image_size)
            if len(self.image_size) != 2:
                raise ValueError(f"Expected `image_size` to be an int or (height, width), got {self.image_size}.")
            if self.image_size[0] == self.image_size[1]:
                self.image_size = self.image_size[0]
        self._check()

    def _check(self) -> None:
        sizes = ("patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads")
        self.check_positive(*sizes, "intermediate_size", "num_queries", "num_cross_attention_heads")
        for name in ("num_attention_heads", "num_cross_attention_heads"):
            check_heads(self.hidden_size, getattr(self, name), name)
        self.check_choices(
            stem=("patch", "conv"),
            trunk_attention=("full", "block_causal"),
            decoder_reads=("all", "last_block"),
            query_init=("random", "spatial"),
            attention_init=("random", "mimetic"),
            dqs_reference=("all", "kept"),
            hidden_act=ACT2FN,
        )
        if any(side < self.patch_size or side % self.patch_size for side in self.image_height_width):
            raise ValueError(
                f"Expected `image_size` to be a positive multiple of `patch_size`, got {self.image_size} and {self.patch_size}."
            )
        if self.stem == "patch" and self.stem_widths is not None:
            raise ValueError(f"Expected `stem_widths` to be None with `stem` 'patch', got {self.stem_widths!r}.")
        if self.stem == "conv":
            check_stem(self.stem_widths or [], self.stem_downsample)
            stride = 2 ** (len(self.stem_widths or []) - 1)
            if self.patch_size != stride:
                raise ValueError(
                    f"Expected `patch_size` to be {stride}, by which {len(self.stem_widths or [])} stages of a stem divide "
                    f"an image's sides, got {self.patch_size}."
                )
        self._check_levels()
        if self.query_init == "spatial" and self.hidden_size % 4:
            raise ValueError(
                f"Expected `hidden_size` to be a multiple of 4 with `query_init` 'spatial', got {self.hidden_size}."
            )
        if self.query_blocks is not None:
            ends = self.query_blocks
            ascending = all(a < b for a, b in zip([0, *ends], ends, strict=False))
            if not ends or not ascending or ends[-1] != self.num_queries:
                raise ValueError(
                    f"Expected `query_blocks` to ascend from at least 1 to `num_queries` = {self.num_queries}, got {ends}."
                )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "block_drop_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"Expected `{name}` to be in [0, 1), got {getattr(self, name)}.")
        if self.dqs_threshold is not None:
            checked_threshold(self.dqs_threshold)
        self.operating_point()

    def _check_levels(self) -> None:
        starts, added, widths = self.level_starts, self.level_widths, self.stem_widths or []
        if starts is None and added is None:
            return
        if self.stem != "conv":
            raise ValueError(f"Expected `stem` to be 'conv' with `level_starts`, got {self.stem!r}.")
        if not all(widths) or sum(map(len, widths)) < 2:
            raise ValueError(
                f"Expected convolutions in each of `stem_widths`, and 2 at least, with levels, got {widths}."
            )
        starts, added = starts or [], added or []
        if not starts or any(a >= b for a, b in zip([0, *starts], [*starts, self.num_queries], strict=True)):
            raise ValueError(
                f"Expected `level_starts` to ascend within 1 to {self.num_queries - 1}, the last query, got {starts}."
            )
        if len(added) != len(starts) or min(added) < 1:
            raise ValueError(
                f"Expected {len(starts)} `level_widths` of at least 1, one for each of `level_starts`, got {added}."
            )
        _, *own = (width for stage in widths for width in stage)
        if any(width * more % own[0] for width in own for more in added):
            raise ValueError(f"Expected `level_widths` in proportion to {own}, the stem's, got {added}.")

    @property
    def summary(self) -> str:
        """The sizes of the network, in some words."""
        return f"{super().summary}, {self.num_queries} queries"

    @property
    def block_ends(self) -> list[int]:
        """Where blocks of queries end: in a block-causal trunk, the K whose tokens do not change when K grows.

        Example:
            >>> VisualPerceiverConfig(num_queries=6).block_ends
            [1, 2, 4, 6]
        """
        if self.query_blocks is not None:
            return list(self.query_blocks)
        return [2**i for i in range((self.num_queries - 1).bit_length())] + [self.num_queries]

    def first_decoded(self, num_active_queries: int) -> int:
        """The first of K queries that the output query reads.

        Example:
            >>> config = VisualPerceiverConfig.from_architecture("visual_perceiver_micro_levels_32")
            >>> [config.first_decoded(K) for K in (1, 2, 4, 5, 32)]
            [0, 1, 2, 4, 16]
        """
        if self.decoder_reads == "all":
            return 0
        return max(end for end in [0, *self.block_ends] if end < num_active_queries)

    @property
    def num_levels(self) -> int:
        """Number of levels of the stem; 1 without `level_starts`."""
        return 1 + len(self.level_starts or [])

    def query_spans(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """The levels that queries from `start` up to `end` read: (level, first query, one after the last).

        Example:
            >>> config = VisualPerceiverConfig.from_architecture("visual_perceiver_micro_levels_32")
            >>> config.query_spans(0, 6)
            [(0, 0, 1), (1, 1, 2), (2, 2, 4), (3, 4, 6)]
        """
        if not self.level_starts:
            return [(0, start, end)]  # no comparison: K may be symbolic in a traced graph
        edges = [0, *self.level_starts, self.num_queries]
        spans = [(i, max(start, edges[i]), min(end, edges[i + 1])) for i in range(len(edges) - 1)]
        return [span for span in spans if span[1] < span[2]]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.image_height_width
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """N, the number of input tokens."""
        return math.prod(self.grid)

    def budgets(self) -> list[Budget]:
        """K = 1, 2, 4, 8, ... and all queries.

        Example:
            >>> VisualPerceiverConfig(num_queries=3).budgets()
            [Budget(num_active_queries=1), Budget(num_active_queries=2), Budget()]
        """
        powers = [2**i for i in range((self.num_queries - 1).bit_length())]
        return [*(Budget(num_active_queries=K) for K in powers), Budget()]

    def ladder(self) -> list[Budget]:
        """Every K."""
        return [*(Budget(num_active_queries=K) for K in range(1, self.num_queries)), Budget()]

    def adaptive_budgets(self) -> list[Budget]:
        """The thresholds of the paper's Table 3, with all queries."""
        return [Budget(dqs_threshold=t) for t in (0.6, 0.65, 0.7, 0.8, 0.9, 0.99)]

    def is_adaptive(self, budget: Budget) -> bool:
        """Whether the budget selects queries per image."""
        return self.resolve(**budget.kwargs)["dqs_threshold"] != math.inf

    def candidates(self, knobs: Sequence[str] = ()) -> list[Budget]:
        """Budgets K, thresholds t, or thresholds at several K; see `ElasticConfig.candidates`.

        Example:
            >>> [budget.short({"K": "num_active_queries"}) for budget in VisualPerceiverConfig(num_queries=6).candidates()]
            ['K=1', 'K=2', 'K=3', 'K=4', 'K=5', 'full']
        """
        names, Q = set(self.knob_names(knobs)), self.num_queries
        thresholds = [*(round(0.5 + 0.05 * i, 2) for i in range(10)), 0.98, 0.99]
        found, K = [], 1
        while "num_active_queries" in names and K < Q:
            found.append(Budget(num_active_queries=K))
            K += max(1, K // 8)  # each K up to 8, then steps of about an eighth
        if len(names) == 2:
            caps = sorted({max(1, Q * eighths // 8) for eighths in (1, 2, 3, 4, 6, 8)})
            found += [Budget(num_active_queries=K, dqs_threshold=t) for K in caps for t in thresholds[4:]]
        elif "dqs_threshold" in names:
            found += [Budget(dqs_threshold=t) for t in thresholds]
        return [*found, Budget()]

    def resolve(self, **knobs: Any) -> dict[str, Any]:
        """Validate both knobs; a missing K becomes Q, a missing t infinity, which turns selection off.

        Raises:
            ValueError: If a value is out of its range, or there is no such knob.

        Example:
            >>> VisualPerceiverConfig(dqs_threshold=0.8).resolve(num_active_queries=16)
            {'num_active_queries': 16, 'dqs_threshold': inf}
        """
        self.check_knobs(knobs)
        K, t = knobs.get("num_active_queries"), knobs.get("dqs_threshold")
        K, t = self.operating_point(self.num_queries if K is None else K, math.inf if t is None else t)
        return {"num_active_queries": K, "dqs_threshold": math.inf if t is None else t}

    def count_macs(self, budget: Budget | None = None, output: Any = None) -> Any:
        """Multiply-accumulates of an image; see `ElasticConfig.count_macs`.

        With a threshold and without `output`, counts an image that keeps all queries.

        Example:
            >>> config = VisualPerceiverConfig(num_labels=10)
            >>> config.count_macs(Budget(num_active_queries=8)), config.count_macs(Budget())
            (52179840, 394200960)
        """
        knobs = self.resolve(**(self.default_budget if budget is None else budget).kwargs)
        K, selects = knobs["num_active_queries"], knobs["dqs_threshold"] != math.inf
        if output is None and isinstance(K, int):
            return count_macs(self, K, K if selects else None)
        most = torch.as_tensor(K)
        used = most if output is None else output.used.cpu()
        pairs = torch.stack(torch.broadcast_tensors(used, most), dim=-1).reshape(-1, 2)
        kinds, which = pairs.unique(dim=0, return_inverse=True)
        macs = [count_macs(self, k, c if selects else None) for k, c in kinds.tolist()]
        return torch.tensor(macs)[which]

    def count_passes(self, budgets: Sequence[Budget], shared: bool) -> float:
        """As in `ElasticConfig`; images are read once, and a block-causal trunk runs once for budgets at ends of blocks."""
        K = [self.resolve(**budget.kwargs)["num_active_queries"] for budget in budgets]
        if not shared:
            return sum(count_macs(self, k) for k in K) / len(K)
        largest = max(K)
        others = sorted(K)[:-1]
        total = count_macs(self, largest)
        if self.trunk_attention == "block_causal" and set(others) <= set(self.block_ends):
            return total + sum(count_decoder_macs(self, k) for k in others)
        D, M = self.hidden_size, self.intermediate_size
        return total + sum(count_trunk_macs(self, k) + k * (D**2 + 2 * D * M) for k in others)

    @property
    def nested_steps(self) -> list[int] | None:
        """Ends of blocks of a block-causal trunk."""
        return self.block_ends if self.trunk_attention == "block_causal" else None

    def count_chosen(self, budgets: Sequence[Budget]) -> list[int]:
        """Multiply-accumulates of an image at each budget, if all queries of the last budget read before one is chosen."""
        D, N = self.hidden_size, self.num_patches
        steps = [self.resolve(**budget.kwargs)["num_active_queries"] for budget in budgets]
        return [count_macs(self, K) + (steps[-1] - K) * (D**2 + 2 * N * D) for K in steps]

    def count_stages(self, budgets: Sequence[Budget]) -> list[int]:
        """Multiply-accumulates of an image that is classified with K queries, then with more, by `start` and `extend`.

        Reading counts once, for the queries of the last stage, and so does a block-causal trunk if the stages are ends of
        blocks. Otherwise the trunk counts once per stage, as the decoder and head always do.

        Example:
            >>> config = VisualPerceiverConfig(num_labels=10)
            >>> few, full = Budget(num_active_queries=8), Budget()
            >>> config.count_stages([few])[0] == config.count_macs(few)
            True
            >>> config.count_stages([few, full])[1] > config.count_macs(full)
            True
        """
        stages = [self.resolve(**budget.kwargs)["num_active_queries"] for budget in budgets]
        if self.trunk_attention == "block_causal":
            ends = [0, *self.block_ends]
            starts = [max(end for end in ends if end <= K) for K in [0, *stages[:-1]]]
            added = [count_extension_macs(self, start, K) for start, K in zip(starts, stages, strict=True)]
        else:
            added = [count_trunk_macs(self, K) for K in stages]
        trunks = accumulate(added)
        return [count_macs(self, K) - count_trunk_macs(self, K) + paid for K, paid in zip(stages, trunks, strict=True)]

    def queries_of_all(self, num_active_queries: Any = None, least: int = 0) -> int:
        """Validate a K that is the same for all images and at least `least`, the number that is computed already.

        Raises:
            ValueError: If it is not such an integer in [1, Q]; None is Q.
        """
        K = self.resolve(num_active_queries=num_active_queries)["num_active_queries"]
        if not isinstance(K, int):
            raise ValueError(f"Expected one `num_active_queries` for all images, got {num_active_queries!r}.")
        if least > K:
            raise ValueError(f"Expected at least the {least} queries of the last call, got {K}.")
        return K

    def operating_point(self, num_active_queries: Any = None, dqs_threshold: float | None = None) -> tuple[Any, Any]:
        """Validate arguments of `forward` and fill in the config's defaults: (K, t), where t is None without selection.

        Args:
            num_active_queries: K, an integer, also as a tensor or array; or (B,) with a K for each image. None is the config's
                value, or Q.
            dqs_threshold: t, a number, also as a tensor or array. None is the config's value; infinity turns selection off.

        Raises:
            ValueError: If K is not an integer in [1, Q], or t not a number of at least -1.

        Example:
            >>> config = VisualPerceiverConfig(dqs_threshold=0.8)
            >>> config.operating_point(16), config.operating_point(16, float("inf"))
            ((16, 0.8), (16, None))
        """
        Q = self.num_queries
        K = self.num_active_queries if num_active_queries is None else as_number(num_active_queries)
        t = self.dqs_threshold if dqs_threshold is None else as_number(dqs_threshold)
        K = Q if K is None else K
        off = t is None or (isinstance(t, float) and t == math.inf)
        t = None if off else checked_threshold(t)
        if not isinstance(K, int) and (isinstance(K, (list, tuple)) or getattr(K, "ndim", False)):
            each = torch.as_tensor(K)
            whole = each.ndim == 1 and each.numel() and not each.is_floating_point() and each.dtype != torch.bool
            if not whole or each.min() < 1 or each.max() > Q:
                raise ValueError(
                    f"Expected `num_active_queries` to be integers in [1, {Q}], one for each image, got {K!r}."
                )
            return each.long(), t
        try:
            # `operator.index` takes integers of every library and no floats. A compiler would make its result a constant and
            # compile again for each K, so Python's integers skip it.
            k = K if type(K) is int else 0 if isinstance(K, bool) else operator.index(K)
        except TypeError:
            k = 0
        if not 1 <= k <= Q:
            raise ValueError(f"Expected `num_active_queries` to be an integer in [1, {Q}], got {K!r}.")
        return k, t

    @classmethod
    def from_timm(cls, mlp_ratio: float = 4.0, **arguments: Any) -> Any:
        """As for every family; `mlp_ratio` is the width of every MLP relative to D."""
        width = arguments.get("embed_dim", cls.hidden_size)
        return super().from_timm(intermediate_size=round(width * mlp_ratio), **arguments)

    @property
    def timm_model_args(self) -> dict[str, Any]:
        """The arguments with which timm's `create_model` builds a model of this config."""
        arguments = super().timm_model_args
        rates = ("proj_drop_rate", "attn_drop_rate", "drop_path_rate", "block_drop_rate")
        for name in ("intermediate_size", "initializer_range", *rates):
            del arguments[name]
        return {**arguments, "mlp_ratio": self.intermediate_size / self.hidden_size}

    @property
    def first_conv(self) -> str:
        """Name of the convolution that reads the image's channels."""
        if self.stem == "patch":
            return "embeddings.patch_embeddings.projection"
        stage = next(i for i, widths in enumerate(self.stem_widths or []) if widths)
        return f"embeddings.patch_embeddings.stem.stages.{stage}.0.conv"


__all__ = ["VisualPerceiverConfig"]
