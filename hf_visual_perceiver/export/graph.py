"""A checkpoint as one graph, for runtimes other than PyTorch: ONNX, torch.export; and as timm's own folder.

The graph slices: K active queries are the first K rows of the learned queries, so everything after them has K rows, and a
smaller K is less work, as in PyTorch. A mask over all Q would give the same logits at the full price. Which queries
Dynamic Query Selection drops differs from image to image, which no tensor with a batch dimension can follow; there the graph
masks: dropped queries are computed and nobody reads them. Selection then changes the answer as it does in PyTorch, and saves
nothing.

A graph has no default arguments and raises no errors: t = 1 keeps all queries, and K outside [1, Q] is the nearest of the two.
"""

import copy
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from hf_visual_perceiver.export.check import check_export, check_quantised
from hf_visual_perceiver.export.runtime import METADATA_KEY, OnnxClassifier, ProgramClassifier, TimmClassifier
from hf_visual_perceiver.modeling import VisualPerceiverConfig, VisualPerceiverForImageClassification
from hf_visual_perceiver.modeling.query_selection import cosine_similarities, keep_dissimilar
from hf_visual_perceiver.modeling.timm_visual_perceiver import checkpoint_filter_fn
from hf_visual_perceiver.utils.extras import require_extra
from hf_visual_perceiver.utils.files import check_writable, folder_written_aside, write_json, written_aside


INPUTS = ("pixel_values", "dqs_threshold", "num_active_queries")
OUTPUTS = ("logits", "active_queries")


class GraphClassifier(nn.Module):
    """A classifier whose knobs are tensors, so that a graph can have them as inputs.

    Args:
        model: The classifier; a copy of it is kept, in float32 and on the CPU.
        num_active_queries: K of a graph that has no such input.
    """

    def __init__(self, model: VisualPerceiverForImageClassification, num_active_queries: int | None = None):
        super().__init__()
        self.model = copy.deepcopy(model).float().cpu().eval().requires_grad_(False)
        # Fused attention cannot be exported with a dynamic number of queries before torch 2.15.
        self.model.set_attn_implementation("eager")
        self.num_active_queries = num_active_queries

    def forward(
        self, pixel_values: torch.Tensor, dqs_threshold: torch.Tensor, num_active_queries: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, labels) and the active queries (B, Q) bool.

        Args:
            pixel_values: (B, C, H, W), normalised.
            dqs_threshold: A float32 scalar; 1 keeps all.
            num_active_queries: An int64 scalar, unless K is fixed.
        """
        parts, Q = self.model.visual_perceiver, self.model.config.num_queries
        K: Any = self.num_active_queries
        if num_active_queries is not None:
            K = num_active_queries.clamp(1, Q).item()
            torch._check(K >= 1)
            torch._check(K <= Q)
        if num_active_queries is None or self.model.config.num_levels == 1:
            y = parts.read(pixel_values, K)  # (B, K, D)
        else:  # how many levels K asks for is not a fixed piece of graph, so all are computed
            y = parts.read(pixel_values, Q)[:, :K]
        too_similar = cosine_similarities(y) > dqs_threshold  # (B, K, K)
        # To Q, so that the rule is a fixed piece of graph; what is not there is similar to nothing.
        keep = keep_dissimilar(F.pad(too_similar, (0, Q - K, 0, Q - K)), self.model.config.dqs_reference)[:, :K]
        active = parts.process(parts.keep_queries(y, keep, masked=True))
        return self.model.head(parts.decode(active)), parts.active_queries(active)


def trace(
    model: VisualPerceiverForImageClassification, num_active_queries: int | None = None
) -> torch.export.ExportedProgram:
    """The classifier as a graph with a dynamic batch, and K as an input unless it is fixed.

    Args:
        model: The classifier.
        num_active_queries: K of a graph that is as small as K; None makes K an input.

    Raises:
        ValueError: If K is out of range.

    Example:
        >>> from hf_visual_perceiver import VisualPerceiverConfig, VisualPerceiverForImageClassification
        >>> config = VisualPerceiverConfig(num_hidden_layers=1, num_labels=10)
        >>> graph = trace(VisualPerceiverForImageClassification(config)).module()
        >>> logits, active = graph(torch.zeros(3, 3, 32, 32), torch.tensor(1.0), torch.tensor(8))
        >>> logits.shape, active.sum(1)
        (torch.Size([3, 10]), tensor([8, 8, 8]))
    """
    config = model.config
    if num_active_queries is not None:
        num_active_queries, _ = config.operating_point(num_active_queries)
    pixels = torch.zeros(2, config.num_channels, *config.image_height_width)
    inputs: tuple[torch.Tensor, ...] = (pixels, torch.tensor(1.0))
    if num_active_queries is None:
        inputs = (*inputs, torch.tensor(config.num_queries))
    batch = {0: torch.export.Dim("batch", min=1)}
    with torch.no_grad():
        return torch.export.export(
            GraphClassifier(model, num_active_queries),
            inputs,
            dynamic_shapes=dict(zip(INPUTS, (batch, *([None] * (len(inputs) - 1))), strict=False)),
        )


def metadata(config: VisualPerceiverConfig, num_active_queries: int | None, precision: str) -> dict[str, Any]:
    """What a caller of the graph has to know, as plain values: preparation of images, labels, ranges of the inputs.

    Args:
        config: The checkpoint's.
        num_active_queries: K, if it is fixed in the graph.
        precision: `"float32"` or `"int8"`.
    """
    height, width = config.image_height_width
    cfg = config.timm_pretrained_cfg
    K, t = config.operating_point(num_active_queries)
    fields = config.to_dict()
    fields.pop("_name_or_path", None)  # a folder of the machine that exports
    return {
        "labels": config.label_names,
        "image_size": [height, width],
        "num_channels": config.num_channels,
        "mean": list(cfg["mean"]),
        "std": list(cfg["std"]),
        "interpolation": cfg["interpolation"],
        "num_queries": config.num_queries,
        "num_active_queries": None if num_active_queries is None else K,
        "default_num_active_queries": K,
        "default_dqs_threshold": 1.0 if t is None else t,
        "precision": precision,
        "inputs": INPUTS if num_active_queries is None else INPUTS[:-1],
        "outputs": OUTPUTS,
        "config": fields,
    }


def export_onnx(
    model: VisualPerceiverForImageClassification,
    path: str | Path,
    num_active_queries: int | None = None,
    int8: bool = False,
) -> float:
    """Write an ONNX file with its metadata inside, compared with the model in ONNX Runtime before it takes its name.

    Args:
        model: The classifier.
        path: The file to write.
        num_active_queries: K of a graph that is as small as K; None makes K an input.
        int8: Quantise the weights of the linears, and their inputs as they come ("dynamic quantisation").

    Returns:
        The largest difference of a logit from PyTorch's; with `int8` the mean difference relative to their deviation.

    Raises:
        ValueError: If K is out of range, the file cannot be written or its answers are wrong.
        ImportError: If a package of the extra `export` is missing.
    """
    require_extra("export")
    path = Path(path)
    check_output(path)
    check_size(model)
    import onnx

    with quiet():
        graph = torch.onnx.export(
            trace(model, num_active_queries),
            dynamo=True,
            input_names=INPUTS if num_active_queries is None else INPUTS[:-1],
            output_names=OUTPUTS,
            verbose=False,
        )
    assert graph is not None
    proto = graph.model_proto
    # Traces of where in the source each operation comes from: paths of this machine. The shapes of intermediate tensors are
    # inferred by whoever needs them; those of weights are wrong once a weight is quantised.
    for node in proto.graph.node:
        node.ClearField("metadata_props")
    for info in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        info.ClearField("metadata_props")
    for field in ("value_info", "metadata_props"):
        proto.graph.ClearField(field)
    proto.ClearField("metadata_props")
    proto.doc_string = "Visual Perceiver: an image classifier whose compute is an input."

    def save(target: Path, precision: str) -> None:
        facts = metadata(model.config, num_active_queries, precision)
        onnx.helper.set_model_props(proto, {METADATA_KEY: json.dumps(facts)})
        onnx.save(proto, target)

    with written_aside(path) as aside:
        save(aside, "float32")
        difference = check_export(OnnxClassifier(aside), model, num_active_queries)
        if int8:
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
                whole = Path(folder) / "float32.onnx"
                save(whole, "int8")
                quantise(whole, aside)
            difference = check_quantised(OnnxClassifier(aside), model, num_active_queries)
    return difference


def quantise(source: Path, target: Path) -> None:
    """Weights of matrix products in int8, one scale for each output; activations when the graph runs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(
            source,
            target,
            # Not the convolution, which is one thousandth of the work and reads the pixels.
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )


