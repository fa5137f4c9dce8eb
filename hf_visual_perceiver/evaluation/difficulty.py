"""Do harder images get more? What images use at an adaptive budget, against the full network's confidence and error."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap, rankdata

from hf_visual_perceiver.modeling import Budget


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation over images; all None where it is not defined, because a side is the same for all.

    Attributes:
        value: In [-1, 1].
        standard_error: Deviation over bootstrap draws of the images.
        low: Lower end of the bootstrap's 95 % interval.
        high: Upper end.
    """

    value: float | None
    standard_error: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.value is None:
            return "not defined"
        return f"{self.value:+.3f} ± {self.standard_error:.3f} (95 % interval {self.low:+.3f} to {self.high:+.3f})"


@dataclass(frozen=True)
class Bin:
    """Images that use about as much.

    Attributes:
        used_min: The least in the bin, such as queries.
        used_max: The most.
        used_mean: Mean over the bin.
        images: How many.
        accuracy: Accuracy of the full network on them.
        standard_error: Standard error of that accuracy.
        confidence: Mean probability of the full network's answer.
    """

    used_min: int
    used_max: int
    used_mean: float
    images: int
    accuracy: float
    standard_error: float
    confidence: float


@dataclass(frozen=True)
class Difficulty:
    """How what images use at a budget goes with the full network's confidence and error.

    Attributes:
        budget: At which each image takes what it needs.
        with_confidence: Rank correlation of what is used with the probability of the full network's answer.
        with_error: The same with 1 where the full network is wrong, 0 where it is right.
        used_right: Mean used where the full network is right; None if it never is.
        used_wrong: Mean used where it is wrong; None if it never is.
        bins: From little to much.
    """

    budget: Budget
    with_confidence: Correlation
    with_error: Correlation
    used_right: float | None
    used_wrong: float | None
    bins: list[Bin]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Difficulty":
        """The inverse of `dataclasses.asdict`."""
        correlations = {key: Correlation(**values[key]) for key in ("with_confidence", "with_error")}
        return cls(**{**values, **correlations, "bins": [Bin(**bin) for bin in values["bins"]]})


def measure_difficulty(
    budget: Budget, used: np.ndarray, confidence: np.ndarray, right: np.ndarray, bins: int = 5
) -> Difficulty:
    """Relate what is used to difficulty.

    Args:
        budget: At which each image takes what it needs.
        used: What each image uses, such as queries, (n,).
        confidence: Probability of the full network's answer, (n,).
        right: Whether that answer is right, (n,) bool.
        bins: At most so many, of about equally many images.

    Raises:
        ValueError: If the three have different lengths, or none.
    """
    if not len(used) == len(confidence) == len(right) > 0:
        raise ValueError(
            f"Expected used, confidence and right of the same images, got {len(used)}, {len(confidence)} and {len(right)}."
        )
    # An edge belongs to the bin below it.
    edges = np.unique(np.quantile(used, np.linspace(0, 1, bins + 1)[1:-1], method="lower"))
    places = np.searchsorted(edges, used)
    return Difficulty(
        budget,
        correlate(used, confidence),
        correlate(used, ~right),
        float(used[right].mean()) if right.any() else None,
        float(used[~right].mean()) if not right.all() else None,
        [_bin(used[here], confidence[here], right[here]) for here in (places == i for i in np.unique(places))],
    )


def correlate(a: np.ndarray, b: np.ndarray, draws: int = 1000, seed: int = 0) -> Correlation:
    """Spearman's rank correlation of (n,) values with its bootstrap over images.

    Example:
        >>> correlate(np.array([1, 2, 3, 4]), np.array([10, 20, 40, 30]), draws=10).value
        0.8
    """
    if np.all(a == a[0]) or np.all(b == b[0]):
        return Correlation(None, None, None, None)
    generator = np.random.default_rng(seed)
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", DegenerateDataWarning)  # of few images, of which some draws are all alike
        drawn = bootstrap(
            (a, b), _spearman, paired=True, n_resamples=draws, batch=16, method="percentile", rng=generator
        )
    low, high = np.nanquantile(drawn.bootstrap_distribution, (0.025, 0.975))
    error = float(np.nanstd(drawn.bootstrap_distribution, ddof=1))
    return Correlation(float(_spearman(a, b)), error, float(low), float(high))


def _spearman(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    """Of many draws at once, which `scipy.stats.spearmanr` does not do."""
    x, y = (ranks - ranks.mean(axis, keepdims=True) for ranks in (rankdata(a, axis=axis), rankdata(b, axis=axis)))
    return (x * y).sum(axis) / np.sqrt((x * x).sum(axis) * (y * y).sum(axis))


def _bin(used: np.ndarray, confidence: np.ndarray, right: np.ndarray) -> Bin:
    accuracy, images = float(right.mean()), len(right)
    error = float(np.sqrt(accuracy * (1 - accuracy) / images))
    reach = int(used.min()), int(used.max()), float(used.mean())
    return Bin(*reach, images, accuracy, error, float(confidence.mean()))
