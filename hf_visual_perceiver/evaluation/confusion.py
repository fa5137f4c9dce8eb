"""What a network takes for what."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Confusion:
    """Images by their label and by the label that they were given.

    Attributes:
        counts: Label to given label to number of images; pairs without an image are left out.

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
        """Count (n,) labels and predictions, indices of `names`."""
        # ImageNet has two cranes and two maillots.
        unique = [name if list(names).count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]
        counts: dict[str, dict[str, int]] = {}
        pairs, numbers = np.unique(np.stack([labels, predictions]), axis=1, return_counts=True)
        for label, given, number in zip(*pairs.tolist(), numbers.tolist(), strict=True):
            counts.setdefault(unique[label], {})[unique[given]] = number
        return cls(counts)

    def images(self, label: str) -> int:
        """Images of a class."""
        return sum(self.counts[label].values())

    def accuracy(self, label: str) -> float:
        """Share of a class's images that are given its label."""
        return self.counts[label].get(label, 0) / self.images(label)

    def worst_first(self) -> list[str]:
        """The classes that have images, by rising accuracy."""
        return sorted(self.counts, key=self.accuracy)

    def mistakes(self, label: str | None = None) -> list[tuple[str, str, int]]:
        """Label, wrong label given and number of images, the most frequent first; of all classes, or of one."""
        labels = self.counts if label is None else [label]
        wrong = [(a, b, number) for a in labels for b, number in self.counts[a].items() if a != b]
        return sorted(wrong, key=lambda mistake: -mistake[2])

    def sentence(self, classes: int = 3, pairs: int = 5) -> str:
        """The classes with the lowest accuracy, and the most frequent mistakes."""
        worst = ", ".join(f"{label} {100 * self.accuracy(label):.1f} %" for label in self.worst_first()[:classes])
        mistakes = ", ".join(f"{a} taken for {b} ({number})" for a, b, number in self.mistakes()[:pairs])
        return f"Lowest accuracy by class: {worst}." + (
            f" Most frequent mistakes, with numbers of images: {mistakes}." if mistakes else ""
        )
