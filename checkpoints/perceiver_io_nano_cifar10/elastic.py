"""The protocol of all families: a budget, given to `forward` as keywords, decides what an image costs."""

import ast
import copy
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar

import torch

from .query_selection import as_number


CIFAR_STATISTICS = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616]}
IMAGENET_STATISTICS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


class Budget:
    """How much a model may compute: values of the knobs, which are keywords of `forward`.

    A knob that is not given has its largest value, whatever default the config stores, so `Budget()` is the full network.
    Budgets are frozen and hashable.

    Args:
        **knobs: Names and values; None leaves a knob out.

    Example:
        >>> budget = Budget(num_active_queries=16, dqs_threshold=0.8)
        >>> budget, budget.kwargs["dqs_threshold"]
        (Budget(num_active_queries=16, dqs_threshold=0.8), 0.8)
        >>> Budget.parse("K=16, t=0.8", {"K": "num_active_queries", "t": "dqs_threshold"}) == budget
        True
    """

    __slots__ = ("_knobs",)
    _knobs: tuple[tuple[str, Any], ...]

    def __init__(self, **knobs: Any):
        values = {name: _frozen(value) for name, value in knobs.items() if value is not None}
        object.__setattr__(self, "_knobs", tuple(values.items()))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("A budget does not change; make another.")

    def __reduce__(self) -> tuple[Any, ...]:
        return _budget_of, (self.kwargs,)

    @classmethod
    def parse(cls, text: str, short_names: Mapping[str, str] | None = None) -> "Budget":
        """Read a budget from text; the inverse of `str`.

        Args:
            text: Such as "num_active_queries=16, dqs_threshold=0.8"; empty is the full network.
            short_names: Other names of knobs, such as {"K": "num_active_queries"}.

        Raises:
            ValueError: If the text is not of this form, or names a knob twice.
        """
        names = short_names or {}
        try:
            call = ast.parse(f"budget({text})", mode="eval").body
            assert isinstance(call, ast.Call)
            if call.args or not isinstance(call.func, ast.Name):
                raise SyntaxError
            pairs = [(names.get(str(k.arg), str(k.arg)), ast.literal_eval(k.value)) for k in call.keywords]
        except (SyntaxError, ValueError, AssertionError):
            example = ", ".join(f"{name}=..." for name in names) or "num_active_queries=16"
            raise ValueError(f"Expected a budget such as {example!r}, got {text!r}.") from None
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"Expected each knob of a budget once, got {text!r}.")
        return cls(**dict(pairs))

    @property
    def kwargs(self) -> dict[str, Any]:
        """The knobs that are given."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self._knobs}

    def short(self, short_names: Mapping[str, str]) -> str:
        """The text of `str` with the family's short names; `"full"` for the full network.

        Example:
            >>> Budget(num_active_queries=16).short({"K": "num_active_queries"})
            'K=16'
        """
        names = {name: short for short, name in short_names.items()}
        return ", ".join(f"{names.get(name, name)}={_text(value)}" for name, value in self._knobs) or "full"

    def __str__(self) -> str:
        return ", ".join(f"{name}={_text(value)}" for name, value in self._knobs)

    def __repr__(self) -> str:
        return f"Budget({self})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Budget) and dict(self._knobs) == dict(other._knobs)

    def __hash__(self) -> int:
        return hash(frozenset(self._knobs))


def _budget_of(knobs: dict[str, Any]) -> Budget:
    return Budget(**knobs)


def _frozen(value: Any) -> Any:
    value = as_number(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return repr(value)


class ElasticConfig:
    """What the package needs of an elastic model's config; a mixin.

    Attributes:
        unit: What `used` of the outputs counts, such as "queries".
        knobs: The keywords of `forward` that make a budget, by their short names.
        title: Name of the family, in the singular.
        about: What the knobs do, and the paper, in a sentence or two.
        citation: BibTeX.
        first_conv: Name of the convolution that reads the image's channels, which timm adapts to other numbers of them.
        classifiers: Name or names of the classifiers in timm's model.
        fixed_image_size: Whether weights fit images of `image_size` alone.
    """

    unit: ClassVar[str]
    knobs: ClassVar[Mapping[str, str]]
    title: ClassVar[str] = "Image classifier"
    about: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    first_conv: ClassVar[Any] = None
    classifiers: ClassVar[Any] = "head"
    fixed_image_size: ClassVar[Any] = False
    image_size: Any
    num_channels: int
    id2label: Any
    pretrained_cfg: Any

    def budgets(self) -> list[Budget]:
        """A selection of budgets, ascending in cost; the last is the full network."""
        raise NotImplementedError

    def ladder(self) -> list[Budget]:
        """The budgets at which all images cost the same, ascending in cost; training draws from them."""
        return self.budgets()

    def adaptive_budgets(self) -> list[Budget]:
        """A selection of the budgets at which images cost different amounts; empty if there are none."""
        return []

    def is_adaptive(self, budget: Budget) -> bool:
        """Whether images may cost different amounts at this budget, which is then not in `ladder`."""
        return self.resolve(**budget.kwargs) not in [self.resolve(**fixed.kwargs) for fixed in self.ladder()]

    def candidates(self, knobs: Sequence[str] = ()) -> list[Budget]:
        """The budgets that calibration tries: those that set these knobs, and the full network.

        Args:
            knobs: Names or short names; empty is the family's first knob.

        Raises:
            ValueError: If there are no such budgets.
        """
        names = self.knob_names(knobs)
        known = [b for b in (*self.ladder(), *self.adaptive_budgets()) if b.kwargs]
        found = [b for b in known if b.kwargs.keys() <= set(names)]
        if set(names) - {name for b in found for name in b.kwargs}:
            settable = dict.fromkeys(name for b in known for name in b.kwargs)
            raise ValueError(f"Expected knobs to search among {', '.join(settable) or 'none'}, got {', '.join(names)}.")
        return [*found, Budget()]

    def stopping_budget(self, thresholds: Sequence[float]) -> Budget | None:
        """The budget at which an image stops at `budgets()[i]` once its top probability reaches `thresholds[i]`.

        Args:
            thresholds: One for each of `budgets()` but the last; infinity stops no image.

        Returns:
            None if the family has no such budget, as here.
        """
        return None

    def knob_names(self, knobs: Sequence[str] = ()) -> list[str]:
        """Full names of knobs that are given by name or short name; none given is the family's first knob.

        Raises:
            ValueError: If there is no such knob.
        """
        names = [self.knobs.get(knob, knob) for knob in knobs] or list(self.knobs.values())[:1]
        if unknown := [name for name in names if name not in self.knobs.values()]:
            raise ValueError(
                f"Expected knobs among {', '.join((*self.knobs, *self.knobs.values())) or 'none'}, got {', '.join(unknown)}."
            )
        return names

    def resolve(self, **knobs: Any) -> dict[str, Any]:
        """Validate knobs, and give those that are missing or None their largest values.

        Raises:
            ValueError: If a value is out of its range, or a name is not a knob's.
        """
        raise NotImplementedError

    def knobs_for(self, **given: Any) -> dict[str, Any]:
        """Validate arguments of `forward`; knobs that are missing or None have the config's defaults.

        Raises:
            ValueError: If a value is out of its range, or there is no such knob.
        """
        stored = {name: getattr(self, name) for name in self.knobs.values()}
        return self.resolve(**{**stored, **{name: value for name, value in given.items() if value is not None}})

    def count_macs(self, budget: Budget | None = None, output: Any = None) -> Any:
        """Multiply-accumulates of an image.

        Args:
            budget: None is the default that the config stores.
            output: The model's output for a batch at this budget, to count what each image used.

        Returns:
            An int for an image that uses all that the budget allows; with `output`, (B,) int64.
        """
        raise NotImplementedError

    @property
    def default_budget(self) -> Budget:
        """The budget of `forward` without knobs."""
        return Budget(**{name: getattr(self, name) for name in self.knobs.values()})

    def parse_budget(self, text: str) -> Budget:
        """Read a budget from text such as "K=16, t=0.8"; "full" is the full network.

        Raises:
            ValueError: If it is not of this form, or does not fit this config.
        """
        budget = Budget.parse("" if text == "full" else text, self.knobs)
        self.resolve(**budget.kwargs)
        return budget

    def budget_for(self, macs: float, **knobs: Any) -> Budget:
        """The largest budget of `ladder` that costs at most this share of the full network, or the cheapest.

        Args:
            macs: Share of multiply-accumulates, in (0, 1].
            **knobs: Further knobs of the budget, such as a threshold; the count ignores what they save.

        Raises:
            ValueError: If the share is not in (0, 1].
        """
        if isinstance(macs, bool) or not isinstance(macs, (int, float)) or not 0 < macs <= 1:
            raise ValueError(f"Expected a share of the full network's multiply-accumulates in (0, 1], got {macs!r}.")
        budgets = [Budget(**{**budget.kwargs, **knobs}) for budget in self.ladder()]
        full = self.count_macs(Budget())
        place = bisect_right(budgets, macs * full, key=self.count_macs)  # MACs ascend
        return budgets[max(place - 1, 0)]

    def count_passes(self, budgets: Sequence[Budget], shared: bool) -> float:
        """Multiply-accumulates of an image's forward in a training step; training takes about three times as many.

        Args:
            budgets: Budgets of the passes; the count ignores what adaptive ones save.
            shared: Whether every image runs at every budget; if not, equal shares of the images run at each.
        """
        total = sum(self.count_macs(budget) for budget in budgets)
        return total if shared else total / len(budgets)

    @property
    def nested_steps(self) -> list[int] | None:
        """Steps of `ladder`, from 1, whose logits one pass at the largest returns together; None if there are none."""
        return None

    def count_stages(self, budgets: Sequence[Budget]) -> list[int]:
        """Multiply-accumulates of an image that runs at these budgets in turn, summed up to each of them."""
        return list(accumulate(self.count_macs(budget) for budget in budgets))

    @property
    def summary(self) -> str:
        """The sizes of the network, in some words."""
        return ""

    @property
    def image_height_width(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height, width

    @property
    def label_names(self) -> list[str]:
        """Names of the classes, in the order of the logits.

        Raises:
            ValueError: If the keys of `id2label` are not the indices of the logits, as numbers or as text.
        """
        names = {str(key): name for key, name in (self.id2label or {}).items()}
        indices = [str(i) for i in range(len(names))]
        if names.keys() != set(indices):
            raise ValueError(
                f"Expected the keys of `id2label` to be 0 to {len(names) - 1}, got {', '.join(list(names)[:10])}."
            )
        return [names[i] for i in indices]

    @property
    def timm_pretrained_cfg(self) -> dict[str, Any]:
        """timm's `pretrained_cfg` of a checkpoint with this config."""
        height, width = self.image_height_width
        cfg = default_preprocessing(max(height, width))
        cfg.update(self.pretrained_cfg or {})
        cfg.pop("label_names", None)  # may be those of the checkpoint that this one was fine-tuned from
        cfg.update(
            input_size=[self.num_channels, height, width],
            num_classes=len(self.id2label),
            fixed_input_size=True,
            first_conv=self.first_conv,
            classifier=self.classifiers,
        )
        labels = self.label_names
        if labels != [f"LABEL_{i}" for i in range(len(labels))]:
            cfg["label_names"] = labels
        return cfg


