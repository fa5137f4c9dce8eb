"""Export a checkpoint as one graph for other runtimes (ONNX, torch.export), or as a folder in timm's format.

A graph has one fixed budget, unless the family has a graph that takes the knobs as inputs (see the model's `as_graph`).

The Visual Perceiver has such a graph. It slices: K active queries are the first K rows of the learned queries, so
everything after them has K rows, and a smaller K is less work, as in PyTorch. A mask over all Q would give the same
logits at full cost. Dynamic Query Selection drops different queries in each image, which does not fit in a tensor with
a batch dimension. There the graph masks: dropped queries are computed, but nothing attends to them. Selection then
changes the logits as in PyTorch, but saves no work.

The graph has no default arguments and raises no errors: t = 1 keeps all queries, and K is clamped to [1, Q].
"""

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
from torch._dynamo.exc import UserError

from hf_visual_perceiver.export.check import check_export, check_quantised
from hf_visual_perceiver.export.runtime import METADATA_KEY, OnnxClassifier, ProgramClassifier, TimmClassifier
from hf_visual_perceiver.modeling import Budget
from hf_visual_perceiver.modeling.elastic import GraphPlan
from hf_visual_perceiver.utils.extras import require_extra
from hf_visual_perceiver.utils.files import check_writable, folder_written_aside, write_json, written_aside


PIXELS = "pixel_values"


def trace(model: Any, budget: Budget | None = None) -> torch.export.ExportedProgram:
    """Trace the classifier as a graph with a dynamic batch size.

    Args:
        model: The classifier.
        budget: Budget to fix in the graph; None keeps the knobs as inputs if the model supports that.

    Raises:
        ValueError: If a graph cannot have the budget, or torch cannot trace the network.

    Example:
        >>> from hf_visual_perceiver import VisualPerceiverConfig, VisualPerceiverForImageClassification
        >>> config = VisualPerceiverConfig(num_hidden_layers=1, num_labels=10)
        >>> graph = trace(VisualPerceiverForImageClassification(config)).module()
        >>> logits, active = graph(torch.zeros(3, 3, 32, 32), torch.tensor(1.0), torch.tensor(8))
        >>> logits.shape, active.sum(1)
        (torch.Size([3, 10]), tensor([8, 8, 8]))
    """
    return trace_plan(model.as_graph(budget), model.config)


