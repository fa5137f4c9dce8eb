"""Multiply-accumulates of one image's forward, by formula."""

from typing import Any

from .conv_stem import level_macs, stem_macs
from .elastic import Budget


def count_macs(
    config: Any, num_active_queries: int | None = None, num_candidates: int | None = None, **knobs: Any
) -> int:
    """Multiply-accumulates of one image (what the paper's Table 1 calls FLOP, and half of what torch counts as FLOP).

    Counts matrix products, as `torch.utils.flop_counter` does; norms, activations and softmax are left out. The queries'
    projection, K D^2, is counted although it is work per batch rather than per image.

    For other families, and with further knobs, this is `config.count_macs` of the budget that the knobs make.

    Args:
        config: The config of a model of any family.
        num_active_queries: Queries that go through the self-attention blocks; None is the config's value, or Q.
        num_candidates: For the Visual Perceiver: with Dynamic Query Selection, the queries that the cross-attention
            computed and the selection compared, at least `num_active_queries`. Their attention and their similarities
            are then counted too.
        **knobs: The family's other keywords of `forward`, such as `max_exit`; those that are missing or None have the
            config's value. With thresholds, an image that uses all that they allow is counted.

    Raises:
        ValueError: If a value is out of its range, or the family has no such knob.

    Example:
        >>> from hf_visual_perceiver import DynamicVisionTransformerConfig, VisualPerceiverConfig
        >>> count_macs(VisualPerceiverConfig(num_labels=10), num_active_queries=64)
        394200960
        >>> count_macs(DynamicVisionTransformerConfig(num_labels=10), max_exit=1)
        7177856
    """
    if knobs or config.model_type != "visual_perceiver":
        given = {"num_active_queries": num_active_queries, "num_candidates": num_candidates, **knobs}
        return config.count_macs(Budget(**config.knobs_for(**given)))
    K, _ = config.operating_point(num_active_queries)
    C, _ = config.operating_point(num_active_queries if num_candidates is None else num_candidates)
    if C < K:
        raise ValueError(f"Expected `num_candidates` to be at least `num_active_queries` = {K}, got {C}.")
    N, D, M = config.num_patches, config.hidden_size, config.intermediate_size
    mlp = 2 * D * M
    levels = len(config.query_spans(0, C))
    reading = levels * N * 2 * D**2 + C * (D**2 + 2 * N * D) + K * (D**2 + mlp)
    selection = 0 if num_candidates is None else C**2 * D
    return count_token_macs(config, levels) + reading + selection + count_trunk_macs(config, K)


def count_token_macs(config: Any, levels: int = 1) -> int:
    """The part of `count_macs` that makes tokens from an image: the patches' linear, or levels of the stem with projections."""
    N, D = config.num_patches, config.hidden_size
    if config.stem == "patch":
        return N * config.num_channels * config.patch_size**2 * D
    widths, size = config.stem_widths or [], config.image_height_width
    macs = stem_macs(config.num_channels, widths, *size) + N * [w for stage in widths for w in stage][-1] * D
    for level in range(1, levels):
        own, channels = level_macs(widths, config.level_widths[:level], *size)
        macs += own + N * channels * D
    return macs


def count_trunk_macs(config: Any, num_active_queries: int) -> int:
    """The part of `count_macs` after the cross-attention block; another K on the same image repeats only this part."""
    K, D, M = num_active_queries, config.hidden_size, config.intermediate_size
    mlp = 2 * D * M
    trunk = config.num_hidden_layers * (K * (4 * D**2 + mlp) + 2 * K**2 * D)
    return trunk + count_decoder_macs(config, K)


def count_extension_macs(config: Any, start: int, num_active_queries: int) -> int:
    """`count_trunk_macs` of a block-causal trunk that has already processed the first `start` queries."""
    K, D, M = num_active_queries, config.hidden_size, config.intermediate_size
    new = K - start
    trunk = config.num_hidden_layers * (new * (4 * D**2 + 2 * D * M) + 2 * new * K * D)
    return trunk + count_decoder_macs(config, K)


def count_decoder_macs(config: Any, num_active_queries: int) -> int:
    """The part of `count_macs` after the blocks: the decoder, which reads K tokens or the last block, and the head."""
    K, D, M = num_active_queries, config.hidden_size, config.intermediate_size
    K -= config.first_decoded(K)
    return K * 2 * D**2 + 2 * D**2 + 2 * K * D + 2 * D * M + D * len(config.label_names)
