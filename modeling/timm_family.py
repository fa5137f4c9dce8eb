"""timm's verbs on the families' networks, and their registration."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .family_config import FamilyConfig


class TimmClassifier(nn.Module):
    """A family's network as a timm model; parameters and names are those of its `ForImageClassification`.

    A subclass mixes in the family's parts and says what `forward_features` and `forward_head` do.

    Args:
        config: The family's; timm's names of its fields are understood by `create`.
        drop_rate: Dropout before the classifier.
    """

    config_class: type[FamilyConfig]
    base_prefix: str  # of parameter names in transformers' classifier
    initialise: Callable[..., None]  # as `init_weights` of the family

    def __init__(self, drop_rate: float = 0.0, **fields: Any):
        super().__init__()
        names = {"img_size": "image_size", "in_chans": "num_channels", "num_classes": "num_labels"}
        size = fields.get("img_size")
        if isinstance(size, (tuple, list)):  # as timm passes it
            if len(set(size)) != 1:
                raise ValueError(f"Expected square images, got `img_size` {tuple(size)}.")
            fields["img_size"] = size[0]
        config: Any = self.config_class(**{names.get(name, name): value for name, value in fields.items()})
        config._attn_implementation = "sdpa"
        self.config = config
        self.in_chans, self.num_classes = config.num_channels, config.num_labels
        self.num_features = self.head_hidden_size = self.embed_dim = config.hidden_size
        self.head_drop = nn.Dropout(drop_rate)
        self.build_parts(config)
        self.build_heads()
        self.init_weights()

    def build_parts(self, config: Any) -> None:
        """Create the family's submodules."""
        raise NotImplementedError

    def build_heads(self) -> None:
        """Create the classifiers for `num_classes`."""
        self.head = self.new_head()

    def new_head(self, width: int | None = None) -> nn.Module:
        """A classifier, or the identity without classes."""
        return nn.Linear(width or self.num_features, self.num_classes) if self.num_classes > 0 else nn.Identity()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise every parameter anew, as transformers does for this model."""
        self.apply(partial(type(self).initialise, std=self.config.initializer_range))

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model new classifiers."""
        if global_pool not in (None, "token", "avg"):
            raise ValueError(f"Expected `global_pool` to stay as it is, got {global_pool!r}.")
        like = next(self.parameters())
        self.num_classes = self.config.num_labels = num_classes
        self.build_heads()
        self.to(device=like.device, dtype=like.dtype)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should spare."""
        return {name for name, p in self.named_parameters() if p.ndim < 2 or "position" in name or "token" in name}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort the parameters by depth, for layer-wise learning rates."""
        return {"stem": r"^embeddings|projection", "blocks": r"layers\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        for layer in self.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.gradient_checkpointing = enable
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]

    def forward_features(self, x: torch.Tensor, **knobs: Any) -> torch.Tensor:
        """Tokens before the classifier, (B, n, D)."""
        raise NotImplementedError

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool and classify tokens: (B, n, D) -> (B, classes), or (B, D) with `pre_logits`."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """(B, n, D) -> (B, D)."""
        return x.mean(1)

    def forward(self, x: torch.Tensor, **knobs: Any) -> torch.Tensor:
        """Classify images at a budget: (B, C, H, W) -> (B, classes)."""
        return self.forward_head(self.forward_features(x, **knobs))

    def knobs_of(self, given: dict[str, Any]) -> dict[str, Any]:
        """All knobs, those that are not given at the config's default."""
        self.config.check_knobs(given)
        stored = {name: getattr(self.config, name) for name in self.config.knobs.values()}
        return self.config.resolve(**{**stored, **{n: v for n, v in given.items() if v is not None}})


def register_architectures(module: str, model: type[TimmClassifier]) -> None:
    """Register a function for each named architecture of a family with timm.

    Args:
        module: `__name__` of the family's timm file.
        model: Its model class.
    """
    space, config_class = sys.modules[module], model.config_class

    def default_cfg(name: str) -> dict[str, Any]:
        config = config_class.from_architecture(name)
        labels = 10 if config.image_size <= 64 else 1000
        cfg = config_class.from_architecture(name, num_labels=labels).timm_pretrained_cfg
        return {"url": "", "pool_size": None, "license": "apache-2.0", **cfg, "input_size": tuple(cfg["input_size"])}

    def strip_prefix(state_dict: dict[str, torch.Tensor], network: nn.Module) -> dict[str, torch.Tensor]:
        return {name.removeprefix(f"{model.base_prefix}."): value for name, value in state_dict.items()}

    space.default_cfgs = generate_default_cfgs({name: default_cfg(name) for name in config_class.named})  # type: ignore[attr-defined]
    for name, fields in config_class.named.items():

        def create(pretrained: bool = False, *, _name: str = name, _fields: Any = fields, **kwargs: Any) -> nn.Module:
            names = {"image_size": "img_size", "num_channels": "in_chans"}
            arguments = {names.get(field, field): value for field, value in _fields.items()}
            return build_model_with_cfg(
                model, _name, pretrained, pretrained_filter_fn=strip_prefix, **{**arguments, **kwargs}
            )

        create.__name__ = create.__qualname__ = name
        create.__module__ = module
        create.__doc__ = f"{config_class.class_prefix} `{name}`."
        setattr(space, name, register_model(create))
