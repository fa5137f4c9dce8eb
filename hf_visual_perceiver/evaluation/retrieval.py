"""Retrieval: weighted k-nearest-neighbour classification with a model's features, at every budget.

Shapes: n queried images, m images of the gallery, k neighbours, D width, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from hf_visual_perceiver.data.images import ImageDataset
from hf_visual_perceiver.evaluation.evaluate import output_at, pixel_batches, plain
from hf_visual_perceiver.evaluation.metrics import Accuracy
from hf_visual_perceiver.modeling import Budget, ElasticConfig
from hf_visual_perceiver.utils.choices import FEATURES
from hf_visual_perceiver.utils.conditions import measurement_conditions


def knn_classify(
    queried: torch.Tensor,
    gallery: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> torch.Tensor:
    """Classify each image by its nearest neighbours, each of which votes with weight exp(cosine / temperature).

    This is the protocol of instance discrimination (Wu et al. 2018, section 3.4), with DINO's 20 neighbours (Caron et
    al. 2021).

    Args:
        queried: (n, D) features.
        gallery: (m, D) features.
        labels: (m,) classes of the gallery, in [0, num_classes).
        num_classes: Number of classes, C.
        neighbours: Number of neighbours, k.
        temperature: The smaller it is, the more weight the nearest neighbours get.

    Returns:
        (n,) class indices.

    Raises:
        ValueError: If there are fewer than `neighbours` images in the gallery, or the temperature is not positive.

    Example:
        >>> gallery = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> knn_classify(torch.tensor([[5.0, 1.0]]), gallery, torch.tensor([2, 2, 0]), num_classes=3, neighbours=2)
        tensor([2])
    """
    check_vote(neighbours, temperature, len(gallery))
    gallery = F.normalize(gallery.float(), dim=-1)
    votes = []
    for part in queried.split(1024):  # the cosines of all pairs may not fit in memory
        cosines, nearest = (F.normalize(part.float(), dim=-1) @ gallery.T).topk(neighbours)  # (n, k)
        # Only ratios count, and exp(1 / 0.01) is too large for float32.
        weights = ((cosines - cosines[:, :1]) / temperature).exp()
        votes.append(weights.new_zeros(len(part), num_classes).scatter_add_(1, labels[nearest], weights))
    return torch.cat(votes).argmax(-1)


def check_vote(neighbours: int, temperature: float, images: int) -> None:
    """Raise a `ValueError` unless these arguments of `knn_classify` are valid for a gallery of `images` images."""
    if not 1 <= neighbours <= images:
        raise ValueError(f"Expected neighbours in [1, {images}], the gallery's images, got {neighbours}.")
    if not temperature > 0:
        raise ValueError(f"Expected a positive temperature, got {temperature}.")


@dataclass(frozen=True)
class RetrievalRow:
    """The results of one budget.

    Attributes:
        budget: The budget of the queried images.
        used_mean: Mean usage of a queried image, such as the number of queries.
        macs: Mean multiply-accumulates of a queried image.
        accuracy: Accuracy with the gallery's features computed at the same budget.
        standard_error: Standard error of `accuracy`.
        full_gallery_accuracy: Accuracy with the gallery's features computed by the full network.
        full_gallery_standard_error: Standard error of `full_gallery_accuracy`.
    """

    budget: Budget
    used_mean: float
    macs: float
    accuracy: float
    standard_error: float
    full_gallery_accuracy: float
    full_gallery_standard_error: float


@dataclass(frozen=True)
class Retrieval:
    """Rows by budget, and the conditions of the measurement."""

    rows: list[RetrievalRow]
    conditions: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"conditions": self.conditions, "rows": [plain(row) for row in self.rows]}


def retrieval_budgets(config: ElasticConfig) -> list[Budget]:
    """The budgets that are measured by default: a small one, a middle one and the full network.

    Example:
        >>> from hf_visual_perceiver import VisualPerceiverConfig
        >>> [str(budget) for budget in retrieval_budgets(VisualPerceiverConfig())]
        ['num_active_queries=4', 'num_active_queries=16', '']
    """
    budgets = config.budgets()
    return list(dict.fromkeys(budgets[i] for i in (len(budgets) // 3, 2 * len(budgets) // 3, -1)))


def compute_features(
    model: Any,
    data: ImageDataset,
    budgets: Sequence[Budget],
    feature: str = "pooled",
    batch_size: int = 256,
    description: str | None = None,
) -> tuple[dict[Budget, torch.Tensor], dict[Budget, np.ndarray], dict[Budget, np.ndarray]]:
    """Compute features of all images at each budget, (n, D) on the CPU, with each image's usage and MACs, (n,).

    Args:
        model: A model in eval mode, without a head.
        data: Images; the labels are not used.
        budgets: Budgets to run.
        feature: `"pooled"` for the head's input, or `"mean"` for the mean of the tokens.
        batch_size: Number of images per batch.
        description: Title of the progress on stderr; None shows no progress.

    Raises:
        ValueError: If the feature is unknown or a budget is out of the model's range.
    """
    if feature not in FEATURES:
        raise ValueError(f"Expected a feature among {', '.join(FEATURES)}, got {feature!r}.")
    for budget in budgets:
        model.config.resolve(**budget.kwargs)
    found: dict[Budget, list[tuple[torch.Tensor, ...]]] = {budget: [] for budget in budgets}
    for _, pixels in pixel_batches(model, data, batch_size, description):
        for budget in budgets:
            output = output_at(model, pixels, budget)
            features = output.pooler_output
            if feature == "mean":
                tokens = output.last_hidden_state  # (B, K, D), rows of removed tokens zero
                features = tokens.sum(1) / tokens.ne(0).any(-1).sum(1, keepdim=True)
            macs = model.config.count_macs(budget, output)
            found[budget].append((features.float().cpu(), output.used.cpu(), macs))
    features, used, macs = (
        {budget: torch.cat([parts[i] for parts in found[budget]]) for budget in budgets} for i in range(3)
    )
    return features, {b: x.numpy() for b, x in used.items()}, {b: x.numpy() for b, x in macs.items()}


def measure_retrieval(
    model: Any,
    gallery: ImageDataset,
    queried: ImageDataset,
    budgets: Sequence[Budget] | None = None,
    *,
    feature: str = "pooled",
    neighbours: int = 20,
    temperature: float = 0.07,
    batch_size: int = 256,
    progress: bool = True,
    conditions: dict[str, Any] | None = None,
) -> Retrieval:
    """Classify images by their nearest neighbours in a gallery, at several budgets.

    Args:
        model: A model in eval mode, as `AutoModel` loads it.
        gallery: Labelled images to search in.
        queried: Labelled images to classify.
        budgets: Budgets to measure; `retrieval_budgets` if None.
        feature: See `compute_features`.
        neighbours: See `knn_classify`.
        temperature: See `knn_classify`.
        batch_size: Number of images per batch.
        progress: Whether to show progress on stderr.
        conditions: Further facts to store with the result.

    Raises:
        ValueError: If the two datasets have different classes, or an argument is not as described.
    """
    budgets = retrieval_budgets(model.config) if budgets is None else budgets
    if gallery.label_names != queried.label_names:
        raise ValueError(
            f"Expected the same classes in gallery and queried images, got {', '.join(gallery.label_names[:10])} "
            f"and {', '.join(queried.label_names[:10])}."
        )
    check_vote(neighbours, temperature, len(gallery))
    both = list(dict.fromkeys([*budgets, Budget()]))
    known, _, _ = compute_features(model, gallery, both, feature, batch_size, "gallery" if progress else None)
    asked, used, macs = compute_features(
        model, queried, budgets, feature, batch_size, "queried images" if progress else None
    )
    labels = torch.from_numpy(gallery.labels)

    def score(budget: Budget, searched: Budget) -> dict[str, float]:
        found = knn_classify(asked[budget], known[searched], labels, len(gallery.label_names), neighbours, temperature)
        return Accuracy(keep_in_memory=True).compute(predictions=found.numpy(), references=queried.labels)

    rows = []
    for budget in budgets:
        alike, against_full = score(budget, budget), score(budget, Budget())
        rows.append(
            RetrievalRow(
                budget=budget,
                used_mean=float(used[budget].mean()),
                macs=float(macs[budget].mean()),
                accuracy=alike["accuracy"],
                standard_error=alike["standard_error"],
                full_gallery_accuracy=against_full["accuracy"],
                full_gallery_standard_error=against_full["standard_error"],
            )
        )
    measured = measurement_conditions(
        model.device,
        feature=feature,
        neighbours=neighbours,
        temperature=temperature,
        gallery_images=len(gallery),
        queried_images=len(queried),
        **(conditions or {}),
    )
    return Retrieval(rows, measured)
