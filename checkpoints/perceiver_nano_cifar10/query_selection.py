"""Dynamic Query Selection: which queries an image needs (Dancette & Cord 2022, section 3.4)."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def select_queries(tokens: torch.Tensor, threshold: float, reference: str = "all") -> torch.Tensor:
    """Keep, per image, the queries whose token is not too similar to that of an earlier query.

    Query i is removed if cos(y_i, y_j) > threshold for some j < i. The paper's formula does not say whether j may itself
    be removed: `reference="all"` compares with every earlier query, `"kept"` only with those that stay, and keeps a superset
    of what `"all"` keeps.

    Similarities are computed in float32 whatever the dtype or autocast (on GPUs by TF32 where
    `torch.set_float32_matmul_precision` allows it, which can tip a similarity within 1e-3 of the threshold). A zero
    vector has similarity 0 to everything, as in `torch.nn.functional.cosine_similarity`; a token with NaN or infinite
    entries is similar to nothing.

    Args:
        tokens: (B, K, D) cross-attention outputs softmax(q k^T / sqrt(d)) v, before the output projection.
        threshold: Highest similarity that is still kept, at least -1. Cosines end at 1, so 1 and above keep all.
        reference: `"all"` or `"kept"`.

    Returns:
        (B, K) bool, true where the query stays. The first column is always true.

    Raises:
        ValueError: If `tokens` is not a (B, K, D) floating-point tensor, or an argument is out of its range.

    Example:
        >>> import torch
        >>> tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.1]]])
        >>> select_queries(tokens, threshold=0.9)
        tensor([[ True,  True, False]])
    """
    if tokens.ndim != 3 or not tokens.is_floating_point():
        raise ValueError(
            f"Expected `tokens` of shape (B, K, D) and a floating-point dtype, got {tuple(tokens.shape)} {tokens.dtype}."
        )
    threshold = checked_threshold(threshold)
    if reference not in ("all", "kept"):
        raise ValueError(f"Expected `reference` to be 'all' or 'kept', got {reference!r}.")

    return keep_dissimilar(cosine_similarities(tokens) > threshold, reference)


def keep_dissimilar(too_similar: torch.Tensor, reference: str) -> torch.Tensor:
    """The rule of `select_queries`: which pairs are too similar, (B, K, K) bool -> which queries stay, (B, K) bool."""
    K = too_similar.shape[1]
    # A boolean triangle: zeroing the upper half of the similarities would fail for negative thresholds.
    earlier = torch.ones(K, K, dtype=torch.bool, device=too_similar.device).tril(diagonal=-1)
    too_similar = too_similar & earlier
    if reference == "all":
        return ~too_similar.any(dim=-1)
    keep = torch.ones_like(too_similar[..., 0])  # (B, K)
    for i in range(1, K):
        keep[:, i] = ~(too_similar[:, i, :i] & keep[:, :i]).any(dim=-1)
    return keep


@torch.no_grad()
def cosine_similarities(tokens: torch.Tensor) -> torch.Tensor:
    """Cosines between the tokens of each image, in float32 and never above 1: (B, K, D) -> (B, K, K)."""
    with without_autocast(tokens.device):
        tokens = tokens.float()
        tiny = torch.finfo(torch.float32).tiny
        # Scaled by the largest entry first, so that the squares neither overflow nor vanish.
        tokens = tokens / tokens.abs().amax(dim=-1, keepdim=True).clamp(min=tiny)
        products = tokens @ tokens.transpose(1, 2)
        # Lengths from the products, of which there are fewer than entries of tokens.
        scale = products.diagonal(dim1=1, dim2=2).clamp(min=tiny).rsqrt()
        return (products * scale[:, :, None] * scale[:, None]).clamp(max=1.0)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which operations on this device keep the dtype of their arguments."""
    # torch refuses to switch off autocast for meta tensors, which have none.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def checked_threshold(threshold: Any) -> float:
    """The threshold as Python's number.

    Raises:
        ValueError: Unless it is a finite number of at least -1.
    """
    number = as_number(threshold)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not -1 <= number < math.inf:
        raise ValueError(f"Expected `dqs_threshold` to be a finite number of at least -1, got {threshold!r}.")
    return number


def as_number(value: Any) -> Any:
    """Convert a tensor or NumPy array of one element to Python's number; return everything else unchanged.

    Example:
        >>> as_number(torch.tensor([3])), as_number(0.5)
        (3, 0.5)
    """
    if isinstance(value, (int, float)) or not hasattr(value, "item"):
        return value
    return value if math.prod(value.shape) != 1 or getattr(value, "is_meta", False) else value.item()
