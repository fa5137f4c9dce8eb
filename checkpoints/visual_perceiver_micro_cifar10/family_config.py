"""The base of all families' configs: their architectures, what timm reads from config.json, and checks of values."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .elastic import Budget, ElasticConfig
from .query_selection import as_number


@strict
class FamilyConfig(ElasticConfig, PreTrainedConfig):
    """Base of a family's config. One config.json serves transformers and timm.

    Attributes:
        named: timm name -> fields that differ from the config's defaults.
        modeling_module: Name of the family's modeling file, for remote code.
        class_prefix: Prefix of the names of the family's classes.
        square: Whether images must be square.
        timm_names: Field -> argument of timm's `create_model`, where the two names differ.
    """

    # config.json has these keys for timm; `to_dict` derives them from the fields.
    timm_keys: ClassVar[tuple[str, ...]] = ("architecture", "model_args", "num_classes", "num_features")
    named: ClassVar[Mapping[str, Mapping[str, Any]]]
    modeling_module: ClassVar[str]
    class_prefix: ClassVar[str]
    square: ClassVar[bool] = True
    timm_names: ClassVar[Mapping[str, str]] = {
        "image_size": "img_size",
        "num_channels": "in_chans",
        "num_labels": "num_classes",
    }

    image_size: int = 32  # pixels of a side
    num_channels: int = 3
    # Preprocessing in timm's terms (mean, std, interpolation, ...); None is CIFAR-10's up to 64 pixels, else ImageNet's.
    pretrained_cfg: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for key in (*self.timm_keys, "image_processor_type"):
            kwargs.pop(key, None)
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # config.json cannot store tensors or NumPy's numbers.
        super().__setattr__(name, as_number(value) if name in self.knobs.values() else value)

    @classmethod
    def from_architecture(cls, name: str, **kwargs: Any) -> Any:
        """Create the config of a named architecture.

        Args:
            name: timm's name of the architecture.
            **kwargs: Fields that override those of the architecture.

        Raises:
            ValueError: If there is no such architecture.
        """
        if name not in cls.named:
            raise ValueError(f"Expected an architecture among {', '.join(cls.named)}, got {name!r}.")
        return cls(**{**cls.named[name], **kwargs})

    @classmethod
    def from_timm(cls, **arguments: Any) -> Any:
        """Create the config that arguments of timm's `create_model` describe; the inverse of `timm_model_args`.

        Raises:
            TypeError: If there is no such argument.
            ValueError: If a value is out of its range.
        """
        names = (*cls.own_fields(), "image_size", "num_channels", "num_labels")
        known = {cls.timm_names.get(name, name): name for name in names}
        # `model_args` of earlier versions also hold class attributes, such as `title`.
        if unknown := sorted(arguments.keys() - known.keys() - cls.__dataclass_fields__.keys()):
            raise TypeError(f"Expected arguments among {', '.join(known)}, got {', '.join(unknown)}.")
        values = {known[name]: _as_list(value) for name, value in arguments.items() if name in known}
        size = values.get("image_size")
        if isinstance(size, list):
            if cls.square and len(set(size)) != 1:
                raise ValueError(f"Expected square images, got `img_size` {size}.")
            values["image_size"] = size[0] if len(set(size)) == 1 else size
        return cls(**values)

    @classmethod
    def own_fields(cls) -> list[str]:
        """Names of the fields that the family adds to those of this class."""
        return [field.name for field in fields(cls) if field.name not in FamilyConfig.__dataclass_fields__]

    @property
    def architecture(self) -> str:
        """timm's name of the nearest architecture; `timm_model_args` has everything that matters."""
        scores = {
            name: sum(1 if getattr(self, field) == value else -1 for field, value in own.items())
            for name, own in self.named.items()
        }
        return max(scores, key=lambda name: scores[name])

    def is_adaptive(self, budget: Budget) -> bool:
        """Whether images may use different amounts of computation at this budget."""
        return False

    @property
    def summary(self) -> str:
        """The sizes of the network, in some words."""
        return f"{self.num_hidden_layers} blocks of width {self.hidden_size}"

    @property
    def timm_model_args(self) -> dict[str, Any]:
        """The arguments with which timm's `create_model` builds a model of this config."""
        names = ("image_size", "num_channels", *self.own_fields())
        return {self.timm_names.get(name, name): getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Everything that transformers and timm need to rebuild the model, as plain values."""
        output = super().to_dict()
        output.update(
            architecture=self.architecture,
            model_args=self.timm_model_args,
            num_classes=self.num_labels,
            num_features=self.hidden_size,
            pretrained_cfg=self.timm_pretrained_cfg,
            # If the file has `pretrained_cfg`, transformers reads the processor's class from here.
            image_processor_type="ViTImageProcessor",
        )
        if output.get("auto_map"):
            # transformers adds only the class that is saved, but both must load from the folder.
            prefix = f"{self.modeling_module}.{self.class_prefix}"
            output["auto_map"] |= {
                "AutoModel": f"{prefix}Model",
                "AutoModelForImageClassification": f"{prefix}ForImageClassification",
            }
        return output

    def check_knobs(self, knobs: Iterable[str]) -> None:
        """Raise a `ValueError` unless all of these are names of knobs."""
        if unknown := set(knobs) - set(self.knobs.values()):
            raise ValueError(
                f"Expected knobs among {', '.join(self.knobs.values())}, got {', '.join(sorted(unknown))}."
            )

    def check_positive(self, *names: str) -> None:
        """Raise a `ValueError` unless these fields are at least 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"Expected `{name}` to be at least 1, got {getattr(self, name)}.")

    def check_choices(self, **choices: Collection[str]) -> None:
        """Raise a `ValueError` unless each field has one of its values."""
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                expected = (
                    " or ".join(map(repr, allowed)) if isinstance(allowed, tuple) else f"one of {', '.join(allowed)}"
                )
                raise ValueError(f"Expected `{name}` to be {expected}, got {getattr(self, name)!r}.")


def check_heads(hidden_size: int, heads: int, name: str = "num_attention_heads") -> None:
    """Raise a `ValueError` unless the number of heads divides the width."""
    if hidden_size % heads:
        raise ValueError(f"Expected `hidden_size` to be a multiple of `{name}`, got {hidden_size} and {heads}.")


def _as_list(value: Any) -> Any:
    return [_as_list(item) for item in value] if isinstance(value, (list, tuple)) else value


__all__ = ["FamilyConfig"]
