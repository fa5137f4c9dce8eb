"""Recipes: one YAML file that says everything about a training run."""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import yaml
from huggingface_hub.errors import StrictDataclassError

from hf_visual_perceiver.modeling import VisualPerceiverConfig


TIMM = "timm/"  # before the name of a network of timm


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What happens to a training image; the meaning is timm's, the names are DeiT's (see augmentation.py)."""

    random_crop_padding: int | None = None  # pixels around the image before a crop; None is a random resized crop
    horizontal_flip: float = 0.5  # probability
    # Flip an image in every other epoch instead, beginning at random (Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds").
    alternating_flip: bool = False
    auto_augment: str | None = None  # timm's notation of RandAugment, such as rand-m9-mstd0.5-inc1
    random_erasing: float = 0.0  # probability
    mixup: float = 0.0  # alpha of the beta distribution; 0 is off
    cutmix: float = 0.0  # likewise
    mixup_probability: float = 1.0  # of mixing an image at all
    mixup_switch: float = 0.5  # probability of cutmix when both are on
    label_smoothing: float = 0.0
    repeats: int = 1  # times that an image stands in a batch, each time augmented anew


@dataclass(frozen=True, kw_only=True)
class StudentLoss:
    """How the smaller subsets of a sandwich learn: alpha KL(teacher || student) + (1 - alpha) CE, the mean over students."""

    weight: float = 1.0  # lambda, of the students' loss beside that of the full network
    distillation: float = 1.0  # alpha
    teacher: str = "full"  # the answer of the full network in this step, or of its moving average: full or ema


@dataclass(frozen=True, kw_only=True)
class TeacherLoss:
    """A frozen network that teaches what learns from the labels (DeiT: Touvron et al. 2021, section 4)."""

    model: str  # a folder or Hub id of a transformers image classifier, or the name of a timm model
    distillation: str = "soft"  # soft: KL at a temperature; hard: cross-entropy with the teacher's decision
    weight: float = 0.5  # of the teacher; the labels have the rest
    temperature: float = 1.0  # of soft distillation
    # A folder for the teacher's answers on `views` fixed augmented views of each training image, computed once and shared by
    # all runs with this teacher, augmentation and data; an epoch shows one view. None asks the teacher in every step.
    cache: str | None = None
    views: int = 16


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run. `load_recipe` reads one from YAML and checks it.

    Everything that a run does follows from its recipe: the batch, augmentation, mixing and K of a step are functions of
    `seed` and the step alone.
    """

    architecture: str  # one of modeling.ARCHITECTURES, or timm/NAME of any classifier of timm, to become a teacher
    # Overrides of the architecture's config; of a timm network, image_size and arguments of timm.create_model.
    config: dict[str, Any] = field(default_factory=dict)
    initial_model: str | None = None  # a folder or Hub id whose weights the run begins with; None is random weights
    initial_stem: str | None = None  # a folder or Hub id of a trained conv_stem_classifier_32, for a convolutional stem
    attention: str | None = None  # sdpa, eager or flash_attention_2; None is transformers' choice

    dataset: str = "uoft-cs/cifar10"  # Hub id, folder of parquet files, or imagefolder
    dataset_name: str | None = None  # what the card calls it; None is `dataset` as the file says
    split: str = "train"
    # Images kept for choosing: the last of the split, or evenly spaced ones where it is sorted by class. 0 trains on all.
    validation: int = 0
    validation_split: str | None = None  # choose on `validation` images of this split instead, 0 is all
    streaming: bool = False  # read the dataset as it is needed, each process its share of the shards
    shuffle_window: int = 8192  # images of a stream that are shuffled at a time, for each process
    unreadable: str = "error"  # what an unreadable image of a stream is: error, or replace it by another of the batch
    cache_gib: float = 8.0  # decoded images of one size are kept in memory up to this; 0 decodes at each use
    workers: int = 0  # processes that decode and crop what is not in memory, for each training process

    queries: dict[str, Any] = field(default_factory=lambda: {"schedule": "uniform"})  # see schedules.py
    students: StudentLoss = field(default_factory=StudentLoss)  # of a sandwich
    teacher: TeacherLoss | None = None

    steps: int = 1
    batch_size: int = 512  # images of one step, over all processes
    learning_rate: float = 5e-4
    min_learning_rate: float = 1e-5
    warmup_steps: int | float = 0  # steps, or, as a number below 1 with a point, a share of `steps`
    warmup_learning_rate: float = 1e-6
    optimizer: str = "adamw"  # a name of timm's factory
    weight_decay: float = 0.05
    clip_gradient_norm: float | None = None
    ema_decay: float | None = None  # of the averaged weights, which are then the ones evaluated and published
    mixed_precision: str = "no"  # no, bf16 or fp16

    micro_batch_size: int | None = None  # images that go forward and backward at a time in each process; None is all
    trunk: str = (
        "auto"  # several subsets go through it together (packed), or one after the other (split); auto: by device
    )
    compile: bool = False  # torch.compile the blocks; meant for GPUs

    augmentation: Augmentation = field(default_factory=Augmentation)

    evaluate_every: int | None = None  # steps; None is only at the end
    evaluate_queries: list[int] | None = None  # the K to evaluate at; None is all queries
    save_every: int = 1000  # steps
    keep_checkpoints: int = 2
    log_every: int = 10  # steps
    tracker: str | None = "tensorboard"  # any of accelerate's trackers, if installed
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "save_every", "keep_checkpoints", "log_every")
        for name in positive:
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("validation", "workers", "weight_decay", "cache_gib", "seed"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        _require(self.learning_rate > 0, "learning_rate", "above 0", self.learning_rate)
        for name in ("min_learning_rate", "warmup_learning_rate"):
            _require(0 <= getattr(self, name) <= self.learning_rate, name, "in [0, learning_rate]", getattr(self, name))
        clip = self.clip_gradient_norm
        _require(clip is None or clip > 0, "clip_gradient_norm", "above 0", clip)
        for name in ("mixup", "cutmix"):
            value = getattr(self.augmentation, name)
            _require(value >= 0, f"augmentation.{name}", "at least 0", value)
        padding = self.augmentation.random_crop_padding
        cropped = padding is not None and not self.streaming
        _require(
            cropped or not self.augmentation.alternating_flip,
            "augmentation.random_crop_padding",
            "given, and `streaming` false, for `alternating_flip`",
            padding,
        )
        _require(padding is None or padding >= 0, "augmentation.random_crop_padding", "at least 0", padding)
        warmup = self.warmup_steps
        fits = 0 <= warmup < 1 if isinstance(warmup, float) else warmup >= 0
        _require(fits, "warmup_steps", "a number of steps, or a share of them in [0, 1)", warmup)
        if warmup >= self.steps:
            raise ValueError(
                f"Expected `warmup_steps` to be below steps = {self.steps}, got {warmup}: "
                f"add warmup_steps={self.steps // 10}, or a share of the steps such as warmup_steps=0.05."
            )
        _one_of("mixed_precision", self.mixed_precision, "no", "bf16", "fp16")
        if self.ema_decay is not None:
            _require(0 < self.ema_decay < 1, "ema_decay", "in (0, 1)", self.ema_decay)
        for name in ("horizontal_flip", "random_erasing", "mixup_probability", "mixup_switch", "label_smoothing"):
            value = getattr(self.augmentation, name)
            _require(0 <= value <= 1, f"augmentation.{name}", "in [0, 1]", value)
        _require(self.augmentation.repeats >= 1, "augmentation.repeats", "at least 1", self.augmentation.repeats)
        if self.evaluate_every is not None:
            _require(self.evaluate_every >= 1, "evaluate_every", "at least 1", self.evaluate_every)
        _require(self.students.weight >= 0, "students.weight", "at least 0", self.students.weight)
        alpha = self.students.distillation
        _require(0 <= alpha <= 1, "students.distillation", "in [0, 1]", alpha)
        _one_of("students.teacher", self.students.teacher, "full", "ema")
        averaged = self.students.teacher != "ema" or self.ema_decay is not None
        _require(averaged, "ema_decay", "given, as `students.teacher` is ema", self.ema_decay)
        if self.teacher is not None:
            _one_of("teacher.distillation", self.teacher.distillation, "soft", "hard")
            _require(0 <= self.teacher.weight <= 1, "teacher.weight", "in [0, 1]", self.teacher.weight)
            _require(self.teacher.temperature > 0, "teacher.temperature", "above 0", self.teacher.temperature)
            _require(self.teacher.views >= 1, "teacher.views", "at least 1", self.teacher.views)
            if self.teacher.cache is not None:
                mixing = self.augmentation.mixup or self.augmentation.cutmix
                _require(not mixing, "augmentation.mixup", "0, like cutmix, with `teacher.cache`", mixing)
                _require(
                    cropped and self.augmentation.repeats == 1,
                    "augmentation.random_crop_padding",
                    "given, `streaming` false and `augmentation.repeats` 1, with `teacher.cache`",
                    padding,
                )
        _one_of("trunk", self.trunk, "auto", "packed", "split")
        _one_of("unreadable", self.unreadable, "error", "replace")
        micro = self.micro_batch_size
        _require(micro is None or micro >= 1, "micro_batch_size", "at least 1", micro)
        _require(self.shuffle_window >= 1, "shuffle_window", "at least 1", self.shuffle_window)
        if self.streaming:
            held_out = self.validation == 0 or self.validation_split is not None
            _require(held_out, "validation_split", "given, as a stream has no last images", self.validation_split)
        if self.timm_name is not None:
            self._check_timm(self.timm_name)
            return
        unknown = sorted(set(self.config) - set(VisualPerceiverConfig.__dataclass_fields__))
        _require(not unknown, "config", "fields of VisualPerceiverConfig", unknown)
        config = self.model_config(num_labels=2)
        _require(config.num_channels == 3, "config.num_channels", "3, as images are read in RGB", config.num_channels)
        if self.initial_stem is not None:
            _require(config.stem == "conv", "config.stem", "conv with `initial_stem`", config.stem)
        for K in self.evaluate_queries or []:
            config.operating_point(K)

    @property
    def warmup(self) -> int:
        """The number of steps that `warmup_steps` is, or is a share of."""
        if isinstance(self.warmup_steps, float):
            return min(round(self.warmup_steps * self.steps), self.steps - 1)
        return self.warmup_steps

    @property
    def timm_name(self) -> str | None:
        """timm's name of the network to train; None is a Visual Perceiver."""
        return self.architecture.removeprefix(TIMM) if self.architecture.startswith(TIMM) else None

    def _check_timm(self, name: str) -> None:
        _require(timm.is_model(name), "architecture", "timm/ and the name of one of timm's models", self.architecture)
        size = self.config.get("image_size", 32)
        integer = isinstance(size, int) and not isinstance(size, bool)
        _require(integer and size >= 1, "config.image_size", "an integer of at least 1", size)
        # Its own keys, if they do not fit, timm names when the network is made.
        fixed = self.queries == {"schedule": "fixed", "K": 1}
        _require(fixed, "queries", "{schedule: fixed, K: 1} for a timm network, which has no queries", self.queries)
        budgets = self.evaluate_queries
        _require(budgets in (None, [1]), "evaluate_queries", "null or [1] for a timm network", budgets)
        for key in ("initial_model", "initial_stem", "attention"):
            value = getattr(self, key)
            _require(value is None, key, "null for a timm network", value)

    def model_config(self, **fields: Any) -> VisualPerceiverConfig:
        """The config of the model to train; `fields` adds what the dataset knows, such as the labels."""
        try:
            return VisualPerceiverConfig.from_architecture(self.architecture, **{**self.config, **fields})
        except StrictDataclassError as error:
            raise ValueError(f"`config` does not fit: {' '.join(str(error).split())}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the YAML."""
        return dataclasses.asdict(self)


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `overrides` such as `steps=100` or `augmentation.mixup=0`.

    Raises:
        ValueError: Naming the offending key, and what is allowed, if the file or an override does not fit.
        FileNotFoundError: If there is no such file.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"Expected {path} to be YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"Expected {path} to hold keys and values, got {type(values).__name__}.")
    # Where the data lies on this machine is no name for it.
    values.setdefault("dataset_name", values.get("dataset", Recipe.dataset))
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"Expected an override such as steps=100, got {override!r}.")
        place = values
        *parents, last = key.split(".")
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


def recipe_from_dict(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """Build a recipe from plain values, checking keys and types."""
    return build(Recipe, values, source)


def build(cls: type, values: dict[str, Any], source: str) -> Any:
    """A dataclass from plain values, or a `ValueError` that names the key of `source` that does not fit."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise ValueError(f"Unknown key `{key}` in {source}. Allowed keys: {', '.join(sorted(fields))}.")
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"Missing key `{missing[0]}` in {source}.")
    return cls(**{key: _convert(hints[key], value, f"{source}: {key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, source: str) -> Any:
    """`value` as the annotated type, or a ValueError."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option):
            if isinstance(value, dict):
                return build(typing.cast(type, option), value, source)
            if len(options) == 1 or value is not None:
                raise ValueError(f"Expected a group of keys in {source}, got {value!r}.")
            continue
        kind = typing.get_origin(option) or option
        if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:  # YAML 1.1 reads 5e-4, without a point, as a string
                return float(value)
            except ValueError:
                continue
        if kind is str and value is False:  # YAML 1.1 reads no, as in `mixed_precision: no`, as false
            return "no"
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
    raise ValueError(f"Expected {hint} in {source}, got {value!r}.".replace("<class '", "").replace("'>", ""))


def _one_of(name: str, value: Any, *allowed: str) -> None:
    _require(value in allowed, name, f"one of {', '.join(allowed)}", value)


def _require(condition: bool, name: str, expected: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"Expected `{name}` to be {expected}, got {value!r}.")
