"""What `optimize_for_inference` returns, and engines for any family: PyTorch here, and those that hf_visual_perceiver adds."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .elastic import ElasticModel, check_pixel_values
from .query_selection import without_autocast


OPTIMISE_AGAIN = "load a model with `image_size=...` (timm: `img_size=...`) and optimise that"


class OptimizedModel(nn.Module):
    """A classifier that `optimize_for_inference` makes from a copy of the weights; it is called like the model.

    Args:
        config: The model's config; it is copied.
        engine: What computes; called with images and all knobs.

    Attributes:
        dtype: Dtype of the computation.
        device: Device of the images.
    """

    def __init__(self, config: Any, engine: Any):
        super().__init__()
        self.config, self.engine = copy.deepcopy(config), engine
        self.dtype, self.device = engine.dtype, engine.device
        self.eval()

    def check_images(self, pixel_values: torch.Tensor) -> None:
        """Raise a `ValueError` unless the engine can read these images."""
        check_pixel_values(pixel_values, self.config, advice=OPTIMISE_AGAIN)
        if pixel_values.device != self.device:
            raise ValueError(f"Expected images on {self.device}, where the engine computes, got {pixel_values.device}.")

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "OptimizedModel":
        raise RuntimeError(
            "An optimised model cannot be moved or converted; move or convert the model and optimise it again."
        )

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, **knobs: Any) -> Any:
        """Classify images, as the model does, without gradients or labels.

        Args:
            pixel_values: (B, C, H, W), normalised.
            **knobs: Those of the model's `forward`.

        Raises:
            ValueError: If the images or a knob are not as the model expects.
        """
        given = self.config.knobs_for(**knobs)
        self.check_images(pixel_values)
        return self.engine(pixel_values, **given)


class PlainModel:
    """Classifies images with a copy of a model, in any dtype and on any device.

    Args:
        model: The model.
        dtype: Dtype of weights and activations.
    """

    def __init__(self, model: Any, dtype: torch.dtype):
        self.model = copy.deepcopy(model).requires_grad_(False).eval().to(dtype)
        self.dtype, self.device = dtype, self.model.device

    def __call__(self, pixel_values: torch.Tensor, **knobs: Any) -> Any:
        with without_autocast(self.device):  # the engine has a dtype of its own
            return self.model(pixel_values.to(self.dtype), **knobs)


# Name -> what makes an engine from a model. Importing hf_visual_perceiver adds "onnxruntime".
MODEL_ENGINES: dict[str, Callable[..., Any]] = {"torch": PlainModel}


class OptimizableModel(ElasticModel):
    """A classifier with `optimize_for_inference`; a mixin."""

    def optimize_for_inference(
        self,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        num_threads: int | None = None,
        int8: bool | None = None,
    ) -> OptimizedModel:
        """A copy of this model for inference, without gradients; later changes of this model do not change the copy.

        onnxruntime's logits equal this model's to 1e-4 in float32. It makes a graph for each budget at its first use.

        Args:
            dtype: Dtype to compute in, such as `torch.bfloat16` on CPUs that have it; None is the model's.
            backend: `"onnxruntime"`, which computes in float32 on CPUs, or `"torch"`, this model itself. None is onnxruntime where it supports the settings, if hf_visual_perceiver is imported.
            num_threads: Threads of onnxruntime; None is torch's number.
            int8: Have onnxruntime compute linears in 8 bits.

        Raises:
            ValueError: If the backend does not take the settings, or weights are offloaded.
            ImportError: If onnxruntime is not installed, or onnx and onnxscript to make graphs.
        """
        assert isinstance(self, nn.Module)
        check_in_memory(self)
        settings: dict[str, Any] = {"backend": backend, "num_threads": num_threads, "int8": int8 or None}
        like = next(self.parameters())
        return OptimizedModel(self.config, create_engine(MODEL_ENGINES, (self,), like, dtype=dtype, **settings))


def create_engine(
    engines: Mapping[str, Callable[..., Any]],
    network: tuple[Any, ...],
    like: torch.Tensor,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> Any:
    """Create an engine by name; None is onnxruntime where it supports the dtype and device, else torch.

    Args:
        engines: Name -> what makes an engine.
        network: What the engine is made of.
        like: A weight of the network.
        backend: One of `engines`.
        dtype: Dtype to compute in; None is the network's.
        **settings: Settings of onnxruntime; None leaves one out.

    Raises:
        ValueError: If there is no such engine, or it does not take a setting.
    """
    dtype = dtype or like.dtype
    onnx_takes_it = dtype == torch.float32 and like.device.type == "cpu"
    settings = {name: value for name, value in settings.items() if value is not None}
    if backend is None:
        backend = "onnxruntime" if "onnxruntime" in engines and (onnx_takes_it or settings) else "torch"
    if backend not in engines:
        raise ValueError(
            f"Expected `backend` among {', '.join(engines)}, got {backend!r}; onnxruntime comes with the package "
            "hf_visual_perceiver."
        )
    if backend == "torch":
        if settings:
            raise ValueError(f"Expected no {', '.join(settings)} with `backend` 'torch', got {settings}.")
        return engines[backend](*network, dtype)
    if not onnx_takes_it:
        raise ValueError(
            f"Expected float32 on a CPU for `backend` {backend!r}, got {dtype} on {like.device.type}; 'torch' takes it."
        )
    return engines[backend](*network, **settings)


def check_in_memory(network: nn.Module) -> None:
    """Raise a `ValueError` if weights are not in memory."""
    without = [name for name, p in network.named_parameters() if p.is_meta]
    if without:
        raise ValueError(
            f"Expected weights in memory, got meta tensors such as {without[0]}: load the weights, and optimise before offloading."
        )


__all__ = ["OptimizableModel", "OptimizedModel"]
