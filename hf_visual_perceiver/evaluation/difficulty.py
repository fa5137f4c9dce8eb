"""Do harder images use more at an adaptive budget? Compares usage with the full network's confidence and error."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap, rankdata

from hf_visual_perceiver.modeling import Budget


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation over images; all fields are None if it is undefined, as one variable is constant.

    Attributes:
        value: The correlation, in [-1, 1].
        standard_error: Standard deviation over bootstrap resamples of the images.
        low: Lower end of the bootstrap's 95 % interval.
        high: Upper end of that interval.
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
    """A bin of images with similar usage.

    Attributes:
        used_min: Smallest usage in the bin, such as the number of queries.
        used_max: Largest usage in the bin.
        used_mean: Mean usage in the bin.
        images: Number of images.
        accuracy: Accuracy of the full network on them.
        standard_error: Standard error of that accuracy.
        confidence: Mean probability of the full network's prediction.
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
    """How images' usage at an adaptive budget relates to the full network's confidence and error.

    Attributes:
        budget: The adaptive budget.
        with_confidence: Rank correlation of usage with the probability of the full network's prediction.
        with_error: Rank correlation of usage with the full network's error (1 if wrong, 0 if right).
        used_right: Mean usage of images that the full network classifies correctly; None if there are none.
        used_wrong: Mean usage of images that it misclassifies; None if there are none.
        bins: Bins of images, by ascending usage.
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
    """Relate usage to difficulty.

    Args:
        budget: An adaptive budget.
        used: (n,) how much each image uses, such as the number of queries.
        confidence: (n,) probability of the full network's prediction.
        right: (n,) bool, whether that prediction is correct.
        bins: Maximum number of bins, which have about equally many images.

    Raises:
        ValueError: If the three arrays have different lengths, or are empty.
    """
    if not len(used) == len(confidence) == len(right) > 0:
        raise ValueError(
            f"Expected used, confidence and right of the same images, got {len(used)}, {len(confidence)} and {len(right)}."
        )
    # A value on an edge belongs to the bin below it.
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
    """Spearman's rank correlation of two (n,) arrays, with a bootstrap over images.

    Example:
        >>> correlate(np.array([1, 2, 3, 4]), np.array([10, 20, 40, 30]), draws=10).value
        0.8
    """
    if np.all(a == a[0]) or np.all(b == b[0]):
        return Correlation(None, None, None, None)
    generator = np.random.default_rng(seed)
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", DegenerateDataWarning)  # with few images, some resamples are constant
        drawn = bootstrap(
            (a, b), _spearman, paired=True, n_resamples=draws, batch=16, method="percentile", rng=generator
        )
    low, high = np.nanquantile(drawn.bootstrap_distribution, (0.025, 0.975))
    error = float(np.nanstd(drawn.bootstrap_distribution, ddof=1))
    return Correlation(float(_spearman(a, b)), error, float(low), float(high))


def _spearman(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    """Spearman's correlation of many resamples at once, which `scipy.stats.spearmanr` does not support."""
    x, y = (ranks - ranks.mean(axis, keepdims=True) for ranks in (rankdata(a, axis=axis), rankdata(b, axis=axis)))
    return (x * y).sum(axis) / np.sqrt((x * x).sum(axis) * (y * y).sum(axis))


def _bin(used: np.ndarray, confidence: np.ndarray, right: np.ndarray) -> Bin:
    accuracy, images = float(right.mean()), len(right)
    error = float(np.sqrt(accuracy * (1 - accuracy) / images))
    reach = int(used.min()), int(used.max()), float(used.mean())
    return Bin(*reach, images, accuracy, error, float(confidence.mean()))
