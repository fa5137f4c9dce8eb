"""Families without an engine of their own in ONNX Runtime: one graph for each budget, made when the budget is first used.

A network with exits has a graph for each exit instead, so that images can stop between them.
"""

import hashlib
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_visual_perceiver import modeling
from hf_visual_perceiver.inference.onnx_graphs import (
    Graph,
    Sessions,
    Stage,
    cache_folder,
    checked_threads,
    graphs_of,
    import_onnxruntime,
)
from hf_visual_perceiver.modeling import Budget
from hf_visual_perceiver.modeling.elastic import reference_model
from hf_visual_perceiver.modeling.static_classifier import StaticClassifier


IMAGES = {0: "images"}  # the dimension of a graph's inputs that may vary


class OnnxModel:
    """Classifies images with ONNX Runtime, from a snapshot of a model, with a graph for each budget.

    Args:
        model: A classifier.
        num_threads: Number of threads per call; None is torch's number.
        int8: Run linear layers in 8 bits.

    Raises:
        ValueError: If the number of threads is not at least 1.
        ImportError: If onnxruntime is not installed, or onnx and onnxscript to export graphs, or onnx for `int8`.
    """

    torch_allocates = False  # ONNX Runtime's memory does not show in measurements of torch's memory

    def __init__(self, model: Any, num_threads: int | None = None, int8: bool = False):
        import_onnxruntime()  # fail early, before an export that takes seconds
        threads = checked_threads(num_threads)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.model = reference_model(model).requires_grad_(False)
        self.config = self.model.config
        if isinstance(self.model, PreTrainedModel):
            # torch exports fused attention with its scale computed from shapes, anew in each call.
            self.model.set_attn_implementation("eager")
        # The module that is exported has the model as its attribute `model`.
        weights = {f"model.{name}": value for name, value in self.model.state_dict(keep_vars=True).items()}
        weights |= {f"model.{name}": value for name, value in self.model.named_buffers()}
        with torch.no_grad():
            self.output_class = type(self.model(self.examples))
        self.sessions = Sessions({}, weights, threads, int8, self.make)
        self.sessions.session(self.first_stage)  # fail early if graphs cannot be made

    @property
    def examples(self) -> torch.Tensor:
        """Images to trace with."""
        return torch.zeros(2, self.config.num_channels, *self.config.image_height_width)

    @property
    def first_stage(self) -> str:
        """Name of a stage that the default budget uses."""
        return self.stage_name(self.config.knobs_for())

    def stage_name(self, knobs: dict[str, Any]) -> str:
        """Name of the graph of a budget; `Budget.parse` reads it."""
        return Budget(**knobs).short(self.config.knobs)

    def make(self, name: str) -> Graph:
        """Get a stage's graph from this machine's cache, or else export it."""
        stage, architecture = self.stage(name), None
        if not isinstance(self.model, StaticClassifier):  # constants in a graph of timm may be those of its checkpoint
            sizes = {**self.config.timm_model_args, "labels": len(self.config.label_names)}
            architecture = {"family": self.config.model_type, "sizes": sizes, "stage": name, "code": code_hash()}
        folders = [] if architecture is None else [cache_folder(architecture)]
        try:
            return graphs_of({"graph": stage}, architecture or {}, folders)["graph"]
        except RuntimeError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"Expected a network that torch can export at {name} for any number of images, got: {reason} "
                '`optimize_for_inference(backend="torch")` takes it.'
            ) from error

    def stage(self, name: str) -> Stage:
        """The stage of this name."""
        module = AtBudget(self.model, self.config.resolve(**self.config.parse_budget(name).kwargs))
        with torch.no_grad():
            fields = tuple(self.model(self.examples, **module.knobs))
        return Stage(module, {"pixel_values": self.examples}, {"pixel_values": IMAGES}, fields)

    def __call__(self, pixel_values: torch.Tensor, **knobs: Any) -> Any:
        """The model's output.

        Args:
            pixel_values: (B, C, H, W), normalised, of the config's size.
            **knobs: All knobs; a tensor (B,) has a value for each image, and images of equal values run together.
        """
        for name, values in knobs.items():
            if isinstance(values, torch.Tensor):
                if len(values) != len(pixel_values):
                    raise ValueError(f"Expected `{name}` of {len(pixel_values)} images, got {len(values)}.")
                groups = [(values == value).nonzero()[:, 0] for value in values.unique()]
                parts = [self(pixel_values[g], **{**knobs, name: values[g[0]].item()}) for g in groups]
                order = torch.cat(groups).argsort()
                return self.output_class(**{field: torch.cat([p[field] for p in parts])[order] for field in parts[0]})
        return self.output_class(**self.run_stage(self.stage_name(knobs), pixel_values=pixel_values))

    def run_stage(self, name: str, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs of a stage, by name."""
        arrays = {key: value.detach().float().numpy() for key, value in inputs.items()}
        outputs = self.sessions.run(name, None, **arrays)
        return dict(zip(self.sessions.outputs(name), map(torch.from_numpy, outputs), strict=True))


class AtBudget(nn.Module):
    """A model at one budget: images (B, C, H, W) to the fields of its output."""

    def __init__(self, model: Any, knobs: dict[str, Any]):
        super().__init__()
        self.model, self.knobs = model, knobs

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Two fields may be the same tensor, and a graph's outputs must differ.
        return tuple(value.clone() for value in self.model(pixel_values, **self.knobs).values())


class OnnxExits(OnnxModel):
    """A network with exits: a graph for each, and images that are sure enough leave the batch between them.

    The model has `exit_step(i)`, a module from images and what exit i - 1 passes on to logits and what exit i passes on, and
    `run_exits`, which runs exits as far as images need them.
    """

    @property
    def first_stage(self) -> str:
        """The first exit's; see `OnnxModel`."""
        return "exit_0"

    @cached_property
    def passed(self) -> Sequence[str]:
        """Names of what an exit passes to the next one."""
        return self.model.exit_step(0).passed

    def stage(self, name: str) -> Stage:
        """The stage of an exit, `exit_0` being the first."""
        exit, x = int(name.removeprefix("exit_")), self.examples
        inputs, step = {"pixel_values": x}, self.model.exit_step(exit)
        for i in range(exit):
            with torch.no_grad():
                _, *left = self.model.exit_step(i)(**inputs)
            inputs = {"pixel_values": x, **dict(zip(self.passed, left, strict=True))}
        # Inputs and outputs of a graph need different names.
        own = [f"own_{part}" for part in self.passed] if exit + 1 < self.config.num_exits else []
        return Stage(step, inputs, dict.fromkeys(inputs, IMAGES), ("logits", *own))

    def __call__(self, pixel_values: torch.Tensor, **knobs: Any) -> Any:
        """The model's output; see `OnnxModel`."""
        return self.model.run_exits(self.answer, pixel_values, **knobs)

    def answer(
        self, exit: int, pixel_values: torch.Tensor, passed: Any
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """The logits (B, labels) of one exit, and what it passes to the next."""
        earlier = {} if passed is None else dict(zip(self.passed, passed, strict=True))
        logits, *own = self.run_stage(f"exit_{exit}", pixel_values=pixel_values, **earlier).values()
        return logits, tuple(own) or None


def create_onnx_engine(model: Any, **settings: Any) -> OnnxModel:
    """The engine of a model, with `OnnxModel`'s settings."""
    return (OnnxExits if hasattr(model, "exit_step") else OnnxModel)(model, **settings)


@cache
def code_hash() -> str:
    """A hash of the code on which the graphs depend: the models' and this file."""
    files = [*sorted(Path(modeling.__path__[0]).glob("*.py")), Path(__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
