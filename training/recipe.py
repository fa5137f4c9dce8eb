"""Recipes: one YAML file that describes a whole training run."""

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import yaml
from huggingface_hub.errors import StrictDataclassError
from pydantic import BeforeValidator, Field

from hf_visual_perceiver.modeling import family_of
from hf_visual_perceiver.training.validation import (
    CHECKED,
    AtLeast0,
    Count,
    Flag,
    Positive,
    Share,
    Whole,
    checked_dataclass,
    require,
    validated,
)


TIMM = "timm/"  # prefix of an `architecture` that is a timm model
# Former keys of recipes, which runs and checkpoints may have, and what they are called now.
FORMER_NAMES = {"queries": "budgets", "evaluate_queries": "evaluate_budgets"}

Between0And1 = Annotated[float, Field(gt=0, lt=1)]


def _no(value: Any) -> Any:
    """Undo YAML 1.1, which reads the no of `mixed_precision: no` as false."""
    return "no" if value is False else value


def _warmup(value: Any) -> Any:
    try:
        number = value if type(value) is int else float(value)
    except (TypeError, ValueError):
        number = -1
    fits = number >= 0 if type(number) is int else 0 <= number < 1
    require(fits, "warmup_steps", "a number of steps, or a share of them in [0, 1)", value)
    return number


@checked_dataclass(frozen=True, kw_only=True, config=CHECKED)
class Augmentation:
    """Augmentations of a training image, with timm's meaning and DeiT's names (see augmentation.py)."""

    random_crop_padding: Whole | None = None  # pixels of padding before a crop; None is a random resized crop
    horizontal_flip: Share = 0.5  # probability
    # Flip each image in every other epoch instead, from a random first one on (Jordan 2024, "94% on CIFAR-10 in 3.29
    # Seconds").
    alternating_flip: Flag = False
    auto_augment: str | None = None  # timm's notation of RandAugment, such as rand-m9-mstd0.5-inc1
    random_erasing: Share = 0.0  # probability
    mixup: AtLeast0 = 0.0  # alpha of the beta distribution; 0 is off
    cutmix: AtLeast0 = 0.0  # alpha of the beta distribution; 0 is off
    mixup_probability: Share = 1.0  # probability of mixing an image at all
    mixup_switch: Share = 0.5  # probability of cutmix when both are on
    label_smoothing: Share = 0.0
    repeats: Count = 1  # how often an image occurs in a batch, with a new augmentation each time


@checked_dataclass(frozen=True, kw_only=True, config=CHECKED)
class StudentLoss:
    """Loss of a sandwich's smaller budgets: alpha KL(teacher || student) + (1 - alpha) CE, averaged over students."""

    weight: AtLeast0 = 1.0  # lambda: weight of the students' loss relative to that of the full network
    distillation: Share = 1.0  # alpha
    teacher: Literal["full", "ema"] = (
        "full"  # full: the full network's output in this step; ema: that of its moving average
    )


@checked_dataclass(frozen=True, kw_only=True, config=CHECKED)
class TeacherLoss:
    """A frozen teacher for the passes that learn from the labels (DeiT: Touvron et al. 2021, section 4)."""

    model: str  # a folder or Hub id of a transformers image classifier, or the name of a timm model
    distillation: Literal["soft", "hard"] = (
        "soft"  # soft: KL at a temperature; hard: cross-entropy with the teacher's decision
    )
    weight: Share = 0.5  # weight of the teacher's loss; the labels' loss has the rest
    temperature: Positive = 1.0  # for soft distillation
    # A folder for the teacher's logits on `views` fixed augmented views of each training image, computed once and
    # shared by all runs with this teacher, augmentation and data; each epoch uses one view. None runs the teacher in
    # every step.
    cache: str | None = None
    views: Count = 16


