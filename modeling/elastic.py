"""What every family of models here has in common: a budget, given to `forward` as keywords, decides what an image costs."""

import ast
import copy
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar

import torch

from .query_selection import as_number


CIFAR_STATISTICS = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616]}
IMAGENET_STATISTICS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


class Budget:
    """How much a model may compute: values of the keywords of `forward` that are its knobs.

    Frozen, hashable, printable. A knob that is not given is at everything that the network has, also where the config
    stores another default, so `Budget()` is the full network.

    Args:
        **knobs: Names and values; one that is None is as if it had not been given.

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
        """The inverse of `str`.

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
        """As `str`, with the family's short names; `"full"` for the full network.

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
    """What the config of an elastic model adds to transformers'.

    Attributes:
        unit: What the images of a batch use different numbers of, such as "queries": see `used` of the outputs.
        knobs: The keywords of `forward` that make a budget, by their short names.
        title: What the family is called, in the singular.
        about: What the knobs do, and where the family is from, in a sentence or two.
        citation: BibTeX.
    """

    unit: ClassVar[str]
    knobs: ClassVar[Mapping[str, str]]
    title: ClassVar[str] = "Image classifier"
    about: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    image_size: Any
    num_channels: int
    id2label: Any
    pretrained_cfg: Any

    def budgets(self) -> list[Budget]:
        """Budgets that stand for all, ascending in cost; the last is the full network."""
        raise NotImplementedError

    def ladder(self) -> list[Budget]:
        """All budgets at which every image costs alike, ascending in cost, in the steps that training draws from."""
        return self.budgets()

    def adaptive_budgets(self) -> list[Budget]:
        """Budgets that stand for those at which each image takes what it needs; none if there are none."""
        return []

    def is_adaptive(self, budget: Budget) -> bool:
        """Whether each image takes what it needs, because the budget is none of those at which all cost alike."""
        return self.resolve(**budget.kwargs) not in [self.resolve(**fixed.kwargs) for fixed in self.ladder()]

    def candidates(self, knobs: Sequence[str] = ()) -> list[Budget]:
        """What calibration tries: budgets that set these knobs, and the full network.

        Args:
            knobs: Names or short names; none is the first that the family has.

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

    def knob_names(self, knobs: Sequence[str] = ()) -> list[str]:
        """The names of knobs that may be short; none is the first that the family has.

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
        """All knobs as `forward` takes them; those that are not given, or None, are at everything that there is.

        Raises:
            ValueError: If a value is out of its range, or a name is not a knob's.
        """
        raise NotImplementedError

    def count_macs(self, budget: Budget | None = None, output: Any = None) -> Any:
        """Multiply-accumulates of an image.

        Args:
            budget: None is the default that the config stores.
            output: What the model returned for a batch with this budget, for what each of its images really cost.

        Returns:
            An int, of an image that uses all that the budget allows; with `output` (B,) int64.
        """
        raise NotImplementedError

    @property
    def default_budget(self) -> Budget:
        """What `forward` does when it is not told."""
        return Budget(**{name: getattr(self, name) for name in self.knobs.values()})

    def parse_budget(self, text: str) -> Budget:
        """The budget that a text such as "K=16, t=0.8" means for this family; "full" is the full network.

        Raises:
            ValueError: If it is not of this form, or does not fit this config.
        """
        budget = Budget.parse("" if text == "full" else text, self.knobs)
        self.resolve(**budget.kwargs)
        return budget

    def budget_for(self, macs: float, **knobs: Any) -> Budget:
        """The largest of `ladder` that costs at most this share of the full network, or the cheapest.

        Args:
            macs: In (0, 1].
            **knobs: Values that the budget also has, such as a threshold; images count as if it spared nothing.

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
            budgets: Budgets of the passes; adaptive ones count as if they saved nothing.
            shared: Every image makes every pass; if not, each makes one, and as many make each.
        """
        total = sum(self.count_macs(budget) for budget in budgets)
        return total if shared else total / len(budgets)

    @property
    def nested_steps(self) -> list[int] | None:
        """Steps of `ladder`, counted from 1, at all of which one pass at the largest answers; None if there are none."""
        return None

    def count_stages(self, budgets: Sequence[Budget]) -> list[int]:
        """Multiply-accumulates of an image that is answered at each of these budgets in turn, up to each of them."""
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
    def first_conv(self) -> str:
        """Name of the module that reads the image's channels, which timm adapts to others."""
        return ""

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
            classifier="head",
        )
        labels = self.label_names
        if labels != [f"LABEL_{i}" for i in range(len(labels))]:
            cfg["label_names"] = labels
        return cfg


