"""The search for a cascade's thresholds, on validation images.

Shapes: n images, S stages.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CascadeChoice:
    """Thresholds found by a search, with their accuracy and cost on the images that they were found on."""

    thresholds: list[float]
    accuracy: float
    macs: float  # mean per image


def stopping_stages(confidence: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """The stage at which each image stops, (n,), given its confidence at every stage, (n, S).

    Example:
        >>> stopping_stages(np.array([[0.9, 0.9], [0.2, 0.9]]), [0.5]).tolist()
        [0, 1]
    """
    stops = confidence[:, :-1] >= np.asarray(thresholds, dtype=confidence.dtype)
    return np.concatenate([stops, np.ones_like(stops, shape=(len(stops), 1))], axis=1).argmax(axis=1)


def search_thresholds(
    confidence: np.ndarray, correct: np.ndarray, macs: Sequence[float], budget: float, combinations: int = 2000
) -> CascadeChoice:
    """Find the thresholds with the highest accuracy among those whose mean cost on these images is within the budget.

    DVT and MSDNet solve the same problem, with one set of thresholds per budget. Here all combinations of quantiles of
    each stage's confidence are tried, `combinations` at most, so the result does not depend on a random search.

    Args:
        confidence: (n, S) top probability of each image at each stage, on validation images.
        correct: (n, S) bool, whether the stage's prediction is correct.
        macs: (S,) cost of stopping at each stage, ascending; see `count_stages` of the config.
        budget: Highest mean cost per image, in the same unit.
        combinations: Number of combinations of thresholds to try.

    Raises:
        ValueError: If the arrays do not fit together, or the first stage alone costs more than the budget.

    Example:
        >>> confidence, correct = np.array([[0.9, 0.9], [0.4, 0.9]]), np.array([[True, True], [False, True]])
        >>> choice = search_thresholds(confidence, correct, [1, 4], budget=2.5)
        >>> choice.accuracy, choice.macs
        (1.0, 2.5)
    """
    costs = np.asarray(macs, dtype=float)
    if confidence.ndim != 2 or confidence.shape != correct.shape or len(costs) != confidence.shape[1]:
        raise ValueError(
            f"Expected confidence and correct of shape (n, S) and S costs, got {confidence.shape}, {correct.shape} "
            f"and {len(costs)} costs."
        )
    if not len(confidence) or budget < costs[0]:
        raise ValueError(
            f"Expected images, and a budget of at least the first stage's {costs[0]:g}, got {len(confidence)} images and {budget:g}."
        )
    n, S = confidence.shape
    levels = max(2, int(combinations ** (1 / max(1, S - 1))))
    # A threshold of 0 stops every image at the stage, 2 stops none.
    grids = [
        np.unique([0.0, *np.quantile(confidence[:, stage], np.linspace(0, 1, levels)), 2.0]) for stage in range(S - 1)
    ]
    best: CascadeChoice | None = None
    for thresholds in itertools.product(*grids):
        stage = stopping_stages(confidence, thresholds)
        cost = float(costs[stage].mean())
        if cost > budget:
            continue
        accuracy = float(correct[np.arange(n), stage].mean())
        if best is None or (accuracy, -cost) > (best.accuracy, -best.macs):
            best = CascadeChoice([float(t) for t in thresholds], accuracy, cost)
    assert best is not None, "thresholds of 0 stop at the first stage, which the budget allows"
    return best
