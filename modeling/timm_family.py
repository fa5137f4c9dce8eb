"""The base of the families' timm models, and the registration of their architectures."""

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from timm.layers import use_fused_attn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .elastic import FAMILIES
from .family_config import FamilyConfig


class TimmClassifier(nn.Module):
    """A family's network as a timm model; parameters and names are those of its `ForImageClassification`.

    A subclass mixes in the family's parts, before this class, and implements `forward_features`.

    Args:
        drop_rate: Dropout before the classifier.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        **arguments: `img_size`, `in_chans`, `num_classes` and what the family's config has; see `FamilyConfig.timm_names`.

    Raises:
        TypeError: If there is no such argument.
        ValueError: If a value is out of its range.
    """

    pretrained_class: Any  # transformers' base class of the family
    build_parts: Callable[[Any], None]  # the mixin's
    forward_features: Callable[..., torch.Tensor]  # (B, C, H, W) and knobs -> tokens (B, n, D)
    feature_cfg: Mapping[str, Any] = {}  # timm's settings of `features_only`, which a model without them does not have

    def __init__(
        self,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **arguments: Any,
    ):
        super().__init__()
        config: Any = self.pretrained_class.config_class.from_timm(**arguments)
        config._attn_implementation = "sdpa" if use_fused_attn() else "eager"
        self.config = config
        self.in_chans, self.num_classes = config.num_channels, config.num_labels
        self.num_features = self.head_hidden_size = self.embed_dim = config.hidden_size
        with torch.device(device) if device is not None else nullcontext():
            self.build_parts(config)
            self.head_drop = nn.Dropout(drop_rate)
            self.build_heads()
        self.to(dtype=dtype)
        self.init_weights()

    def build_heads(self) -> None:
        """Create the classifiers for `num_classes`."""
        self.head = self.new_head()

    def new_head(self, width: int | None = None) -> nn.Module:
        """A classifier, or the identity without classes."""
        like, classes = next(self.parameters()), self.num_classes
        if classes == 0:
            return nn.Identity().train(self.training)
        head = nn.Linear(width or self.num_features, classes, device=like.device, dtype=like.dtype)
        return head.train(self.training)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise every parameter anew, as transformers does for this model."""
        self.apply(partial(self.pretrained_class._init_weights, self))

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model new classifiers."""
        if global_pool not in (None, "token", "avg"):
            raise ValueError(f"Expected `global_pool` to stay as it is, got {global_pool!r}.")
        self.num_classes = self.config.num_labels = num_classes
        self.build_heads()

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

    @torch.jit.ignore
    def optimize_for_inference(self, **settings: Any) -> "OptimizedTimmClassifier":
        """A copy of this classifier for inference, which is called like it and has no gradients.

        Args:
            **settings: `dtype`, `backend`, `num_threads` and `int8`, as in `OptimizableModel.optimize_for_inference`.

        Raises:
            ValueError: If the model has no classifier, or the backend does not take the settings.
            ImportError: If onnxruntime is not installed, or onnx and onnxscript to make graphs.
        """
        if self.num_classes == 0:
            raise ValueError("Expected a model with classes to optimise, got `num_classes` 0.")
        model = FAMILIES[self.config.model_type].classifier(self.config)
        prefix = f"{model.base_model_prefix}."
        names = {name.removeprefix(prefix): name for name in model.state_dict()}
        model.to(next(self.parameters())).load_state_dict({names[k]: v for k, v in self.state_dict().items()})
        return OptimizedTimmClassifier(model.eval().optimize_for_inference(**settings))

    def adapt_tensor(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Fit a checkpoint's tensor to this model; by default unchanged."""
        return value


class OptimizedTimmClassifier(nn.Module):
    """The result of `TimmClassifier.optimize_for_inference`: (B, C, H, W) and knobs -> logits (B, classes)."""

    def __init__(self, optimized: nn.Module):
        super().__init__()
        self.optimized = optimized
        self.eval()

    def forward(self, x: torch.Tensor, **knobs: Any) -> torch.Tensor:
        return self.optimized(x, **knobs).logits


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: TimmClassifier) -> dict[str, torch.Tensor]:
    """Make a checkpoint fit `model`: without transformers' prefix, and with adapted tensors."""
    prefix = f"{model.pretrained_class.base_model_prefix}."
    named = ((name.removeprefix(prefix), value) for name, value in state_dict.items())
    return {name: model.adapt_tensor(name, value) for name, value in named}


def register_architectures(model: type[TimmClassifier]) -> None:
    """Register a function for each named architecture of a model's family with timm."""
    module: Any = sys.modules[model.__module__]
    module.checkpoint_filter_fn = checkpoint_filter_fn  # timm looks for it there
    config_class: type[FamilyConfig] = model.pretrained_class.config_class
    configs = {name: config_class.from_architecture(name) for name in config_class.named}
    module.default_cfgs = generate_default_cfgs({name: _default_cfg(config) for name, config in configs.items()})
    for name, config in configs.items():
        setattr(module, name, register_model(_entrypoint(model, name, config)))


def _default_cfg(config: Any) -> dict[str, Any]:
    config.num_labels = 10 if max(config.image_height_width) <= 64 else 1000
    cfg = config.timm_pretrained_cfg
    return {"url": "", "pool_size": None, "license": "apache-2.0", **cfg, "input_size": tuple(cfg["input_size"])}


def _entrypoint(model: type[TimmClassifier], name: str, config: Any) -> Callable[..., nn.Module]:
    # timm takes the sizes of images from `default_cfgs`.
    defaults = {key: value for key, value in config.timm_model_args.items() if key not in ("img_size", "in_chans")}

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if kwargs.get("features_only") and not model.feature_cfg:
            raise RuntimeError(f"features_only not implemented for {config.title} models.")  # as timm's own models do
        return build_model_with_cfg(
            model,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(model.feature_cfg),
            **{**defaults, **kwargs},
        )

    height, width = config.image_height_width
    create.__name__ = create.__qualname__ = name
    create.__module__ = model.__module__
    create.__doc__ = f"{config.title} of {config.summary}, for {height}x{width} images."
    return create
