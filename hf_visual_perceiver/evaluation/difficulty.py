"""Does selection spend more queries on harder images? Queries kept against the full network's confidence and error."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap, rankdata


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
    """Images that keep about as many queries.

    Attributes:
        queries_min: The fewest kept in the bin.
        queries_max: The most.
        queries_mean: Mean over the bin.
        images: How many.
        accuracy: Accuracy of the full network on them.
        standard_error: Standard error of that accuracy.
        confidence: Mean probability of the full network's answer.
    """

    queries_min: int
    queries_max: int
    queries_mean: float
    images: int
    accuracy: float
    standard_error: float
    confidence: float


@dataclass(frozen=True)
class Difficulty:
    """How the queries kept at a threshold go with the full network's confidence and error.

    Attributes:
        dqs_threshold: t.
        with_confidence: Rank correlation of queries kept with the probability of the full network's answer.
        with_error: The same with 1 where the full network is wrong, 0 where it is right.
        queries_right: Mean kept where the full network is right; None if it never is.
        queries_wrong: Mean kept where it is wrong; None if it never is.
        bins: From few queries to many.
    """

    dqs_threshold: float
    with_confidence: Correlation
    with_error: Correlation
    queries_right: float | None
    queries_wrong: float | None
    bins: list[Bin]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Difficulty":
        """The inverse of `dataclasses.asdict`."""
        correlations = {key: Correlation(**values[key]) for key in ("with_confidence", "with_error")}
        return cls(**{**values, **correlations, "bins": [Bin(**bin) for bin in values["bins"]]})


def measure_difficulty(
    dqs_threshold: float, queries: np.ndarray, confidence: np.ndarray, right: np.ndarray, bins: int = 5
) -> Difficulty:
    """Relate queries kept to difficulty.

    Args:
        dqs_threshold: t.
        queries: Queries that each image keeps, (n,).
        confidence: Probability of the full network's answer, (n,).
        right: Whether that answer is right, (n,) bool.
        bins: At most so many, of about equally many images.

    Raises:
        ValueError: If the three have different lengths, or none.
    """
    if not len(queries) == len(confidence) == len(right) > 0:
        raise ValueError(
            f"Expected queries, confidence and right of the same images, got {len(queries)}, {len(confidence)} and {len(right)}."
        )
    # An edge belongs to the bin below it.
    edges = np.unique(np.quantile(queries, np.linspace(0, 1, bins + 1)[1:-1], method="lower"))
    places = np.searchsorted(edges, queries)
    return Difficulty(
        dqs_threshold,
        correlate(queries, confidence),
        correlate(queries, ~right),
        float(queries[right].mean()) if right.any() else None,
        float(queries[~right].mean()) if not right.all() else None,
        [_bin(queries[here], confidence[here], right[here]) for here in (places == i for i in np.unique(places))],
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


def _bin(queries: np.ndarray, confidence: np.ndarray, right: np.ndarray) -> Bin:
    accuracy, images = float(right.mean()), len(right)
    error = float(np.sqrt(accuracy * (1 - accuracy) / images))
    reach = int(queries.min()), int(queries.max()), float(queries.mean())
    return Bin(*reach, images, accuracy, error, float(confidence.mean()))