def default_preprocessing(image_size: int) -> dict[str, Any]:
    """Preprocessing in timm's terms: the whole image, resized bicubically and normalised per channel."""
    statistics = CIFAR_STATISTICS if image_size <= 64 else IMAGENET_STATISTICS
    return {**statistics, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"}


def check_pixel_values(
    pixel_values: Any,
    config: Any,
    any_size: bool = False,
    advice: str = "a model loaded with `image_size=...` takes other sizes",
) -> None:
    """Raise a `ValueError` unless `pixel_values` is a non-empty floating-point batch of the config's image size.

    `any_size` allows every multiple of the patch size. `advice` ends the message for images of another size, if weights fit any.
    """
    if pixel_values is None or pixel_values.ndim != 4:
        given = None if pixel_values is None else tuple(pixel_values.shape)
        raise ValueError(f"Expected `pixel_values` of shape (B, C, H, W), got {given}.")
    B, C, height, width = pixel_values.shape
    if B == 0:
        raise ValueError("Expected at least one image, got an empty batch.")
    if config.num_channels != C:
        raise ValueError(f"Expected images of {config.num_channels} channels, got {C}.")
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"Expected normalised `pixel_values` of a floating-point dtype, got {pixel_values.dtype}; "
            "an image processor or transform makes them."
        )
    if any_size:
        if height % config.patch_size or width % config.patch_size or not height * width:
            raise ValueError(
                f"Expected an image size that is a multiple of the patch size {config.patch_size}, got {height}x{width}."
            )
    elif (height, width) != config.image_height_width:
        expected = "x".join(map(str, config.image_height_width))
        if config.fixed_image_size:
            advice = "the position embeddings are for this size alone"
        raise ValueError(f"Expected images of size {expected}, got {height}x{width}; {advice}.")


