"""Stages of a network as ONNX graphs without weights, and ONNX Runtime sessions that run them with a network's weights.

A graph depends only on the network's sizes; ONNX Runtime takes the weights from memory. A graph therefore takes about
50 KB, is exported once per architecture, and serves every checkpoint and fine-tuned copy.
"""

import hashlib
import json
import logging
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


FORMAT = 5  # version of the files; graphs of another version are exported again
INDEX = "graphs.json"


@dataclass(frozen=True)
class Stage:
    """A part of a network to export.

    Attributes:
        module: Maps tensors to tensors; its parameters are the network's, with the same names.
        inputs: Example inputs, by name. Sizes that may vary should be larger than 1.
        dynamic: For each input, the names of the dimensions that may vary, by their index: {0: "images"}.
        outputs: Names of the outputs.
    """

    module: nn.Module
    inputs: dict[str, torch.Tensor]
    dynamic: dict[str, dict[int, str]]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """An exported stage.

    Attributes:
        content: The ONNX file, without weights.
        weights: Names of the weights that it needs.
    """

    content: bytes
    weights: tuple[str, ...]


def import_onnxruntime() -> Any:
    """Import the module `onnxruntime`.

    Raises:
        ImportError: If it is not installed; the message says what to install.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            "Expected onnxruntime to be installed for the optimised form: `pip install onnxruntime`. "
            '`optimize_for_inference(backend="torch")` does not need it.'
        ) from error
    return onnxruntime


def checked_threads(num_threads: int | None) -> int:
    """Return the number of threads of a call; None is torch's number.

    Raises:
        ValueError: If it is not an integer of at least 1.
    """
    threads = torch.get_num_threads() if num_threads is None else num_threads
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"Expected `num_threads` to be an integer of at least 1, got {num_threads!r}.")
    return threads


def export_stage(stage: Stage) -> Graph:
    """Export the graph of a stage.

    Raises:
        ImportError: If `onnx` or `onnxscript` is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (what torch exports with)
    except ImportError as error:
        raise ImportError(
            "Expected onnx and onnxscript to be installed for exporting graphs: `pip install onnx onnxscript`."
        ) from error
    dims: dict[str, Any] = {}
    shapes = {
        name: {axis: dims.setdefault(dim, torch.export.Dim(dim, min=1)) for axis, dim in stage.dynamic[name].items()}
        for name in stage.inputs
    }
    # torch warns at length about everything that it skips.
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # At first use of a budget the caller may be in a mode that would be traced, or that forbids tracing.
        modes = torch.inference_mode(False), torch.autocast("cpu", enabled=False)
        with warnings.catch_warnings(), modes[0], modes[1], torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                stage.module, tuple(stage.inputs.values()), dynamic_shapes=tuple(shapes.values())
            )
            exported = torch.onnx.export(
                program,
                input_names=list(stage.inputs),
                output_names=list(stage.outputs),
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    finally:
        logging.disable(level)
    assert exported is not None
    model = exported.model_proto
    parameters = {name for name, _ in stage.module.named_parameters()} | {
        name for name, _ in stage.module.named_buffers()
    }
    weights = []
    for tensor in model.graph.initializer:
        tensor.doc_string = ""
        if tensor.name in parameters:
            weights.append(tensor.name)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            del tensor.external_data[:]
            tensor.external_data.add(key="location", value="weights")
    # Remove the nodes' source locations, which take more space than the nodes themselves.
    del model.graph.metadata_props[:], model.graph.value_info[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    return Graph(model.SerializeToString(), tuple(weights))


def graphs_of(stages: Mapping[str, Stage], architecture: dict[str, Any], folders: Sequence[Path]) -> dict[str, Graph]:
    """Get the graphs of a network's stages from the first of `folders` that has them, or else export them.

    Exported graphs are saved in the last of `folders`.

    Args:
        stages: Stages by name.
        architecture: Plain values that determine the graphs.
        folders: Folders in which to look for graphs.
    """
    key = graphs_key(architecture)
    for folder in folders:
        found = read_graphs(folder, key, stages)
        if found is not None:
            return found
    graphs = {name: export_stage(stage) for name, stage in stages.items()}
    if folders:
        try:
            write_graphs(folders[-1], key, graphs)
        except OSError as error:
            logging.getLogger(__name__).warning("Cannot cache the exported graphs in %s: %s", folders[-1], error)
    return graphs


def graphs_key(architecture: dict[str, Any]) -> str:
    """A hash of everything that the graphs depend on."""
    return hashlib.sha256(json.dumps([FORMAT, architecture], sort_keys=True).encode()).hexdigest()[:32]


def read_graphs(folder: Path, key: str, stages: Mapping[str, Stage]) -> dict[str, Graph] | None:
    """Read the graphs in a folder; None if they are missing, damaged, or belong to another architecture."""
    try:
        index = json.loads((folder / INDEX).read_text())
        if index["key"] != key or set(index["stages"]) != set(stages):
            return None
        graphs = {
            name: Graph((folder / f"{name}.onnx").read_bytes(), tuple(facts["weights"]))
            for name, facts in index["stages"].items()
        }
        whole = all(_sha256(graph) == index["stages"][name]["sha256"] for name, graph in graphs.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return graphs if whole else None


def write_graphs(folder: Path, key: str, graphs: Mapping[str, Graph]) -> None:
    """Write graphs and then the index, so that an incomplete folder has no index and is ignored."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, graph in graphs.items():
        _write(folder / f"{name}.onnx", graph.content)
    facts = {name: {"sha256": _sha256(graph), "weights": list(graph.weights)} for name, graph in graphs.items()}
    _write(folder / INDEX, (json.dumps({"key": key, "stages": facts}, indent=1) + "\n").encode())


def _sha256(graph: Graph) -> str:
    return hashlib.sha256(graph.content + "\0".join(graph.weights).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(content)
    os.replace(aside, path)


def cache_folder(architecture: dict[str, Any]) -> Path:
    """The folder of exported graphs on this machine: in HF_HOME, which is ~/.cache/huggingface by default."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "hf_visual_perceiver" / "graphs" / graphs_key(architecture)


class Sessions:
    """ONNX Runtime sessions with the weights of a network, one session per stage.

    Sessions are created at first use in each process, so that the object can be pickled, copied and used after a fork.

    Args:
        graphs: Graphs by name, from `export_stage`.
        weights: Weights by name; they are copied.
        num_threads: Number of threads per call; None is torch's number.
        int8: Quantise the weights of linear layers to 8 bits, and their inputs at run time.
        make: Makes a graph that is not among `graphs`, from its name, when it is first used.

    Raises:
        ValueError: If the number of threads is not at least 1.
        ImportError: If onnxruntime is not installed, or with `int8` onnx.
    """

    def __init__(
        self,
        graphs: Mapping[str, Graph],
        weights: Mapping[str, torch.Tensor],
        num_threads: int | None = None,
        int8: bool = False,
        make: Callable[[str], Graph] | None = None,
    ):
        import_onnxruntime()
        self.make = make
        self.num_threads, self.int8 = checked_threads(num_threads), int8
        self.graphs = dict(graphs)
        self.weights = {name: value.detach().cpu().numpy().copy() for name, value in weights.items()}
        if int8:
            self.graphs = {name: quantised(graph, self.weights) for name, graph in self.graphs.items()}
        self._reset()

    def _reset(self) -> None:
        self._lock, self._process = threading.Lock(), os.getpid()
        self._sessions: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def outputs(self, stage: str) -> list[str]:
        """Names of a stage's outputs."""
        return [output.name for output in self.session(stage).get_outputs()]

    def session(self, stage: str) -> Any:
        """The session of a stage.

        Raises:
            ValueError: If onnxruntime cannot load its graph.
        """
        if self._process != os.getpid():  # a forked process has the sessions but not their threads
            self._reset()
        with self._lock:
            if stage not in self._sessions:
                self._sessions[stage] = self._create(stage)
            return self._sessions[stage]

    def _create(self, stage: str) -> Any:
        onnxruntime = import_onnxruntime()
        if stage not in self.graphs and self.make is not None:
            made = self.make(stage)
            self.graphs[stage] = quantised(made, self.weights) if self.int8 else made
        graph = self.graphs[stage]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.num_threads, 1
        options.log_severity_level = 3
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(self.weights[name]) for name in graph.weights]
        if values:
            options.add_external_initializers(list(graph.weights), values)
        try:
            return onnxruntime.InferenceSession(graph.content, options, providers=["CPUExecutionProvider"])
        # onnxruntime's exceptions have no other common base class.
        except Exception as error:
            raise ValueError(
                f"Expected the graph of stage {stage} to load in onnxruntime {onnxruntime.__version__}, got: "
                f"{str(error).splitlines()[0]} A newer onnxruntime may load it."
            ) from error

    def run(self, stage: str, outputs: Sequence[str] | None = None, **inputs: np.ndarray) -> list[np.ndarray]:
        """Run a stage and return all outputs, or those with these names; safe to call from several threads."""
        return self.session(stage).run(outputs, inputs)


def quantised(graph: Graph, weights: Mapping[str, np.ndarray]) -> Graph:
    """Embed the weights in a graph, with linear layers quantised to 8 bits.

    Raises:
        ImportError: If `onnx` is not installed.
    """
    try:
        import onnx
        from onnx import numpy_helper
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise ImportError("Expected onnx to be installed for quantising: `pip install onnx`.") from error
    import tempfile

    model = onnx.load_from_string(graph.content)
    for tensor in model.graph.initializer:
        if tensor.name in graph.weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    fold_transposes(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "int8.onnx"
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            quantize_dynamic(
                model,
                file,
                weight_type=QuantType.QInt8,
                per_channel=True,
                op_types_to_quantize=["MatMul"],
                extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
            )
        finally:
            logging.disable(level)
        return Graph(file.read_bytes(), ())


def fold_transposes(model: Any) -> None:
    """Replace transposes of two-dimensional weights by transposed weights, as quantisation only finds plain weights."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in list(model.graph.node):
        swaps = node.op_type == "Transpose" and list(node.attribute[0].ints) == [1, 0]
        if swaps and node.input[0] in tensors:
            value = numpy_helper.to_array(tensors[node.input[0]]).T
            model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), node.output[0]))
            model.graph.node.remove(node)
