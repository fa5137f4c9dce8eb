"""The confusion matrix."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Confusion:
    """A sparse confusion matrix.

    Attributes:
        counts: Number of images by label and then by predicted label; pairs without images are left out.

    Example:
        >>> confusion = Confusion.of(["cat", "dog"], np.array([0, 0, 0, 1]), np.array([0, 1, 1, 1]))
        >>> confusion.counts
        {'cat': {'cat': 1, 'dog': 2}, 'dog': {'dog': 1}}
        >>> confusion.mistakes()
        [('cat', 'dog', 2)]
    """

    counts: dict[str, dict[str, int]]

    @classmethod
    def of(cls, names: Sequence[str], labels: np.ndarray, predictions: np.ndarray) -> "Confusion":
        """Count pairs of (n,) labels and predictions, which are indices into `names`."""
        # Names may repeat: ImageNet has two cranes and two maillots.
        unique = [name if list(names).count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]
        counts: dict[str, dict[str, int]] = {}
        pairs, numbers = np.unique(np.stack([labels, predictions]), axis=1, return_counts=True)
        for label, given, number in zip(*pairs.tolist(), numbers.tolist(), strict=True):
            counts.setdefault(unique[label], {})[unique[given]] = number
        return cls(counts)

    def images(self, label: str) -> int:
        """Number of images of a class."""
        return sum(self.counts[label].values())

    def accuracy(self, label: str) -> float:
        """Share of a class's images that are predicted as that class."""
        return self.counts[label].get(label, 0) / self.images(label)

    def worst_first(self) -> list[str]:
        """The classes that have images, by ascending accuracy."""
        return sorted(self.counts, key=self.accuracy)

    def mistakes(self, label: str | None = None) -> list[tuple[str, str, int]]:
        """List (label, wrong prediction, number of images), most frequent first, for all classes or for one."""
        labels = self.counts if label is None else [label]
        wrong = [(a, b, number) for a in labels for b, number in self.counts[a].items() if a != b]
        return sorted(wrong, key=lambda mistake: -mistake[2])

    def sentence(self, classes: int = 3, pairs: int = 5) -> str:
        """Describe the classes with the lowest accuracy, and the most frequent mistakes, in words."""
        worst = ", ".join(f"{label} {100 * self.accuracy(label):.1f} %" for label in self.worst_first()[:classes])
        mistakes = ", ".join(f"{a} predicted as {b} ({number})" for a, b, number in self.mistakes()[:pairs])
        return f"Lowest accuracy by class: {worst}." + (
            f" Most frequent errors (number of images): {mistakes}." if mistakes else ""
        )