@checked_dataclass(frozen=True, kw_only=True, config=CHECKED)
class Recipe:
    """A training run. `load_recipe` reads one from YAML and checks it.

    Everything that a run does follows from its recipe: the batch, augmentation, mixing and K of a step are functions of
    `seed` and the step alone.
    """

    architecture: str  # one of our families' architectures, or timm/NAME for any timm classifier, to train a teacher
    # Overrides of the architecture's config; for a timm network, image_size and arguments of timm.create_model.
    config: dict[str, Any] = field(default_factory=dict)
    initial_model: str | None = None  # a folder or Hub id whose weights the run starts from; None is random weights
    initial_stem: str | None = None  # a folder or Hub id of a trained conv_stem_classifier_32, for a convolutional stem
    # Weight of the loss of linear classifiers on the pooled features of each level of a convolutional stem; they are
    # dropped after training.
    stem_loss: AtLeast0 = 0.0
    attention: str | None = None  # sdpa, eager or flash_attention_2; None is transformers' choice

    dataset: str = "uoft-cs/cifar10"  # Hub id, folder of parquet files, or imagefolder
    dataset_name: str | None = None  # the dataset's name on the model card; None is `dataset` as the file has it
    split: str = "train"
    # Number of held-out images: the last of the split, or evenly spaced ones where it is sorted by class. 0 trains on
    # all.
    validation: Whole = 0
    validation_split: str | None = None  # validate on `validation` images of this split instead; 0 is all
    streaming: Flag = False  # stream the dataset; each process reads its share of the shards
    shuffle_window: Count = 8192  # images of a stream that are shuffled at a time, per process
    unreadable: Literal["error", "replace"] = (
        "error"  # error: an unreadable image of a stream raises; replace: another image of the batch takes its place
    )
    cache_gib: AtLeast0 = 8.0  # decoded images of one size are kept in memory up to this; 0 decodes at each use
    workers: Whole = 0  # worker processes per training process, which decode and crop images that are not in memory

    budgets: dict[str, Any] = field(default_factory=lambda: {"schedule": "uniform"})  # see schedules.py
    students: StudentLoss = field(default_factory=StudentLoss)  # for the sandwich schedule
    teacher: TeacherLoss | None = None

    steps: Count = 1
    batch_size: Count = 512  # images of one step, over all processes
    learning_rate: Positive = 5e-4
    min_learning_rate: AtLeast0 = 1e-5
    warmup_steps: Annotated[int | float, BeforeValidator(_warmup)] = (
        0  # number of steps, or a share of `steps` if it is a float below 1
    )
    warmup_learning_rate: AtLeast0 = 1e-6
    optimizer: str = "adamw"  # a name that timm's optimizer factory knows
    weight_decay: AtLeast0 = 0.05
    clip_gradient_norm: Positive | None = None
    ema_decay: Between0And1 | None = None  # decay of the averaged weights, which are then evaluated and published
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(_no)] = "no"  # no, bf16 or fp16

    micro_batch_size: Count | None = None  # images per forward and backward pass in each process; None is all
    # Run several passes through the trunk together (packed) or one after the other (split); auto chooses by device.
    trunk: Literal["auto", "packed", "split"] = "auto"
    compile: Flag = False  # torch.compile the blocks; meant for GPUs

    augmentation: Augmentation = field(default_factory=Augmentation)

    evaluate_every: Count | None = None  # steps; None evaluates only at the end
    evaluate_budgets: list[Count] | None = None  # values of K to evaluate, see schedules.py; None is the full network
    save_every: Count = 1000  # steps
    keep_checkpoints: Count = 2
    log_every: Count = 10  # steps
    tracker: str | None = "tensorboard"  # any of accelerate's trackers, if installed
    seed: Whole = 0

    def __post_init__(self) -> None:
        for name in ("min_learning_rate", "warmup_learning_rate"):
            require(getattr(self, name) <= self.learning_rate, name, "at most learning_rate", getattr(self, name))
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"Expected `warmup_steps` to be below steps = {self.steps}, got {self.warmup_steps}: "
                f"add warmup_steps={self.steps // 10}, or a share of the steps such as warmup_steps=0.05."
            )
        padding = self.augmentation.random_crop_padding
        cropped = padding is not None and not self.streaming
        require(
            cropped or not self.augmentation.alternating_flip,
            "augmentation.random_crop_padding",
            "given, and `streaming` false, for `alternating_flip`",
            padding,
        )
        averaged = self.students.teacher != "ema" or self.ema_decay is not None
        require(averaged, "ema_decay", "given, as `students.teacher` is ema", self.ema_decay)
        if self.teacher is not None and self.teacher.cache is not None:
            mixing = self.augmentation.mixup or self.augmentation.cutmix
            require(not mixing, "augmentation.mixup", "0, like cutmix, with `teacher.cache`", mixing)
            require(
                cropped and self.augmentation.repeats == 1,
                "augmentation.random_crop_padding",
                "given, `streaming` false and `augmentation.repeats` 1, with `teacher.cache`",
                padding,
            )
        if self.streaming:
            held_out = self.validation == 0 or self.validation_split is not None
            require(held_out, "validation_split", "given, as a stream has no last images", self.validation_split)
        if self.timm_name is not None:
            self._check_timm(self.timm_name)
            return
        kind = family_of(self.architecture).config
        unknown = sorted(set(self.config) - set(kind.__dataclass_fields__))
        require(not unknown, "config", f"fields of {kind.__name__}", unknown)
        config = self.model_config(num_labels=2)
        require(config.num_channels == 3, "config.num_channels", "3, as images are read in RGB", config.num_channels)
        for key in ("initial_stem", "stem_loss"):
            stem = getattr(config, "stem", None)
            require(stem == "conv" or not getattr(self, key), "config.stem", f"conv with `{key}`", stem)
        steps = len(config.ladder())
        for K in self.evaluate_budgets or []:
            require(steps >= K, "evaluate_budgets", f"an integer in [1, {steps}]", K)

    @property
    def warmup(self) -> int:
        """`warmup_steps` as a number of steps."""
        if isinstance(self.warmup_steps, float):
            return min(round(self.warmup_steps * self.steps), self.steps - 1)
        return self.warmup_steps

    @property
    def timm_name(self) -> str | None:
        """timm's name of the network to train; None if it is of one of our families."""
        return self.architecture.removeprefix(TIMM) if self.architecture.startswith(TIMM) else None

    def _check_timm(self, name: str) -> None:
        require(timm.is_model(name), "architecture", "timm/ and the name of one of timm's models", self.architecture)
        size = self.config.get("image_size", 32)
        integer = isinstance(size, int) and not isinstance(size, bool)
        require(integer and size >= 1, "config.image_size", "an integer of at least 1", size)
        # timm reports other unfitting keys itself, when the network is created.
        fixed = self.budgets == {"schedule": "fixed", "K": 1}
        require(fixed, "budgets", "{schedule: fixed, K: 1} for a timm network, which has no queries", self.budgets)
        budgets = self.evaluate_budgets
        require(budgets in (None, [1]), "evaluate_budgets", "null or [1] for a timm network", budgets)
        for key in ("initial_model", "initial_stem", "attention"):
            value = getattr(self, key)
            require(value is None, key, "null for a timm network", value)
        require(not self.stem_loss, "stem_loss", "0 for a timm network", self.stem_loss)

    def model_config(self, **fields: Any) -> Any:
        """The config of the model to train; `fields` adds what comes from the dataset, such as the labels."""
        try:
            return family_of(self.architecture).create_config(self.architecture, **{**self.config, **fields})
        except StrictDataclassError as error:
            raise ValueError(f"`config` does not fit: {' '.join(str(error).split())}") from error

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, as in the YAML."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]  # pydantic's dataclass is one


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `overrides` such as `steps=100` or `augmentation.mixup=0`.

    Raises:
        ValueError: If the file or an override does not fit; the message names the key and what is allowed.
        FileNotFoundError: If there is no such file.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"Expected {path} to be YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"Expected {path} to hold keys and values, got {type(values).__name__}.")
    values = with_new_names(values)
    # The name as in the file: an override may replace `dataset` by a path on this machine.
    values.setdefault("dataset_name", values.get("dataset", Recipe.dataset))
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"Expected an override such as steps=100, got {override!r}.")
        place = values
        first, *rest = key.split(".")
        *parents, last = FORMER_NAMES.get(first, first), *rest
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ValueError(f"Expected `{parent}` in the override {override!r} to be a group of keys.")
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"Expected YAML after the = of the override {override!r}.") from error
    return recipe_from_dict(values, source=str(path))


def with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a recipe with the keys that earlier versions called otherwise renamed.

    Example:
        >>> with_new_names({"queries": {"schedule": "uniform"}, "steps": 10})
        {'budgets': {'schedule': 'uniform'}, 'steps': 10}
    """
    return {FORMER_NAMES.get(key, key): value for key, value in values.items()}


def recipe_from_dict(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """Build a recipe from plain values, checking keys and types."""
    values = with_new_names(values)
    groups = {"augmentation": Augmentation, "students": StudentLoss, "teacher": TeacherLoss}
    # Groups first, so that the message for an unknown key in a group lists that group's keys.
    built = {
        key: validated(groups[key], value, f"`{key}` of {source}")
        if key in groups and isinstance(value, dict)
        else value
        for key, value in values.items()
    }
    return validated(Recipe, built, source)
