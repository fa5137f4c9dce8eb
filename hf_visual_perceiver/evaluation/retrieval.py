"""How well a model's features find images of the same class, at every budget: weighted nearest neighbours.

Shapes: n queried images, m images of the gallery, k neighbours, D width, C classes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from hf_visual_perceiver.data.images import ImageDataset
from hf_visual_perceiver.evaluation.evaluate import OperatingPoint, mean_macs, output_at, pixel_batches
from hf_visual_perceiver.evaluation.metrics import Accuracy
from hf_visual_perceiver.modeling import VisualPerceiverModel
from hf_visual_perceiver.utils.choices import FEATURES
from hf_visual_perceiver.utils.conditions import measurement_conditions


BUDGETS = (4, 16)  # and all


def knn_classify(
    queried: torch.Tensor,
    gallery: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> torch.Tensor:
    """The class of each image by its nearest neighbours, each of which votes with exp(cosine / temperature).

    The protocol of instance discrimination (Wu et al. 2018, section 3.4), with DINO's 20 neighbours (Caron et al. 2021).

    Args:
        queried: (n, D) features.
        gallery: (m, D) features.
        labels: (m,) classes of the gallery, in [0, num_classes).
        num_classes: C.
        neighbours: k.
        temperature: The smaller, the more the nearest count.

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
    """Raise a `ValueError` unless `knn_classify` can count votes so in a gallery of so many images."""
    if not 1 <= neighbours <= images:
        raise ValueError(f"Expected neighbours in [1, {images}], the gallery's images, got {neighbours}.")
    if not temperature > 0:
        raise ValueError(f"Expected a positive temperature, got {temperature}.")


@dataclass(frozen=True)
class RetrievalRow:
    """What one operating point was measured to do.

    Attributes:
        num_active_queries: K.
        dqs_threshold: t, or None without selection.
        queries_mean: Queries that a queried image used.
        macs: Mean multiply-accumulates of one queried image.
        accuracy: With a gallery at the same point.
        standard_error: Standard error of that accuracy.
        full_gallery_accuracy: With a gallery at all queries.
        full_gallery_standard_error: Standard error of that accuracy.
    """

    num_active_queries: int
    dqs_threshold: float | None
    queries_mean: float
    macs: float
    accuracy: float
    standard_error: float
    full_gallery_accuracy: float
    full_gallery_standard_error: float


@dataclass(frozen=True)
class Retrieval:
    """Rows by operating point, and the conditions of the measurement."""

    rows: list[RetrievalRow]
    conditions: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"conditions": self.conditions, "rows": [asdict(row) for row in self.rows]}


def retrieval_points(
    num_queries: int, budgets: Sequence[int] | None = None, thresholds: Sequence[float] | None = None
) -> list[OperatingPoint]:
    """What to measure: every K given, and every t with all queries; 4, 16 and all queries if nothing is given.

    Example:
        >>> [str(point) for point in retrieval_points(64)]
        ['K = 4', 'K = 16', 'K = 64']
    """
    if not budgets and not thresholds:
        budgets = [*(K for K in BUDGETS if num_queries > K), num_queries]
    return list(
        dict.fromkeys(
            [*map(OperatingPoint, budgets or ()), *(OperatingPoint(num_queries, t) for t in thresholds or ())]
        )
    )


def compute_features(
    model: VisualPerceiverModel,
    data: ImageDataset,
    points: Sequence[OperatingPoint],
    feature: str = "pooled",
    batch_size: int = 256,
    description: str | None = None,
) -> tuple[dict[OperatingPoint, torch.Tensor], dict[OperatingPoint, np.ndarray]]:
    """Features of all images at each operating point, (n, D) on the CPU, and the queries that each used, (n,).

    Args:
        model: In eval mode.
        data: Images; labels play no part.
        points: The operating points.
        feature: `"pooled"`, what the output query reads, or `"mean"`, the mean of the active queries' tokens.
        batch_size: Images of a batch.
        description: What stderr calls it while it says how far it is; None says nothing.

    Raises:
        ValueError: If the feature is unknown or a point out of the model's range.
    """
    if feature not in FEATURES:
        raise ValueError(f"Expected a feature among {', '.join(FEATURES)}, got {feature!r}.")
    for point in points:
        model.config.operating_point(point.num_active_queries, point.dqs_threshold)
    features: dict[OperatingPoint, list[torch.Tensor]] = {point: [] for point in points}
    counts: dict[OperatingPoint, list[np.ndarray]] = {point: [] for point in points}
    for _, pixels in pixel_batches(model, data, batch_size, description):
        for point in points:
            output = output_at(model, pixels, point)
            used = output.active_queries.sum(1)
            # Rows of removed queries are zero.
            mean = output.last_hidden_state.sum(1) / used[:, None]
            features[point].append((output.pooler_output if feature == "pooled" else mean).float().cpu())
            counts[point].append(used.cpu().numpy())
    return (
        {point: torch.cat(parts) for point, parts in features.items()},
        {point: np.concatenate(parts) for point, parts in counts.items()},
    )


def measure_retrieval(
    model: VisualPerceiverModel,
    gallery: ImageDataset,
    queried: ImageDataset,
    points: Sequence[OperatingPoint] | None = None,
    *,
    feature: str = "pooled",
    neighbours: int = 20,
    temperature: float = 0.07,
    batch_size: int = 256,
    progress: bool = True,
    conditions: dict[str, Any] | None = None,
) -> Retrieval:
    """Classify images by their nearest neighbours in a gallery, at several operating points.

    Args:
        model: In eval mode, as `AutoModel` loads it.
        gallery: Labelled images to search in.
        queried: Labelled images to search for.
        points: What to measure; `retrieval_points` if None.
        feature: See `compute_features`.
        neighbours: See `knn_classify`.
        temperature: See `knn_classify`.
        batch_size: Images of a batch.
        progress: Say on stderr how far it is.
        conditions: More facts to keep with the result.

    Raises:
        ValueError: If the two sets have other classes, or an argument is not as described.
    """
    config, full = model.config, OperatingPoint(model.config.num_queries)
    points = retrieval_points(config.num_queries) if points is None else points
    if gallery.label_names != queried.label_names:
        raise ValueError(
            f"Expected the same classes in gallery and queried images, got {', '.join(gallery.label_names[:10])} "
            f"and {', '.join(queried.label_names[:10])}."
        )
    check_vote(neighbours, temperature, len(gallery))
    both = list(dict.fromkeys([*points, full]))
    known, _ = compute_features(model, gallery, both, feature, batch_size, "gallery" if progress else None)
    asked, counts = compute_features(
        model, queried, points, feature, batch_size, "queried images" if progress else None
    )
    labels = torch.from_numpy(gallery.labels)

    def score(point: OperatingPoint, searched: OperatingPoint) -> dict[str, float]:
        found = knn_classify(asked[point], known[searched], labels, len(gallery.label_names), neighbours, temperature)
        return Accuracy(keep_in_memory=True).compute(predictions=found.numpy(), references=queried.labels)

    rows = []
    for point in points:
        alike, against_full = score(point, point), score(point, full)
        rows.append(
            RetrievalRow(
                num_active_queries=config.operating_point(point.num_active_queries)[0],
                dqs_threshold=point.dqs_threshold,
                queries_mean=float(counts[point].mean()),
                macs=mean_macs(config, counts[point], point),
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
