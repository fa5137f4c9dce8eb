"""Metrics as classes of the `evaluate` library, which need no download."""

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """Share of correct predictions and its standard error.

    Example:
        >>> Accuracy().compute(predictions=[0, 1, 1, 1], references=[0, 1, 1, 0])
        {'accuracy': 0.75, 'standard_error': 0.21650635094610965}
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of right predictions and its standard error.",
            citation="",
            inputs_description="predictions and references: class indices, one per image.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        p = float(np.mean(np.asarray(predictions) == np.asarray(references)))
        return {"accuracy": p, "standard_error": float(np.sqrt(p * (1 - p) / len(references)))}
