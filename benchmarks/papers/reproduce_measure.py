"""Measurements for the report on the paper, on the checkpoints that exist."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from hf_visual_perceiver.data.images import ImageDataset
from hf_visual_perceiver.evaluation.attention_maps import average_attention
from hf_visual_perceiver.evaluation.corruptions import SEVERITIES
from hf_visual_perceiver.evaluation.evaluate import (
    Evaluation,
    Row,
    evaluate,
    labels_of_model,
    pixel_batches,
)
from hf_visual_perceiver.evaluation.paper import QUERIES, RANDOM_DRAWS, THRESHOLDS
from hf_visual_perceiver.evaluation.robustness import Robustness, measure_robustness
from hf_visual_perceiver.inference.loading import load_model, shipped
from hf_visual_perceiver.modeling import Budget, VisualPerceiverForImageClassification
from hf_visual_perceiver.modeling.query_selection import cosine_similarities, select_queries


QUERY_MASKING, FIXED = "query_masking", "fixed_64"

# Of the similarity matrix (the paper's Figure 10) and the gallery.
SHOWN_THRESHOLD = 0.9


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoint folders of the report; None if missing.

    Attributes:
        query_masking: One network for every number of queries.
        fixed: Trained with all queries.
        specialists: K to a network of that K.
        missing: Role to its configured folder that does not exist, or None if none is configured.
    """

    query_masking: Path | None
    fixed: Path | None
    specialists: dict[int, Path]
    missing: dict[str, str | None]


def paper_queries(Q: int) -> list[int]:
    """The paper's numbers of queries that a network of Q queries has, and all Q."""
    return [*(K for K in QUERIES if Q > K), Q]


def paper_budgets(Q: int) -> list[Budget]:
    """The budgets of the paper's Tables 1 and 3."""
    return [
        *(Budget(num_active_queries=K) for K in paper_queries(Q)),
        *(Budget(dqs_threshold=t) for t in THRESHOLDS),
    ]


def num_active_queries(row: Row) -> int:
    """K of a row without a threshold."""
    return row.budget.kwargs["num_active_queries"]


def dqs_threshold(row: Row) -> float | None:
    """t of a row, None without one."""
    return row.budget.kwargs.get("dqs_threshold")


def specialist_role(K: int) -> str:
    """The role of the specialist of K queries in the report."""
    return f"specialist {K}"


def read_checkpoints(path: Path) -> Checkpoints:
    """Read the YAML that names the checkpoints; see `reproduce.yaml`.

    Raises:
        ValueError: If the file is not valid, has an unknown role, or names no existing checkpoint.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"Cannot read the checkpoints of {path}: {' '.join(str(error).split())}") from error
    roles = (QUERY_MASKING, FIXED, "specialists")
    if not isinstance(values, dict):
        raise ValueError(f"Expected {path} to name checkpoints by role ({', '.join(roles)}), got {values!r}.")
    if unknown := [str(role) for role in values if role not in roles]:
        raise ValueError(f"Expected roles among {', '.join(roles)} in {path}, got {', '.join(unknown)}.")
    specialists = values.get("specialists") or {}
    if not isinstance(specialists, dict) or any(type(K) is not int or K < 1 for K in specialists):
        raise ValueError(f"Expected specialists in {path} to map a number of queries to a folder, got {specialists!r}.")
    named = {QUERY_MASKING: values.get(QUERY_MASKING), FIXED: values.get(FIXED)}
    named |= {specialist_role(K): name for K, name in sorted(specialists.items())}
    for role, name in named.items():
        if name is not None and not (isinstance(name, str) and name):
            raise ValueError(f"Expected a folder for {role} in {path}, got {name!r}.")
    found = {role: _find(name, path.parent) for role, name in named.items() if name is not None}
    missing = {role: name for role, name in named.items() if found.get(role) is None}
    if len(missing) == len(named):
        raise ValueError(f"Expected at least one checkpoint of {path} to exist, got none.")
    networks = {K: found.get(specialist_role(K)) for K in sorted(specialists)}
    return Checkpoints(
        query_masking=found.get(QUERY_MASKING),
        fixed=found.get(FIXED),
        specialists={K: folder for K, folder in networks.items() if folder is not None},
        missing=missing,
    )


def _find(name: str, base: Path) -> Path | None:
    for folder in (base / name, Path(name)):
        if folder.is_dir():
            return folder
    try:
        return shipped(name)
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class SubsetRow:
    """The fixed network with K random queries, in several draws."""

    num_active_queries: int
    accuracies: list[float]  # one per draw
    macs: float
    ms_per_image: float  # median over draws

    @property
    def mean(self) -> float:
        """Accuracy, mean over draws."""
        return float(np.mean(self.accuracies))

    @property
    def deviation(self) -> float:
        """Sample standard deviation of the accuracy over draws; 0 for a single draw."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else 0.0


