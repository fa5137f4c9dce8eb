"""Families without an engine of their own in ONNX Runtime: one graph for each budget, made when the budget is first used.

The Dynamic Vision Transformer has a graph for each exit instead, so that images can stop between them.
"""

import hashlib
from functools import cache
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
from hf_visual_perceiver.modeling import Budget, DynamicVisionTransformerForImageClassification
from hf_visual_perceiver.modeling.elastic import reference_model
from hf_visual_perceiver.modeling.modeling_dynamic_vision_transformer import DynamicVisionTransformerParts, Reused
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


class OnnxExits(OnnxModel, DynamicVisionTransformerParts):
    """The Dynamic Vision Transformer: a graph for each exit, and images that are sure enough leave the batch between them."""

    @property
    def first_stage(self) -> str:
        """The first exit's; see `OnnxModel`."""
        return "exit_0"

    def stage(self, name: str) -> Stage:
        """The stage of an exit, `exit_0` being the first."""
        exit, x = int(name.removeprefix("exit_")), self.examples
        inputs, passed = {"pixel_values": x}, ("tokens", "scores")
        for i in range(exit):
            with torch.no_grad():
                _, *left = AtExit(self.model, i)(**inputs)
            inputs = {"pixel_values": x, **dict(zip(passed, left, strict=True))}
        # Inputs and outputs of a graph need different names.
        outputs = ("logits", "own_tokens", "own_scores") if exit + 1 < self.config.num_exits else ("logits",)
        return Stage(AtExit(self.model, exit), inputs, dict.fromkeys(inputs, IMAGES), outputs)

    def __call__(self, pixel_values: torch.Tensor, **knobs: Any) -> Any:
        """The model's output; see `OnnxModel`."""
        heads = list(self.model.heads)
        logits, exits, every = self.run(pixel_values, heads, knobs["max_exit"], knobs["exit_thresholds"])
        return self.output_class(logits=logits, exits=exits, exit_logits=every or None)

    def answer(
        self, exit: int, head: nn.Module, pixel_values: torch.Tensor, reused: Reused | None
    ) -> tuple[torch.Tensor, Reused | None]:
        """The logits (B, labels) of one exit, and what it passes to the next; its graph has the head."""
        earlier = {} if reused is None else {"tokens": reused.tokens, "scores": reused.scores}
        logits, *own = self.run_stage(f"exit_{exit}", pixel_values=pixel_values, **earlier).values()
        return logits, Reused(*own) if own else None


class AtExit(nn.Module):
    """One exit: images, and the tokens and scores of the exit before, to logits and what the next exit reuses."""

    def __init__(self, model: Any, exit: int):
        super().__init__()
        self.model, self.exit = model, exit

    def forward(
        self, pixel_values: torch.Tensor, tokens: torch.Tensor | None = None, scores: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        parts, head = self.model.dynamic_vision_transformer, self.model.heads[self.exit]
        reused = None if tokens is None or scores is None else Reused(tokens, scores)
        logits, left = parts.answer(self.exit, head, pixel_values, reused)
        return (logits,) if left is None else (logits, left.tokens, left.scores)


def create_onnx_engine(model: Any, **settings: Any) -> OnnxModel:
    """The engine of a model, with `OnnxModel`'s settings."""
    has_exits = isinstance(model, DynamicVisionTransformerForImageClassification)
    return (OnnxExits if has_exits else OnnxModel)(model, **settings)


@cache
def code_hash() -> str:
    """A hash of the code on which the graphs depend: the models' and this file."""
    files = [*sorted(Path(modeling.__path__[0]).glob("*.py")), Path(__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
