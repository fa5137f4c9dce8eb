"""Whether an exported file answers as the model does, at several K and thresholds."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from hf_visual_perceiver.modeling import VisualPerceiverForImageClassification
from hf_visual_perceiver.modeling.query_selection import cosine_similarities


CHECKED_QUERIES = (1, 2, 7, 16, 64)  # and all
CHECKED_THRESHOLDS = (0.6, 0.8, 0.95, 1.0)  # 1 keeps all
TOLERANCE = 1e-4  # of a logit, relative to logits of order one
INT8_TOLERANCE = 0.25  # mean difference of a logit, in deviations of the logits


@torch.inference_mode()
def check_export(
    classify: Callable[..., Any], model: VisualPerceiverForImageClassification, num_active_queries: int | None = None
) -> float:
    """Compare an exported classifier with the model it is of, on images drawn from a fixed seed.

    Args:
        classify: Called with pixels (B, C, H, W), `num_active_queries` and `dqs_threshold`.
        model: The classifier that was exported.
        num_active_queries: K, if it is fixed in the graph.

    Returns:
        The largest difference of a logit.

    Raises:
        ValueError: If a logit differs by more than `TOLERANCE` (times the largest logit, where that is above 1), or other queries are kept.
    """
    reference, largest = reference_model(model), 0.0
    for pixels in check_images(model, (1, 3)):
        cosines = cosine_similarities(reference.visual_perceiver.read(pixels, model.config.num_queries))
        for K in checked_queries(model, num_active_queries):
            for t in CHECKED_THRESHOLDS:
                t = clear_threshold(cosines, t)
                expected = reference(pixels, num_active_queries=K, dqs_threshold=t)
                given = classify(pixels, num_active_queries=K, dqs_threshold=t)
                difference = (given.logits - expected.logits).abs().max().item()
                where = f"for {len(pixels)} images at K = {K}, t = {t:g}"
                if not difference <= TOLERANCE * max(1.0, expected.logits.abs().max().item()):  # nor NaN
                    raise ValueError(
                        f"Expected the exported logits to be PyTorch's, got a difference of {difference:.3g} {where}."
                    )
                if given.active_queries is not None and not given.active_queries.equal(expected.active_queries):
                    raise ValueError(
                        f"Expected the exported graph to keep the queries that PyTorch keeps, got others {where}."
                    )
                largest = max(largest, difference)
    return largest


@torch.inference_mode()
def check_quantised(
    classify: Callable[..., Any], model: VisualPerceiverForImageClassification, num_active_queries: int | None = None
) -> float:
    """Whether a quantised classifier still resembles the model; how accurate it is takes data to say.

    Returns:
        The mean difference of a logit, in standard deviations of the model's logits: the largest over K.

    Raises:
        ValueError: If that is above `INT8_TOLERANCE`.
    """
    reference, largest = reference_model(model), 0.0
    (pixels,) = check_images(model, (16,))
    for K in checked_queries(model, num_active_queries):
        expected = reference(pixels, num_active_queries=K, dqs_threshold=1.0).logits
        given = classify(pixels, num_active_queries=K, dqs_threshold=1.0).logits
        difference = ((given - expected).abs().mean() / expected.std()).item()
        if not difference <= INT8_TOLERANCE:
            raise ValueError(
                f"Expected int8 logits within {INT8_TOLERANCE:g} deviations of float32's on average, "
                f"got {difference:.3g} at K = {K}; this model does not bear quantisation."
            )
        largest = max(largest, difference)
    return largest


def reference_model(model: VisualPerceiverForImageClassification) -> VisualPerceiverForImageClassification:
    """The model as it computes in PyTorch, in float32 on the CPU."""
    return copy.deepcopy(model).float().cpu().eval()


def checked_queries(model: VisualPerceiverForImageClassification, num_active_queries: int | None) -> list[int]:
    """The K to compare at."""
    Q = model.config.num_queries
    return [*(K for K in CHECKED_QUERIES if Q > K), Q] if num_active_queries is None else [num_active_queries]


def check_images(model: VisualPerceiverForImageClassification, batches: tuple[int, ...]) -> list[torch.Tensor]:
    """Normalised images, in batches: smooth at random, since noise alone looks the same to most queries."""
    generator = torch.Generator().manual_seed(0)
    height, width = model.config.image_height_width
    images = []
    for batch in batches:
        coarse = torch.randn(batch, model.config.num_channels, 5, 5, generator=generator)
        images.append(F.interpolate(coarse, size=(height, width), mode="bilinear"))
    return images


def clear_threshold(cosines: torch.Tensor, threshold: float, reach: float = 0.01) -> float:
    """The middle of the widest gap between cosines near `threshold`, so that rounding cannot tip a query over it.

    Args:
        cosines: What is compared with the threshold.
        threshold: From 1 on it stays as it is.
        reach: How far from it to look.

    Example:
        >>> round(clear_threshold(torch.tensor([0.5, 0.795, 0.8, 0.806]), 0.8), 4)
        0.803
    """
    if threshold >= 1:
        return threshold
    near = cosines.double().flatten()
    near = near[(near - threshold).abs() < reach].sort().values
    edges = torch.cat([near.new_tensor([threshold - reach]), near, near.new_tensor([threshold + reach])])
    widest = edges.diff().argmax()
    return ((edges[widest] + edges[widest + 1]) / 2).item()
