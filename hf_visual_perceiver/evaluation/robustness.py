"""Accuracy and usage (such as queries per image) under common corruptions, at several budgets."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_visual_perceiver.data.images import ImageDataset, normalise, pixels_of_size
from hf_visual_perceiver.data.parts import evenly_spaced
from hf_visual_perceiver.evaluation.corruptions import CORRUPTIONS, SEVERITIES, Cifar10C, corrupt
from hf_visual_perceiver.evaluation.difficulty import Difficulty, measure_difficulty
from hf_visual_perceiver.evaluation.evaluate import (
    FORMER_KNOBS,
    FORMER_UNIT,
    form_of,
    labels_of_model,
    output_at,
    plain,
    with_budget,
)
from hf_visual_perceiver.modeling import Budget, ElasticConfig
from hf_visual_perceiver.utils.conditions import measurement_conditions
from hf_visual_perceiver.utils.console import tracked
from hf_visual_perceiver.utils.files import read_json


CLEAN, ALL = "clean", "all"


@dataclass(frozen=True)
class Outcome:
    """The results of one budget on the images of a cell.

    Attributes:
        budget: The budget.
        accuracy: Mean over images, and over corruptions and severities if the cell has several.
        standard_error: Standard error of `accuracy` over images, with the corruptions taken as given.
        used_mean: Mean usage of an image, such as the number of queries.
        adaptive: Whether the budget is adaptive, that is, whether usage depends on the image.
    """

    budget: Budget
    accuracy: float
    standard_error: float
    used_mean: float
    adaptive: bool


@dataclass(frozen=True)
class Cell:
    """The outcomes under one corruption at one severity.

    Attributes:
        corruption: Name of the corruption, `"clean"` or `"all"`.
        severity: 0 for clean images; None for the mean over the measured severities.
        outcomes: One outcome per budget, in the order of the result.
    """

    corruption: str
    severity: int | None
    outcomes: list[Outcome]


@dataclass(frozen=True)
class Robustness:
    """The result of `measure_robustness`.

    Attributes:
        cells: Clean images; each corruption at each severity and their mean; all corruptions at each severity and their mean.
        difficulty: Relation of usage to difficulty, for each adaptive budget, on clean images.
        conditions: Hardware, versions, data.
        unit: The unit in which usage is counted, such as queries; see `ElasticConfig`.
        knobs: Names of the knobs, by their short names.
    """

    cells: list[Cell]
    difficulty: list[Difficulty]
    conditions: dict[str, Any]
    unit: str = FORMER_UNIT
    knobs: dict[str, str] = field(default_factory=lambda: dict(FORMER_KNOBS))

    @property
    def budgets(self) -> list[Budget]:
        """The budgets, in the order of every cell's outcomes."""
        return [outcome.budget for outcome in self.cells[0].outcomes]

    @property
    def names(self) -> list[str]:
        """The names of the budgets in tables."""
        return [budget.short(self.knobs) for budget in self.budgets]

    @property
    def adaptive(self) -> list[int]:
        """The indices of the adaptive budgets."""
        return [i for i, outcome in enumerate(self.cells[0].outcomes) if outcome.adaptive]

    @property
    def full(self) -> Budget:
        """The full network, which is always measured."""
        fixed = [outcome for outcome in self.cells[0].outcomes if not outcome.adaptive]
        return max(fixed, key=lambda outcome: (outcome.budget == Budget(), outcome.used_mean)).budget

    @property
    def corruptions(self) -> list[str]:
        """The measured corruptions."""
        return [cell.corruption for cell in self.cells if cell.severity is None and cell.corruption != ALL]

    @property
    def severities(self) -> list[int]:
        """The measured severities, ascending."""
        return sorted({cell.severity for cell in self.cells if cell.severity})

    def cell(self, corruption: str, severity: int | None) -> list[Outcome]:
        """The outcomes under a corruption at a severity.

        Raises:
            ValueError: If they were not measured.
        """
        for cell in self.cells:
            if (cell.corruption, cell.severity) == (corruption, severity):
                return cell.outcomes
        measured = f"{', '.join(self.corruptions)} at {', '.join(map(str, self.severities))}"
        raise ValueError(f"Expected a corruption and severity among {measured}, got {corruption!r} at {severity}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return plain(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Robustness":
        """The inverse of `to_dict`; also reads results of earlier versions."""
        cells = [
            Cell(cell["corruption"], cell["severity"], [_outcome(outcome) for outcome in cell["outcomes"]])
            for cell in values["cells"]
        ]
        naming = {key: values[key] for key in ("unit", "knobs") if key in values}
        difficulty = [_difficulty(d) for d in values["difficulty"]]
        return cls(cells, difficulty, values["conditions"], **naming)


def _outcome(values: dict[str, Any]) -> Outcome:
    selects = values.get("dqs_threshold") is not None  # in results of earlier versions
    return Outcome(**{"adaptive": selects, **with_budget(values)})


def _difficulty(values: dict[str, Any]) -> Difficulty:
    if "budget" in values:
        return Difficulty.from_dict({**values, "budget": Budget(**values["budget"])})
    bins = [{key.replace("queries_", "used_"): value for key, value in b.items()} for b in values["bins"]]
    return Difficulty.from_dict(with_budget({"num_active_queries": None, **values, "bins": bins}))


def read_robustness(path: Path) -> Robustness:
    """Read a result that was written as JSON.

    Raises:
        ValueError: If the file is damaged.
    """
    return read_json(path, Robustness.from_dict)


def robustness_budgets(config: ElasticConfig) -> list[Budget]:
    """The budgets that are measured by default: four fixed ones, the last being the full network, and three adaptive.

    Example:
        >>> from hf_visual_perceiver import VisualPerceiverConfig
        >>> config = VisualPerceiverConfig(num_queries=32)
        >>> [budget.short(config.knobs) for budget in robustness_budgets(config)]
        ['K=4', 'K=8', 'K=16', 'full', 't=0.7', 't=0.8', 't=0.9']
    """
    adaptive = config.adaptive_budgets()
    return [*config.budgets()[-4:], *(adaptive[-4:-1] or adaptive)]


def measure_robustness(
    model: Any,
    data: ImageDataset,
    budgets: Sequence[Budget] | None = None,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    max_images: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = True,
    conditions: dict[str, Any] | None = None,
    cifar10_c: Path | None = None,
) -> Robustness:
    """Measure accuracy and usage on clean and corrupted images.

    Our own corruptions are applied to images that are resized to the network's size; those of CIFAR-10-C are resized
    after reading.

    Args:
        model: A model in eval mode, on the device and in the dtype to measure.
        data: Images whose classes the model knows.
        budgets: Budgets to measure, including the full network; `robustness_budgets` if None.
        corruptions: Keys of `CORRUPTIONS`, or names of files of CIFAR-10-C; None is all.
        severities: Severities to measure, from 1 to 5.
        max_images: Maximum number of images, evenly spaced in the dataset; None for all.
        seed: Random seed of the corruptions.
        batch_size: Number of images per batch.
        progress: Whether to show progress on stderr.
        conditions: Further facts to store with the result, such as the names of model and dataset.
        cifar10_c: Folder of the published CIFAR-10-C, which is then used instead of our own corruptions; `data` has to
            be CIFAR-10's test images.

    Raises:
        ValueError: If the dataset's labels are not the model's, or an argument is out of range.
    """
    config = model.config
    budgets = robustness_budgets(config) if budgets is None else list(dict.fromkeys(budgets))
    published = None if cifar10_c is None else Cifar10C(cifar10_c, data)
    known = list(CORRUPTIONS) if published is None else published.corruptions
    corruptions = known if corruptions is None else list(dict.fromkeys(corruptions))
    severities = sorted(set(severities))
    _check(config, budgets, corruptions, known, severities, batch_size)
    places_in_data = evenly_spaced(len(data), max_images)
    chosen, count = data if max_images is None else data.subset(places_in_data), len(places_in_data)
    labels = labels_of_model(model, chosen)

    kinds = [(CLEAN, 0), *((c, s) for c in corruptions for s in severities)]
    right = np.zeros((len(kinds), len(budgets), count), dtype=bool)
    used = np.zeros((len(kinds), len(budgets), count), dtype=np.int32)
    confidence = np.zeros(count)
    full = budgets.index(Budget())
    cfg = config.timm_pretrained_cfg
    size, interpolation = config.image_height_width, cfg["interpolation"]
    batches = [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
    pieces = [(places, kind) for places in batches for kind in range(len(kinds))]
    for places, kind in tracked(pieces, "corrupting" if progress else None):
        (corruption, severity), here = kinds[kind], slice(places.start, places.stop)
        if corruption == CLEAN:  # the first kind
            images = clean = pixels_of_size(chosen, places, size, interpolation)
        elif published is not None:
            corrupted = published.images(corruption, severity).subset(places_in_data[here])
            images = pixels_of_size(corrupted, range(len(places)), size, interpolation)
        else:
            images = corrupt(clean, corruption, severity, seed, places_in_data[here].tolist())
        pixels = normalise(images, cfg["mean"], cfg["std"]).to(model.device, model.dtype)
        for number, budget in enumerate(budgets):
            output = output_at(model, pixels, budget)
            right[kind, number, here] = output.logits.argmax(-1).cpu().numpy() == labels[here]
            used[kind, number, here] = output.used.cpu().numpy()
            if corruption == CLEAN and number == full:
                confidence[here] = output.logits.float().softmax(-1).amax(-1).cpu().numpy()

    adaptive = [config.is_adaptive(budget) for budget in budgets]

    def cell(corruption: str, severity: int | None, members: list[int]) -> Cell:
        scores = right[members].mean(0)  # (budgets, images)
        errors = scores.std(1) / np.sqrt(count)
        means = used[members].mean((0, 2))
        rows = zip(budgets, scores.mean(1).tolist(), errors.tolist(), means.tolist(), adaptive, strict=True)
        return Cell(corruption, severity, [Outcome(*row) for row in rows])

    cells = [cell(CLEAN, 0, [0])]
    for corruption in [*corruptions, ALL]:
        members = [i for i, (name, _) in enumerate(kinds) if name == corruption or (corruption == ALL and i)]
        for severity in severities:
            cells.append(cell(corruption, severity, [i for i in members if kinds[i][1] == severity]))
        cells.append(cell(corruption, None, members))
    difficulty = [
        measure_difficulty(budget, used[0, number], confidence, right[0, full])
        for number, budget in enumerate(budgets)
        if adaptive[number]
    ]
    measured_under = measurement_conditions(
        model.device,
        **form_of(model),
        batch_size=batch_size,
        images=count,
        images_in_split=len(data),
        seed=seed,
        corrupted_by="this package" if published is None else "CIFAR-10-C",
        **(conditions or {}),
    )
    return Robustness(cells, difficulty, measured_under, config.unit, dict(config.knobs))


def _check(
    config: ElasticConfig,
    budgets: list[Budget],
    corruptions: list[str],
    known: list[str],
    severities: list[int],
    batch_size: int,
) -> None:
    for budget in budgets:
        config.resolve(**budget.kwargs)
    if Budget() not in budgets:
        names = ", ".join(budget.short(config.knobs) for budget in budgets)
        raise ValueError(f"Expected the full network among the budgets, got {names}.")
    unknown = [c for c in corruptions if c not in known]
    if unknown or not corruptions:
        raise ValueError(f"Expected corruptions among {', '.join(known)}, got {', '.join(unknown) or 'none'}.")
    if not severities or not set(severities) <= set(SEVERITIES):
        raise ValueError(f"Expected severities from 1 to 5, got {', '.join(map(str, severities)) or 'none'}.")
    if batch_size < 1:
        raise ValueError(f"Expected a batch size of at least 1, got {batch_size}.")