def trace_plan(plan: GraphPlan, config: Any) -> torch.export.ExportedProgram:
    """Trace a plan that the model's `as_graph` returned; see `trace`."""
    pixels = torch.zeros(2, config.num_channels, *config.image_height_width)
    batch = {0: torch.export.Dim("batch", min=1)}
    inputs, shapes = (pixels, *plan.inputs.values()), (batch, *([None] * len(plan.inputs)))
    try:
        with torch.no_grad():
            return torch.export.export(plan.module, inputs, dynamic_shapes=shapes)
    except (RuntimeError, ValueError, UserError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        name = Budget(**plan.fixed).short(config.knobs)
        raise ValueError(
            f"Expected a network that torch can trace at {name}, for any number of images: {reason}"
        ) from error


def metadata(config: Any, plan: GraphPlan, precision: str) -> dict[str, Any]:
    """The facts that a caller of the graph needs, as plain values: preprocessing, labels, inputs and outputs.

    Args:
        config: The checkpoint's config.
        plan: Plan of the graph.
        precision: `"float32"` or `"int8"`.
    """
    height, width = config.image_height_width
    cfg = config.timm_pretrained_cfg
    fields = config.to_dict()
    fields.pop("_name_or_path", None)  # a folder of the machine that exports
    return {
        "labels": config.label_names,
        "image_size": [height, width],
        "num_channels": config.num_channels,
        "mean": list(cfg["mean"]),
        "std": list(cfg["std"]),
        "interpolation": cfg["interpolation"],
        **plan.facts,
        "fixed": Budget(**plan.fixed).kwargs,
        "precision": precision,
        "inputs": [PIXELS, *plan.inputs],
        "outputs": list(plan.outputs),
        "config": fields,
    }


def export_onnx(
    model: Any,
    path: str | Path,
    budget: Budget | None = None,
    int8: bool = False,
) -> float:
    """Write an ONNX file with embedded metadata; it is kept only if ONNX Runtime gives the model's results.

    Args:
        model: The classifier.
        path: The file to write.
        budget: Budget to fix in the graph; None keeps the knobs as inputs if the model supports that.
        int8: Quantise the linear layers: their weights in the file, their inputs at run time ("dynamic quantisation").

    Returns:
        The largest difference of a logit from PyTorch's; with `int8`, the mean difference in standard deviations.

    Raises:
        ValueError: If a graph cannot have the budget, the file cannot be written or its results are wrong.
        ImportError: If a package of the extra `export` is missing.
    """
    require_extra("export")
    path = Path(path)
    check_output(path)
    check_size(model)
    import onnx

    plan = model.as_graph(budget)
    with quiet():
        graph = torch.onnx.export(
            trace_plan(plan, model.config),
            dynamo=True,
            input_names=[PIXELS, *plan.inputs],
            output_names=list(plan.outputs),
            verbose=False,
        )
    assert graph is not None
    proto = graph.model_proto
    # Remove the source locations of operations, which contain paths of this machine, and the shapes of intermediate
    # tensors: runtimes infer them, and those of weights are wrong once a weight is quantised.
    for node in proto.graph.node:
        node.ClearField("metadata_props")
    for info in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        info.ClearField("metadata_props")
    for field in ("value_info", "metadata_props"):
        proto.graph.ClearField(field)
    proto.ClearField("metadata_props")
    proto.doc_string = f"{model.config.title}: an image classifier."

    def save(target: Path, precision: str) -> None:
        facts = metadata(model.config, plan, precision)
        onnx.helper.set_model_props(proto, {METADATA_KEY: json.dumps(facts)})
        onnx.save(proto, target)

    with written_aside(path) as aside:
        save(aside, "float32")
        difference = check_export(OnnxClassifier(aside), model, plan.fixed)
        if int8:
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
                whole = Path(folder) / "float32.onnx"
                save(whole, "int8")
                quantise(whole, aside)
            difference = check_quantised(OnnxClassifier(aside), model, plan.fixed)
    return difference


def quantise(source: Path, target: Path) -> None:
    """Quantise the weights of matrix products to int8, with a scale per output, and activations at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(
            source,
            target,
            # The convolution stays in float32: it reads the pixels and is one thousandth of the work.
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )


def export_program(model: Any, path: str | Path, budget: Budget | None = None) -> float:
    """Write a file for `torch.export.load`; it is kept only if it gives the model's results.

    Args:
        model: The classifier.
        path: The file to write.
        budget: Budget to fix in the graph; None keeps the knobs as inputs if the model supports that.

    Returns:
        The largest difference of a logit.

    Raises:
        ValueError: If a graph cannot have the budget, the file cannot be written or its results are wrong.
    """
    path = Path(path)
    check_output(path)
    plan = model.as_graph(budget)
    program = trace_plan(plan, model.config)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of this machine
    facts = metadata(model.config, plan, "float32")
    with written_aside(path) as aside:
        torch.export.save(program, aside, extra_files={METADATA_KEY: json.dumps(facts)})
        return check_export(ProgramClassifier(aside), model, plan.fixed)


def export_timm(model: Any, folder: str | Path) -> float:
    """Write a folder in timm's format: weights with timm's names in safetensors, and timm's fields in config.json.

    Args:
        model: The classifier.
        folder: A new or empty folder; `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it.

    Returns:
        The largest difference of a logit.

    Raises:
        ValueError: If the folder is not empty, or timm's logits differ from the model's.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"Expected {folder} to be new or empty, got a folder with files.")
    fields = model.config.to_dict()
    config = {
        key: fields[key] for key in ("architecture", "num_classes", "num_features", "model_args", "pretrained_cfg")
    }
    prefix = f"{model.base_model_prefix}."  # timm's names do not have it
    state = {key.removeprefix(prefix): value.float().cpu().contiguous() for key, value in model.state_dict().items()}
    with folder_written_aside(folder) as aside:
        write_json(aside / "config.json", config)
        save_file(state, aside / "model.safetensors", metadata={"format": "pt"})
        return check_export(TimmClassifier(aside), model)


def check_output(path: Path) -> None:
    """Raise a `ValueError` unless a file of this name can be created."""
    check_writable(path)
    if not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"Expected a writable folder, got {str(path.absolute().parent)!r}.")


def check_size(model: nn.Module) -> None:
    """Raise a `ValueError` if the weights do not fit in one ONNX file."""
    size = sum(4 * p.numel() for p in model.parameters())
    if size > 2**31 - 2**24:
        raise ValueError(
            f"Expected weights of less than 2 GiB in float32, the limit of one ONNX file, got {size:,} bytes."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the hints that exporters and quantisers log."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