# What transformers, such as its Trainer, may pass to the `forward` of every model, and what asks a model to record.
PASSED = ("return_dict", "num_items_in_batch")
RECORDED = ("output_attentions", "output_hidden_states")


def check_keywords(model: Any, given: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if `forward` would ignore a keyword, or if it or the config asks to record what the model cannot.

    Args:
        model: A `PreTrainedModel`.
        given: What `forward` takes as `**kwargs`; None is not given.
    """
    config = model.config
    if not given and not config.output_attentions and not config.output_hidden_states:
        return
    records = bool(model._can_record_outputs)
    for name in () if records else RECORDED:
        value = getattr(config, name) if given.get(name) is None else given[name]
        if value:
            raise ValueError(
                f"Expected `{name}` to be False, as {type(model).__name__} records nothing, got {value!r}."
            )
    unknown = [name for name, value in given.items() if value is not None and name not in (*PASSED, *RECORDED)]
    if unknown:
        forward: Any = type(model).forward
        code = getattr(forward, "__wrapped__", forward).__code__  # without transformers' decorator
        names = (*code.co_varnames[1 : code.co_argcount], *PASSED, *(RECORDED if records else ()))
        raise ValueError(f"Expected keywords of `forward` among {', '.join(names)}, got {', '.join(unknown)}.")


@dataclass(frozen=True)
class Pass:
    """One of several passes over a batch: some of its images, at a budget.

    Attributes:
        budget: What the images may use.
        images: The images of the batch that run; all by default.
    """

    budget: Budget = field(default_factory=Budget)
    images: slice = field(default_factory=lambda: slice(None))


@dataclass(frozen=True)
class GraphPlan:
    """A classifier to trace for another runtime.

    Attributes:
        module: Maps `pixel_values` and the inputs, in their order, to the outputs.
        inputs: Knobs that are inputs of the graph, and example values.
        fixed: Knobs that are constants of the graph, and their values.
        outputs: Names of the logits (B, labels), and of what each image used: its number (B,), or marks (B, n) bool.
        facts: Further facts for callers, as plain values.
    """

    module: torch.nn.Module
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str, str] = ("logits", "used")
    facts: dict[str, Any] = field(default_factory=dict)


class FixedGraph(torch.nn.Module):
    """A classifier at one budget: (B, C, H, W) -> logits (B, labels) and what was used, (B,)."""

    def __init__(self, model: Any, knobs: dict[str, Any]):
        super().__init__()
        self.model, self.knobs = model, knobs

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.model(pixel_values, **self.knobs)
        return output.logits, output.used


def reference_model(model: Any) -> Any:
    """A copy of a model, in float32 on the CPU."""
    return copy.deepcopy(model).float().cpu().eval()


class ElasticModel:
    """What the package needs of an elastic classifier; a mixin."""

    config: Any
    __call__: Callable[..., Any]
    # Whether the passes of a training step should run as one packed batch; None lets the network choose.
    packs_passes: bool | None = None
    # Whether some budgets leave parameters unused, which then get no gradient.
    skips_parameters: Any = False

    def forward_budgets(self, pixel_values: torch.Tensor, passes: Sequence[Pass]) -> list[torch.Tensor]:
        """The logits (n, labels) of each pass's n images; a family may share work between passes.

        Args:
            pixel_values: (B, C, H, W), normalised.
            passes: Which images at which budgets.
        """
        resolve = self.config.resolve
        return [self(pixel_values[p.images], **resolve(**p.budget.kwargs)).logits for p in passes]

    def as_graph(self, budget: Budget | None = None) -> GraphPlan:
        """What to trace for another runtime; by default this model at one fixed budget.

        Args:
            budget: The fixed budget; None fixes as few knobs as the family can, or all at the config's default.

        Raises:
            ValueError: If a graph cannot have the budget.
        """
        budget = self.config.default_budget if budget is None else budget
        if self.config.is_adaptive(budget):
            name = budget.short(self.config.knobs)
            raise ValueError(f"Expected a budget at which all images cost alike, which a graph needs, got {name}.")
        knobs = self.config.resolve(**budget.kwargs)
        return GraphPlan(FixedGraph(reference_model(self).requires_grad_(False), knobs), fixed=knobs)

    def check_budgets(self, pixel_values: torch.Tensor) -> list[Budget]:
        """Budgets at which exported forms of this model must agree with it on these images, whatever the rounding."""
        return [*self.config.budgets(), *self.config.adaptive_budgets()]

    def blocks(self) -> Iterable[torch.nn.Module]:
        """The repeated modules, for compiling and checkpointing."""
        return []

    @property
    def stem_channels(self) -> list[int]:
        """Channels of the stem's features at each of its levels, ascending; empty without a convolutional stem."""
        return []

    def captured_features(self) -> AbstractContextManager[list[torch.Tensor]]:
        """Collect the features of a convolutional stem, (B, C, h, w) per forward pass, while the context is open.

        Raises:
            ValueError: If the network has no convolutional stem.
        """
        raise ValueError(f"Expected a network with a convolutional stem, got {type(self).__name__}.")


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        config: Its configuration, with `model_type`.
        model: Without a head.
        classifier: `ForImageClassification`.
        architectures: timm name -> what differs from the config's defaults.
    """

    config: Any
    model: Any
    classifier: Any
    architectures: Mapping[str, Mapping[str, Any]]

    def create_config(self, architecture: str, **fields: Any) -> Any:
        """The config of a named architecture, with other values of some fields."""
        return self.config(**{**self.architectures[architecture], **fields})


# By model type; `register` adds to it.
FAMILIES: dict[str, Family] = {}


def family_of(architecture: str) -> Family:
    """The family of a named architecture.

    Raises:
        ValueError: If there is no architecture of this name.
    """
    for family in FAMILIES.values():
        if architecture in family.architectures:
            return family
    names = [name for family in FAMILIES.values() for name in family.architectures]
    raise ValueError(f"Expected an architecture among {', '.join(names)}, got {architecture!r}.")


def register(family: Family) -> None:
    """Make a family known to this package and to transformers' auto classes; its timm file registers its timm names."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    config = family.config
    FAMILIES[config.model_type] = family
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, family.model, exist_ok=True)
    AutoModelForImageClassification.register(config, family.classifier, exist_ok=True)
    # `save_pretrained` then copies the code beside the weights, so that a folder loads without this package.
    config.register_for_auto_class()
    model, classifier = family.model, family.classifier
    model.register_for_auto_class("AutoModel")
    classifier.register_for_auto_class("AutoModelForImageClassification")