def export_program(
    model: VisualPerceiverForImageClassification, path: str | Path, num_active_queries: int | None = None
) -> float:
    """Write a file for `torch.export.load`, compared with the model before it takes its name.

    Args:
        model: The classifier.
        path: The file to write.
        num_active_queries: K of a graph that is as small as K; None makes K an input.

    Returns:
        The largest difference of a logit.

    Raises:
        ValueError: If K is out of range, the file cannot be written or its answers are wrong.
    """
    path = Path(path)
    check_output(path)
    program = trace(model, num_active_queries)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of this machine
    facts = metadata(model.config, num_active_queries, "float32")
    with written_aside(path) as aside:
        torch.export.save(program, aside, extra_files={METADATA_KEY: json.dumps(facts)})
        return check_export(ProgramClassifier(aside), model, num_active_queries)


def export_timm(model: VisualPerceiverForImageClassification, folder: str | Path) -> float:
    """Write a folder as timm writes them: weights by timm's names in safetensors, and timm's fields in config.json.

    Args:
        model: The classifier.
        folder: A new or empty folder; `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it.

    Returns:
        The largest difference of a logit.

    Raises:
        ValueError: If the folder holds something, or timm's answers are not those of the model.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"Expected {folder} to be new or empty; it holds something.")
    fields = model.config.to_dict()
    config = {
        key: fields[key] for key in ("architecture", "num_classes", "num_features", "model_args", "pretrained_cfg")
    }
    state = {key: value.float().cpu().contiguous() for key, value in model.state_dict().items()}
    with folder_written_aside(folder) as aside:
        write_json(aside / "config.json", config)
        save_file(checkpoint_filter_fn(state, model), aside / "model.safetensors", metadata={"format": "pt"})
        return check_export(TimmClassifier(aside), model, None)


def check_output(path: Path) -> None:
    """Raise a `ValueError` unless a file of this name can be made."""
    check_writable(path)
    if not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"Expected a folder that can be written to, got {str(path.absolute().parent)!r}.")


def check_size(model: nn.Module) -> None:
    """Raise a `ValueError` for what does not fit in one ONNX file."""
    size = sum(4 * p.numel() for p in model.parameters())
    if size > 2**31 - 2**24:
        raise ValueError(
            f"Expected weights of less than 2 GiB in float32, the limit of one ONNX file, got {size:,} bytes."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the hints that exporters and quantisers log."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
