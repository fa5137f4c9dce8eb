"""What every family of models here has in common: a budget, given to `forward` as keywords, decides what an image costs."""

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from .query_selection import as_number


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
    """

    unit: ClassVar[str]
    knobs: ClassVar[Mapping[str, str]]

    def budgets(self) -> list[Budget]:
        """Budgets that stand for all, ascending in cost; the last is the full network."""
        raise NotImplementedError

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

    def budget_for(self, macs: float) -> Budget:
        """The largest of `budgets` that costs at most this share of the full network, or the cheapest.

        Args:
            macs: In (0, 1].

        Raises:
            ValueError: If the share is not in (0, 1].
        """
        if isinstance(macs, bool) or not isinstance(macs, (int, float)) or not 0 < macs <= 1:
            raise ValueError(f"Expected a share of the full network's multiply-accumulates in (0, 1], got {macs!r}.")
        budgets = self.budgets()
        full = self.count_macs(budgets[-1])
        return [budgets[0], *(b for b in budgets if self.count_macs(b) <= macs * full)][-1]


@dataclass(frozen=True)
class Pass:
    """One of several passes over a batch: some of its images, at a budget.

    Attributes:
        budget: What the images may use.
        images: Which of the batch; all by default.
    """

    budget: Budget = field(default_factory=Budget)
    images: slice = field(default_factory=lambda: slice(None))


class ElasticModel:
    """What an elastic classifier adds to transformers'."""

    config: Any
    __call__: Callable[..., Any]

    def forward_budgets(self, pixel_values: torch.Tensor, passes: Sequence[Pass]) -> list[torch.Tensor]:
        """The logits (n, labels) of each pass's n images, in one step of training; families share what work they can.

        Args:
            pixel_values: (B, C, H, W), normalised.
            passes: Which images at which budgets.
        """
        resolve = self.config.resolve
        return [self(pixel_values[p.images], **resolve(**p.budget.kwargs)).logits for p in passes]

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

    config: type
    model: type
    classifier: type
    architectures: Mapping[str, Mapping[str, Any]]


# By model type; `register` adds to it.
FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known to this package and to transformers' auto classes; its timm file registers its timm names."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    config: Any = family.config
    FAMILIES[config.model_type] = family
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, family.model, exist_ok=True)
    AutoModelForImageClassification.register(config, family.classifier, exist_ok=True)
    # So that `save_pretrained` puts the code beside the weights, and a folder loads where this package is not installed.
    config.register_for_auto_class()
    model, classifier = (cls for cls in (family.model, family.classifier))
    model.register_for_auto_class("AutoModel")  # type: ignore[attr-defined]
    classifier.register_for_auto_class("AutoModelForImageClassification")  # type: ignore[attr-defined]