def default_preprocessing(image_size: int) -> dict[str, Any]:
    """How an image becomes `pixel_values`, in timm's terms: whole image, bicubic, normalised per channel."""
    statistics = CIFAR_STATISTICS if image_size <= 64 else IMAGENET_STATISTICS
    return {**statistics, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"}


def check_pixel_values(
    pixel_values: Any,
    config: Any,
    any_size: bool = False,
    advice: str = "`interpolate_pos_encoding=True` takes other sizes, and so does a model loaded with `image_size=...`",
) -> None:
    """Raise a `ValueError` unless `pixel_values` is a non-empty floating-point batch of the config's image size.

    With `any_size`, every multiple of the patch size will do. `advice` is for whoever has images of another size.
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
        raise ValueError(f"Expected images of size {expected}, got {height}x{width}; {advice}.")


@dataclass(frozen=True)
class Pass:
    """One of several passes over a batch: some of its images, at a budget.

    Attributes:
        budget: What the images may use.
        images: Which of the batch; all by default.
    """

    budget: Budget = field(default_factory=Budget)
    images: slice = field(default_factory=lambda: slice(None))


@dataclass(frozen=True)
class GraphPlan:
    """A classifier as something to trace.

    Attributes:
        module: Maps `pixel_values` and the inputs, in their order, to the outputs.
        inputs: Knobs that stay inputs, by name, with a value of each.
        fixed: Knobs that are fixed, and their values.
        outputs: Names: the logits (B, labels), and what each image used, (B,) or a mark (B, n) for each that it used.
        facts: What else a caller has to know, as plain values.
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
    """A copy of a model as it computes in PyTorch, in float32 on the CPU."""
    return copy.deepcopy(model).float().cpu().eval()


class ElasticModel:
    """What an elastic classifier adds to transformers'."""

    config: Any
    __call__: Callable[..., Any]
    # Whether several passes of a training step go through the network as one batch; None is where that is faster. A hint.
    packs_passes: bool | None = None
    # Whether parameters have no part at some budgets, so that they get no gradient.
    skips_parameters: Any = False

    def forward_budgets(self, pixel_values: torch.Tensor, passes: Sequence[Pass]) -> list[torch.Tensor]:
        """The logits (n, labels) of each pass's n images, in one step of training; families share what work they can.

        Args:
            pixel_values: (B, C, H, W), normalised.
            passes: Which images at which budgets.
        """
        resolve = self.config.resolve
        return [self(pixel_values[p.images], **resolve(**p.budget.kwargs)).logits for p in passes]

    def as_graph(self, budget: Budget | None = None) -> GraphPlan:
        """What to trace for another runtime: by default this model at one budget, which is fixed in the graph.

        Args:
            budget: What to fix; None fixes as little as can be, else the config's default.

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
        """Budgets at which other forms of this model should answer alike on some images, other rounding or not."""
        return [*self.config.budgets(), *self.config.adaptive_budgets()]

    def blocks(self) -> Iterable[torch.nn.Module]:
        """The modules of which many are alike, for compiling and checkpointing."""
        return []


@dataclass(frozen=True)
class Family:
    """A kind of models.

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
    """The family that a named architecture is of.

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
    # So that `save_pretrained` puts the code beside the weights, and a folder loads where this package is not installed.
    config.register_for_auto_class()
    model, classifier = family.model, family.classifier
    model.register_for_auto_class("AutoModel")
    classifier.register_for_auto_class("AutoModelForImageClassification")
