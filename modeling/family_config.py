"""What configs of this package's families share: images, labels, and the fields that timm reads from the same config.json."""

from collections.abc import Mapping
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .elastic import Budget, ElasticConfig


@strict
class FamilyConfig(ElasticConfig, PreTrainedConfig):
    """Base of a family's config. timm's constructor takes the family's fields by their own names.

    Attributes:
        named: timm name -> what differs from the config's defaults.
        modeling_module: Name of the family's modeling file, for remote code.
        class_prefix: What the names of the family's classes begin with.
        first_conv: Name of the convolution that reads the image's channels, or None.
        classifiers: Names of the classifiers in timm's model.
    """

    timm_keys: ClassVar[tuple[str, ...]] = ("architecture", "model_args", "num_classes", "num_features")
    named: ClassVar[Mapping[str, Mapping[str, Any]]]
    modeling_module: ClassVar[str]
    class_prefix: ClassVar[str]
    first_conv: ClassVar[str | None] = None  # type: ignore[assignment]
    classifiers: ClassVar[str | tuple[str, ...]] = "head"

    image_size: int = 32  # pixels of a side
    num_channels: int = 3
    # Preprocessing in timm's terms (mean, std, interpolation, ...); None is CIFAR-10's up to 64 pixels, else ImageNet's.
    pretrained_cfg: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for key in (*self.timm_keys, "image_processor_type"):
            kwargs.pop(key, None)
        super().__post_init__(**kwargs)

    @classmethod
    def own_fields(cls) -> list[str]:
        """Names of the fields that the family adds to transformers' and these."""
        return [name for name in cls.__dataclass_fields__ if name not in FamilyConfig.__dataclass_fields__]

    @classmethod
    def from_architecture(cls, name: str, **kwargs: Any) -> Any:
        """Config of one of the named architectures, with fields overridden by `kwargs`.

        Raises:
            ValueError: If there is no such architecture.
        """
        if name not in cls.named:
            raise ValueError(f"Expected an architecture among {', '.join(cls.named)}, got {name!r}.")
        return cls(**{**cls.named[name], **kwargs})

    @property
    def architecture(self) -> str:
        """The timm name of this architecture, or of the first; `timm_model_args` holds all that matters."""
        fits = [name for name, fields in self.named.items() if all(getattr(self, k) == v for k, v in fields.items())]
        # The most specific one; every config fits an architecture of defaults alone.
        return max(fits or self.named, key=lambda name: len(self.named[name]))

    def is_adaptive(self, budget: Budget) -> bool:
        """Whether each image takes what it needs."""
        return False

    @property
    def summary(self) -> str:
        """The sizes of the network, in some words."""
        return f"{self.num_hidden_layers} blocks of width {self.hidden_size}"

    @property
    def timm_model_args(self) -> dict[str, Any]:
        """The arguments that make timm's `create_model` build this very model."""
        fields = {name: getattr(self, name) for name in self.own_fields()}
        return {"img_size": self.image_size, "in_chans": self.num_channels, **fields}

    @property
    def timm_pretrained_cfg(self) -> dict[str, Any]:
        """timm's `pretrained_cfg` of a checkpoint with this config."""
        return {**super().timm_pretrained_cfg, "classifier": self.classifiers}

    def to_dict(self) -> dict[str, Any]:
        """Everything transformers and timm need to rebuild the model, as plain values."""
        output = super().to_dict()
        output.update(
            architecture=self.architecture,
            model_args=self.timm_model_args,
            num_classes=self.num_labels,
            num_features=self.hidden_size,
            pretrained_cfg=self.timm_pretrained_cfg,
            # With `pretrained_cfg` in the file, transformers looks here for the processor's class.
            image_processor_type="ViTImageProcessor",
        )
        if output.get("auto_map"):
            # transformers adds only the class being saved; the other must load from the same folder too.
            prefix = f"{self.modeling_module}.{self.class_prefix}"
            output["auto_map"] |= {
                "AutoModel": f"{prefix}Model",
                "AutoModelForImageClassification": f"{prefix}ForImageClassification",
            }
        return output

    def check_knobs(self, knobs: Mapping[str, Any]) -> None:
        """Raise a `ValueError` for names that are not those of knobs."""
        if unknown := knobs.keys() - set(self.knobs.values()):
            raise ValueError(
                f"Expected knobs among {', '.join(self.knobs.values())}, got {', '.join(sorted(unknown))}."
            )


__all__ = ["FamilyConfig"]
