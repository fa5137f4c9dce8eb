"""Configuration of Perceiver and Perceiver IO, and their named architectures."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from .elastic import Budget
from .family_config import FamilyConfig, check_heads
from .query_selection import as_number


IO_NANO = {
    "decoder_type": "query",
    "num_frequency_bands": 16,
    "num_blocks": 2,
    "num_self_attends_per_block": 6,
    "num_cross_attends": 1,
}
IMAGENET = {
    "image_size": 224,
    "num_frequency_bands": 64,
    "num_queries": 512,
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "num_blocks": 8,
    "num_self_attends_per_block": 6,
}
# timm name -> what differs from the config's defaults.
PERCEIVER_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "perceiver_nano_32": {},
    "perceiver_tiny_32": {
        "num_frequency_bands": 12,
        "num_queries": 64,
        "hidden_size": 192,
        "num_attention_heads": 6,
        "num_blocks": 8,
        "num_cross_attends": 8,
    },
    "perceiver_224": {**IMAGENET, "num_cross_attends": 8},
    "perceiver_io_nano_32": IO_NANO,
    "perceiver_io_tiny_32": {
        **IO_NANO,
        "num_frequency_bands": 32,
        "num_queries": 64,
        "hidden_size": 256,
        "num_attention_heads": 8,
    },
    "perceiver_io_224": {**IMAGENET, "num_cross_attends": 1, "decoder_type": "query"},
}
# What the input tokens are, in the words of Perceiver IO's appendix on ImageNet.
INPUTS = ("fourier", "learned", "conv")


@strict
class IterativePerceiverConfig(FamilyConfig):
    """Configuration of Perceiver (Jaegle et al. 2021) and, with `decoder_type="query"`, Perceiver IO (2022).

    Every pixel with Fourier features of its place is an input token; latents read them, once or in several iterations.
    `inputs` has the two other kinds of tokens of Perceiver IO: pixels with learned positions, and a convolution.

    Raises:
        ValueError: If a value is out of its range or two values do not fit together.

    Example:
        >>> config = IterativePerceiverConfig(num_labels=10)
        >>> [round(config.count_macs(b) / 1e6, 1) for b in (Budget(num_active_queries=1, num_iterations=1), Budget())]
        [3.1, 53.6]
    """

    model_type = "iterative_perceiver"
    title: ClassVar[str] = "Perceiver"
    about: ClassVar[str] = (
        "Latents that read every pixel, in several iterations: `num_active_queries` sets how many latents, `num_iterations` how many iterations (Jaegle et al. 2021, 2022)."
    )
    citation: ClassVar[str] = (
        "@inproceedings{jaegle2021perceiver,\n  title={Perceiver: General Perception with Iterative Attention},\n  author={Jaegle, Andrew and Gimeno, Felix and Brock, Andrew and Zisserman, Andrew and Vinyals, Oriol and Carreira, Joao},\n  booktitle={ICML},\n  year={2021}\n}"
    )
    unit: ClassVar[str] = "queries"
    knobs: ClassVar[Mapping[str, str]] = {"K": "num_active_queries", "i": "num_iterations"}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["used"]
    named: ClassVar[Mapping[str, Mapping[str, Any]]] = PERCEIVER_ARCHITECTURES
    modeling_module: ClassVar[str] = "modeling_iterative_perceiver"
    class_prefix: ClassVar[str] = "IterativePerceiver"

    # The tokens: "fourier" is pixels and Fourier features of their places; "learned" is a linear map of each pixel to
    # `stem_channels`, and as many learned channels of its place; "conv" is a 7x7 convolution to `stem_channels` with pooling,
    # and Fourier features.
    inputs: str = "fourier"
    stem_channels: int = 64
    num_frequency_bands: int = 8
    max_resolution: int | None = (
        None  # highest frequency, twice the Nyquist rate; None is the side of the grid of tokens
    )
    num_queries: int = 32  # latents
    hidden_size: int = 128  # D
    num_attention_heads: int = 4  # of self-attention
    num_cross_attention_heads: int = 1
    qk_channels: int | None = None  # of queries, keys and values in the cross-attends; None is the inputs' channels
    num_blocks: int = 4  # iterations
    num_self_attends_per_block: int = 2
    num_cross_attends: int = 4  # spread evenly over the iterations, the first of which always has one
    share_weights: bool = True  # between iterations; the first cross-attend has its own
    widening_factor: int = 1  # of MLPs
    decoder_type: str = "mean"  # "mean" over latents (Perceiver), or a "query" that reads them (Perceiver IO)
    hidden_act: str = "gelu"  # DeepMind's own code has gelu_new
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    num_active_queries: Any = None  # the default budget: the first K latents
    num_iterations: Any = None  # and the first i iterations

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        sizes = (
            "image_size",
            "num_channels",
            "num_frequency_bands",
            "num_queries",
            "hidden_size",
            "num_attention_heads",
            "stem_channels",
        )
        self.check_positive(*sizes, "num_blocks", "num_self_attends_per_block", "num_cross_attends", "widening_factor")
        check_heads(self.hidden_size, self.num_attention_heads)
        if self.inputs not in INPUTS:
            raise ValueError(f"Expected `inputs` to be one of {', '.join(INPUTS)}, got {self.inputs!r}.")
        if self.token_side < 1:
            raise ValueError(f"Expected an `image_size` of at least 5 with `inputs` 'conv', got {self.image_size}.")
        if self.attention_channels % self.num_cross_attention_heads:
            raise ValueError(
                f"Expected the cross-attends' {self.attention_channels} channels to be a multiple of "
                f"`num_cross_attention_heads`, got {self.num_cross_attention_heads}."
            )
        if self.num_blocks % self.num_cross_attends:
            raise ValueError(
                f"Expected `num_cross_attends` to divide `num_blocks` = {self.num_blocks}, got {self.num_cross_attends}."
            )
        self.check_choices(decoder_type=("mean", "query"), hidden_act=ACT2FN)
        self.resolve(num_active_queries=self.num_active_queries, num_iterations=self.num_iterations)

    @property
    def summary(self) -> str:
        """The sizes of the network, in some words."""
        return f"{self.num_blocks} iterations of {self.num_self_attends_per_block} blocks of width {self.hidden_size}"

    @property
    def first_conv(self) -> str | None:
        """Name of the convolution that reads the image's channels, or None."""
        return None if self.inputs == "fourier" else "stem.conv"

    @property
    def fixed_image_size(self) -> bool:
        """Whether weights fit images of `image_size` alone."""
        return self.inputs == "learned"

    @property
    def token_side(self) -> int:
        """Tokens along a side of the image."""
        return ((self.image_size - 1) // 2 - 2) // 2 + 1 if self.inputs == "conv" else self.image_size

    @property
    def input_channels(self) -> int:
        """C: the channels of a token, its two coordinates, and sines and cosines of each; or learned channels."""
        if self.inputs == "learned":
            return 2 * self.stem_channels
        own = self.num_channels if self.inputs == "fourier" else self.stem_channels
        return own + 2 * (2 * self.num_frequency_bands + 1)

    @property
    def attention_channels(self) -> int:
        """Channels of queries, keys and values in the cross-attends."""
        return self.qk_channels or self.input_channels

    def reads_at(self, iteration: int) -> bool:
        """Whether an iteration begins with a cross-attend."""
        return iteration % (self.num_blocks // self.num_cross_attends) == 0

    def budgets(self) -> list[Budget]:
        """The first 1, 2, 4, ... latents in all iterations, and all latents in the first 1, 2, 4, ... iterations."""
        few = [Budget(num_active_queries=2**i) for i in range((self.num_queries - 1).bit_length())]
        early = [Budget(num_iterations=2**i) for i in range((self.num_blocks - 1).bit_length())]
        by_cost = {self.count_macs(budget): budget for budget in (*few, *early)}  # one of each cost
        return [*(by_cost[macs] for macs in sorted(by_cost)), Budget()]

    def resolve(self, **knobs: Any) -> dict[str, Any]:
        """Validate both knobs; missing ones become all latents and all iterations.

        Raises:
            ValueError: If a value is out of its range, or there is no such knob.
        """
        self.check_knobs(knobs)
        resolved = {}
        for name, most in (("num_active_queries", self.num_queries), ("num_iterations", self.num_blocks)):
            value = as_number(knobs.get(name))
            value = most if value is None else value
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"Expected `{name}` to be an integer in [1, {most}], got {value!r}.")
            resolved[name] = value
        return resolved

    def count_macs(self, budget: Budget | None = None, output: Any = None) -> Any:
        """Multiply-accumulates of an image; see `ElasticConfig.count_macs`."""
        knobs = self.resolve(**(self.default_budget if budget is None else budget).kwargs)
        K, iterations = knobs["num_active_queries"], knobs["num_iterations"]
        D, w, s = self.hidden_size, self.widening_factor, self.num_self_attends_per_block
        crosses = sum(self.reads_at(i) for i in range(iterations))
        own = s * (4 * K * D**2 + 2 * K**2 * D + 2 * w * K * D**2)
        macs = self.stem_macs()
        macs += crosses * self.cross_macs(K, self.token_side**2, self.input_channels, self.attention_channels)
        macs += iterations * own + D * len(self.label_names)
        if self.decoder_type == "query":
            macs += self.cross_macs(1, K, D, D)
        return macs if output is None else torch.full_like(output.used.cpu(), macs)

    def stem_macs(self) -> int:
        """Multiply-accumulates of what makes tokens of the pixels."""
        if self.inputs == "fourier":
            return 0
        side, kernel = (self.image_size, 1) if self.inputs == "learned" else ((self.image_size - 1) // 2 + 1, 7)
        return side**2 * kernel**2 * self.num_channels * self.stem_channels

    def cross_macs(self, queries: int, inputs: int, channels: int, attention: int) -> int:
        """Multiply-accumulates of a cross-attend."""
        D, w = self.hidden_size, self.widening_factor
        return (
            2 * queries * D * attention
            + 2 * inputs * channels * attention
            + 2 * queries * inputs * attention
            + 2 * w * queries * D**2
        )


__all__ = ["IterativePerceiverConfig"]
