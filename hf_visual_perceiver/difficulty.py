"""Does selection spend more queries on harder images? Queries kept against the full network's confidence and error."""

from dataclasses import dataclass
from typing import Any

import numpy as np


WEAK = 0.1  # a rank correlation below this is called weak in words


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

    @property
    def sign(self) -> int:
        """1 or -1 if the interval is on that side of zero, else 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)

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
        accuracy: Of the full network on them.
        standard_error: Of that accuracy.
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
    return Difficulty(
        dqs_threshold,
        correlate(queries, confidence),
        correlate(queries, ~right),
        float(queries[right].mean()) if right.any() else None,
        float(queries[~right].mean()) if not right.all() else None,
        _bins(queries, confidence, right, bins),
    )


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation: Pearson's of the ranks, equal values sharing their mean rank.

    Args:
        a: (n,).
        b: (n,).

    Returns:
        In [-1, 1]; None if all of `a`, or all of `b`, are equal.

    Example:
        >>> spearman(np.array([1, 2, 3, 4]), np.array([10, 20, 40, 30]))
        0.8
    """
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / norm if norm else None


def correlate(a: np.ndarray, b: np.ndarray, draws: int = 1000, seed: int = 0) -> Correlation:
    """Spearman's rank correlation with its bootstrap over images."""
    value = spearman(a, b)
    if value is None:
        return Correlation(None, None, None, None)
    rng = np.random.default_rng(seed)
    samples = (rng.integers(len(a), size=len(a)) for _ in range(draws))
    drawn = np.array([v for i in samples if (v := spearman(a[i], b[i])) is not None])
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Correlation(value, float(drawn.std(ddof=1)), float(low), float(high))


def difficulty_verdict(difficulty: Difficulty) -> str:
    """Whether harder images get more queries, in a sentence."""
    by_confidence, by_error = -difficulty.with_confidence.sign, difficulty.with_error.sign
    spent = {1: "more queries", -1: "fewer queries", 0: "no measurably different number of queries"}
    unsure, wrong = "images that the full network is less sure of", "images that it gets wrong"
    if by_confidence == by_error == 1:
        answer = f"yes, it spends more queries on {unsure} and on {wrong}"
    elif by_confidence == by_error == -1:
        answer = f"no, on the contrary: it spends fewer queries on {unsure} and on {wrong}"
    elif by_confidence == by_error == 0:
        answer = f"not measurably, neither on {unsure} nor on {wrong}"
    else:
        answer = f"not consistently: {spent[by_confidence]} on {unsure}, {spent[by_error]} on {wrong}"
    values = [c.value for c in (difficulty.with_confidence, difficulty.with_error) if c.value is not None]
    if (by_confidence or by_error) and max(map(abs, values)) < WEAK:
        answer += f", but the tendency is weak (rank correlations below {WEAK:g} in size)"
    means = ""
    if difficulty.queries_right is not None and difficulty.queries_wrong is not None:
        means = (
            f" It keeps {difficulty.queries_right:.2f} queries on average where the full network is right, "
            f"{difficulty.queries_wrong:.2f} where it is wrong."
        )
    return f"At t = {difficulty.dqs_threshold:g}: {answer}.{means}"


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _bins(queries: np.ndarray, confidence: np.ndarray, right: np.ndarray, count: int) -> list[Bin]:
    edges = np.unique(np.quantile(queries, np.linspace(0, 1, count + 1)[1:-1], method="lower"))
    place = np.searchsorted(edges, queries)  # an edge belongs to the bin below it
    result = []
    for number in np.unique(place):
        here = place == number
        accuracy = float(right[here].mean())
        result.append(
            Bin(
                queries_min=int(queries[here].min()),
                queries_max=int(queries[here].max()),
                queries_mean=float(queries[here].mean()),
                images=int(here.sum()),
                accuracy=accuracy,
                standard_error=float(np.sqrt(accuracy * (1 - accuracy) / here.sum())),
                confidence=float(confidence[here].mean()),
            )
        )
    return result