@dataclass(frozen=True)
class Selection:
    """The result of Dynamic Query Selection for each image at one threshold.

    Attributes:
        threshold: t.
        counts: (n,) queries kept.
        predictions: (n,) index of the model's label.
        similarities: (Q, Q) cosine similarities of the queries in the example.
        keep: (Q,) bool, the kept queries of the example.
        example: Index of the image.
    """

    threshold: float
    counts: np.ndarray
    predictions: np.ndarray
    similarities: np.ndarray
    keep: np.ndarray
    example: int


@dataclass
class Measurements:
    """All results that the sections show; None or empty where the checkpoint is missing."""

    data: ImageDataset
    networks: dict[str, VisualPerceiverForImageClassification]
    folders: dict[str, Path]
    missing: dict[str, str | None]
    conditions: dict[str, Any]
    query_masking: Evaluation | None = None
    specialists: dict[int, Row] = field(default_factory=dict)
    random_subsets: list[SubsetRow] = field(default_factory=list)
    attention: dict[str, np.ndarray] = field(default_factory=dict)
    selection: Selection | None = None
    robustness: Robustness | None = None


def measure(
    checkpoints: Checkpoints,
    data: ImageDataset,
    batch_size: int = 256,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    example: int = 0,
    progress: bool = True,
    robustness_images: int = 0,
    robustness_severities: Sequence[int] = SEVERITIES,
    conditions: dict[str, Any] | None = None,
) -> Measurements:
    """Measure everything that the report shows.

    Args:
        checkpoints: The checkpoint of each role.
        data: Images that the networks have labels for.
        batch_size: Images of a batch.
        device: torch's name.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        seed: Random seed of the subsets.
        example: Index of the image whose similarities are shown.
        progress: Say on stderr how far it is.
        robustness_images: Also measure this many images under common corruptions, evenly spaced; 0 for none.
        robustness_severities: Severities of the corruptions, some of 1 to 5.
        conditions: More facts to keep with the results, such as the name of the dataset.

    Raises:
        ValueError: If a network does not fit its role or the dataset, or there is no such image.
    """
    if not 0 <= example < len(data):
        raise ValueError(f"Expected the index of an image in [0, {len(data)}), got {example}.")
    folders = {QUERY_MASKING: checkpoints.query_masking, FIXED: checkpoints.fixed}
    folders |= {specialist_role(K): folder for K, folder in checkpoints.specialists.items()}
    there = {role: folder for role, folder in folders.items() if folder is not None}
    networks = {}
    # What does not fit is said before anything is measured.
    for role, folder in there.items():
        network = networks[role] = load_model(str(folder), device, dtype)
        try:
            labels_of_model(network, data)
        except ValueError as error:
            raise ValueError(f"The {role} checkpoint does not fit the dataset: {error}") from error
    for K in checkpoints.specialists:
        Q = networks[specialist_role(K)].config.num_queries
        if K > Q:
            raise ValueError(f"Expected the specialist of {K} queries to have at least as many, got {Q}.")

    result = Measurements(data, networks, there, checkpoints.missing, {})
    if network := networks.get(QUERY_MASKING):
        result.query_masking = evaluate(network, data, paper_budgets(network.config.num_queries), batch_size, progress)
        result.conditions = result.query_masking.conditions
        result.selection = measure_selection(network, data, SHOWN_THRESHOLD, example, batch_size)
        if robustness_images:
            result.robustness = measure_robustness(
                network.optimize_for_inference(),  # the same answers, sooner
                data,
                severities=robustness_severities,
                max_images=robustness_images,
                seed=seed,
                batch_size=batch_size,
                progress=progress,
                conditions={"model": there[QUERY_MASKING].name, **(conditions or {})},
            )
    for K in checkpoints.specialists:
        evaluation = evaluate(
            networks[specialist_role(K)], data, [Budget(num_active_queries=K)], batch_size=batch_size, progress=progress
        )
        result.specialists[K] = evaluation.rows[0]
        result.conditions = result.conditions or evaluation.conditions
    if network := networks.get(FIXED):
        budgets = paper_queries(network.config.num_queries)
        result.random_subsets, measured_under = measure_random_subsets(
            network, data, budgets, seed, batch_size, progress
        )
        result.conditions = result.conditions or measured_under
    for role, network in networks.items():
        batches = (pixels for _, pixels in pixel_batches(network, data, batch_size))
        result.attention[role] = average_attention(
            network, batches, Budget(num_active_queries=_specialised(role, checkpoints))
        )
    result.conditions = {**result.conditions, **(conditions or {}), "seed": seed}
    return result


