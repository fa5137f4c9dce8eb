"""Run exported files with the model's interface: `classifier(pixel_values, **knobs)`."""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import timm
import torch

from hf_visual_perceiver.inference.loading import config_from_dict
from hf_visual_perceiver.modeling import Budget
from hf_visual_perceiver.modeling.elastic import check_pixel_values


METADATA_KEY = "visual_perceiver"  # key of our JSON in an ONNX file's metadata and in a torch.export archive


@dataclass(frozen=True)
class ExportedOutput:
    """The output of an exported classifier.

    Attributes:
        logits: (B, labels).
        records: The graph's other outputs, by name; they are also attributes.
    """

    logits: torch.Tensor
    records: dict[str, torch.Tensor]

    @property
    def used(self) -> torch.Tensor:
        """(B,) how much each image used, such as the number of queries."""
        record = next(iter(self.records.values()))
        return record if record.ndim == 1 else record.sum(1)

    def __getattr__(self, name: str) -> torch.Tensor:
        if name != "records" and name in self.records:
            return self.records[name]
        raise AttributeError(name)


class ExportedClassifier:
    """Base class of exported classifiers: the knobs with their defaults, and the checks that a graph cannot make.

    Attributes:
        config: The checkpoint's config.
        fixed: Knobs that are fixed in the graph, with their values.
        inputs: Names of the knobs that are inputs of the graph.
        outputs: Names of the graph's outputs, the logits first.
        precision: `"float32"` or `"int8"`.
        device: Device that the images have to be on.
        dtype: Dtype of the images.
    """

    suffix: ClassVar[str]
    device: ClassVar[torch.device] = torch.device("cpu")
    dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(self, path: Path, facts: str | None):
        try:
            values = json.loads(facts or "")
            self.config = config_from_dict(values["config"], str(path))
            self.inputs: list[str] = list(values["inputs"][1:])
            self.outputs: list[str] = list(values["outputs"])
            # Earlier versions stored only this knob, the only one that could be fixed.
            former = {"num_active_queries": values.get("num_active_queries")}
            self.fixed: dict[str, Any] = Budget(**values.get("fixed", former)).kwargs
            self.precision: str = values["precision"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Expected {path} to be written by `visual-perceiver export`, got a file without its metadata."
            ) from error

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor, **knobs: Any) -> ExportedOutput:
        """Classify images, as the model does; a knob that is None or missing has the checkpoint's default.

        Raises:
            ValueError: If the images or a knob are invalid for the model, or a knob is fixed to another value.
        """
        given = {name: value for name, value in knobs.items() if value is not None}
        resolved = self.config.resolve(**{**self.config.default_budget.kwargs, **self.fixed, **given})
        for name, value in self.config.resolve(**self.fixed).items():
            if name not in self.inputs and resolved[name] != value:
                raise ValueError(f"Expected `{name}` to be {value}, which is fixed in the graph, got {resolved[name]}.")
        check_pixel_values(pixel_values, self.config, advice="export a model loaded with `image_size=...`")
        values = self.run(pixel_values, {name: resolved[name] for name in self.inputs})
        logits, *records = (torch.as_tensor(value) for value in values)
        return ExportedOutput(logits, dict(zip(self.outputs[1:], records, strict=True)))

    def run(self, pixel_values: torch.Tensor, knobs: dict[str, Any]) -> Sequence[Any]:
        """Return the graph's outputs, given the knobs that are its inputs."""
        raise NotImplementedError


class OnnxClassifier(ExportedClassifier):
    """An ONNX file, run by ONNX Runtime.

    Args:
        path: The file.
        threads: Number of threads of ONNX Runtime; None is torch's number.

    Raises:
        ValueError: If the file is not ONNX, or was not exported by this package.
    """

    suffix = ".onnx"

    def __init__(self, path: str | Path, threads: int | None = None):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3  # errors
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # onnxruntime's exceptions have no other common base class.
        except Exception as error:
            raise ValueError(f"Cannot read {path} as an ONNX file: {str(error).splitlines()[0]}") from error
        super().__init__(Path(path), self.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY))

    def run(self, pixel_values: torch.Tensor, knobs: dict[str, Any]) -> Sequence[Any]:
        return self.session.run(None, numpy_inputs(pixel_values, knobs))


def numpy_inputs(pixel_values: torch.Tensor, knobs: dict[str, Any]) -> dict[str, np.ndarray]:
    """The inputs of an ONNX graph, by name."""
    return {"pixel_values": pixel_values.numpy(), **{name: _tensor(value).numpy() for name, value in knobs.items()}}


def _tensor(value: Any) -> torch.Tensor:
    """Convert a knob to a tensor: floats become float32, even whole ones; integers become int64."""
    return torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else torch.int64)


class ProgramClassifier(ExportedClassifier):
    """A torch.export file, interpreted operation by operation; its `module` can be passed to `torch.compile`.

    Args:
        path: The file.

    Raises:
        ValueError: If the file is not of torch.export, or was not exported by this package.
    """

    suffix = ".pt2"

    def __init__(self, path: str | Path):
        files = {METADATA_KEY: ""}
        if not zipfile.is_zipfile(path):  # torch would try an older format and log at length
            raise ValueError(f"Cannot read {path} as a torch.export file: it is not an archive.")
        try:
            program = torch.export.load(Path(path), extra_files=files)
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            raise ValueError(f"Cannot read {path} as a torch.export file: {str(error).splitlines()[0]}") from error
        super().__init__(Path(path), files[METADATA_KEY])
        self.module = program.module()

    def run(self, pixel_values: torch.Tensor, knobs: dict[str, Any]) -> Sequence[Any]:
        return self.module(pixel_values, *map(_tensor, knobs.values()))


class TimmClassifier:
    """A folder in timm's format, loaded by timm."""

    def __init__(self, folder: str | Path):
        self.model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor, **knobs: Any) -> ExportedOutput:
        return ExportedOutput(self.model(pixel_values, **knobs), {})


def load_exported(path: str | Path) -> ExportedClassifier:
    """Load an exported file; its suffix decides on the format.

    Raises:
        ValueError: If the file is not an exported one, or cannot be read.
    """
    for kind in (OnnxClassifier, ProgramClassifier):
        if Path(path).suffix == kind.suffix:
            if not Path(path).is_file():
                raise ValueError(f"Expected an exported file, got {str(path)!r}, which does not exist.")
            return kind(path)
    raise ValueError(f"Expected an exported file that ends in .onnx or .pt2, got {str(path)!r}.")