def _specialised(role: str, checkpoints: Checkpoints) -> int | None:
    return next((K for K in checkpoints.specialists if specialist_role(K) == role), None)


def measure_random_subsets(
    model: VisualPerceiverForImageClassification,
    data: ImageDataset,
    budgets: Sequence[int],
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = True,
    draws: int = RANDOM_DRAWS,
) -> tuple[list[SubsetRow], dict[str, Any]]:
    """Accuracy with K random queries, the same for all images of a draw (section 3.1 of the paper).

    A draw is a random order of all queries; its subset of K queries is the first K of them, which is uniformly random for
    each K. With all queries, every draw is the same.

    Returns:
        A row for each K, and the conditions of the measurement.
    """
    generator = torch.Generator().manual_seed(seed)
    evaluations = []
    for _ in range(draws):
        order = torch.randperm(model.config.num_queries, generator=generator)
        points = [Budget(num_active_queries=K) for K in budgets]
        evaluations.append(evaluate(reorder_queries(model, order), data, points, batch_size, progress))
    rows = [
        SubsetRow(
            num_active_queries=K,
            accuracies=[e.rows[i].accuracy for e in evaluations],
            macs=evaluations[0].rows[i].macs,
            ms_per_image=float(np.median([e.rows[i].ms_per_image for e in evaluations])),
        )
        for i, K in enumerate(budgets)
    ]
    return rows, evaluations[0].conditions


def reorder_queries(
    model: VisualPerceiverForImageClassification, order: torch.Tensor
) -> VisualPerceiverForImageClassification:
    """Copy a model with reordered queries, so that its first K are `order[:K]`.

    The blocks after the cross-attention have no positions, so with all queries the copy computes the same.
    """
    reordered = copy.deepcopy(model)
    queries = reordered.visual_perceiver.cross_attention.queries
    queries.data = queries.data[order.to(queries.device)]
    return reordered


@torch.inference_mode()
def measure_selection(
    model: VisualPerceiverForImageClassification,
    data: ImageDataset,
    threshold: float,
    example: int = 0,
    batch_size: int = 256,
) -> Selection:
    """Measure the kept queries of each image at a threshold, and the similarities of one image."""
    counts, predictions, parts = [], [], []
    for indices, pixels in pixel_batches(model, data, batch_size):
        output = model(pixels, num_active_queries=model.config.num_queries, dqs_threshold=threshold)
        counts.append(output.used.cpu().numpy())
        predictions.append(output.logits.argmax(-1).cpu().numpy())
        if example in indices:
            i = example - indices.start
            y = model.visual_perceiver.read(pixels[i : i + 1], model.config.num_queries)
            parts = [cosine_similarities(y)[0], select_queries(y, threshold, model.config.dqs_reference)[0]]
    similarities, keep = (part.cpu().numpy() for part in parts)
    return Selection(threshold, np.concatenate(counts), np.concatenate(predictions), similarities, keep, example)
