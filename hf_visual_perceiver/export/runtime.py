"""Exported files, called as the model is: `classifier(pixel_values, num_active_queries=K, dqs_threshold=t)`."""

import json
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import timm
import torch

from hf_visual_perceiver.modeling import VisualPerceiverConfig
from hf_visual_perceiver.modeling.modeling_visual_perceiver import (
    VisualPerceiverImageClassifierOutput,
    check_pixel_values,
)


METADATA_KEY = "visual_perceiver"  # of the JSON in an ONNX file's metadata, and in a torch.export archive


class ExportedClassifier:
    """What the forms have in common: the knobs and their defaults, the checks, which a graph cannot make.

    Attributes:
        config: The checkpoint's.
        num_active_queries: K, if it is fixed in the graph.
        precision: `"float32"` or `"int8"`.
        device: Where the images have to be.
        dtype: Dtype of the images.
    """

    suffix: ClassVar[str]
    device: ClassVar[torch.device] = torch.device("cpu")
    dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(self, path: Path, facts: str | None):
        try:
            values = json.loads(facts or "")
            self.config: VisualPerceiverConfig = VisualPerceiverConfig.from_dict(values["config"])
            self.num_active_queries: int | None = values["num_active_queries"]
            self.precision: str = values["precision"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Expected {path} to be written by `visual-perceiver export`; its metadata is not."
            ) from error

    @torch.inference_mode()
    def __call__(
        self, pixel_values: torch.Tensor, num_active_queries: int | None = None, dqs_threshold: float | None = None
    ) -> VisualPerceiverImageClassifierOutput:
        """Classify images, as `VisualPerceiverForImageClassification` does; None is the checkpoint's own setting.

        Raises:
            ValueError: If the images, K or the threshold are not as described there, or K is fixed to another number.
        """
        fixed = self.num_active_queries
        K, t = self.config.operating_point(fixed if num_active_queries is None else num_active_queries, dqs_threshold)
        if fixed is not None and fixed != K:
            raise ValueError(f"Expected `num_active_queries` to be {fixed}, which is fixed in the graph, got {K}.")
        check_pixel_values(pixel_values, self.config, advice="export a model loaded with `image_size=...`")
        # Cosines end at 1: nothing is above.
        logits, active = self.run(pixel_values, 1.0 if t is None else t, K if fixed is None else None)
        return VisualPerceiverImageClassifierOutput(logits=logits, active_queries=active)

    def run(self, pixel_values: torch.Tensor, t: float, K: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and active queries; K is None where it is fixed."""
        raise NotImplementedError


class OnnxClassifier(ExportedClassifier):
    """An ONNX file in ONNX Runtime.

    Args:
        path: The file.
        threads: Number of ONNX Runtime's threads; None is torch's number.

    Raises:
        ValueError: If it is no ONNX file, or of another model.
    """

    suffix = ".onnx"

    def __init__(self, path: str | Path, threads: int | None = None):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3  # errors
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # onnxruntime's exceptions have no common class but this.
        except Exception as error:
            raise ValueError(f"Cannot read {path} as an ONNX file: {str(error).splitlines()[0]}") from error
        super().__init__(Path(path), self.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY))

    def run(self, pixel_values: torch.Tensor, t: float, K: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        logits, active = self.session.run(None, numpy_inputs(pixel_values, t, K))
        return torch.from_numpy(logits), torch.from_numpy(active)


def numpy_inputs(pixel_values: torch.Tensor, t: float, K: int | None) -> dict[str, np.ndarray]:
    """The inputs of an ONNX graph."""
    inputs = {"pixel_values": pixel_values.numpy(), "dqs_threshold": np.asarray(t, np.float32)}
    return inputs if K is None else {**inputs, "num_active_queries": np.asarray(K, np.int64)}


class ProgramClassifier(ExportedClassifier):
    """A file of torch.export, interpreted operation by operation; `module` is what `torch.compile` would take.

    Args:
        path: The file.

    Raises:
        ValueError: If it is no such file, or of another model.
    """

    suffix = ".pt2"

    def __init__(self, path: str | Path):
        files = {METADATA_KEY: ""}
        if not zipfile.is_zipfile(path):  # torch tries an older format then, and logs at length
            raise ValueError(f"Cannot read {path} as a file of torch.export: it is no archive.")
        try:
            program = torch.export.load(Path(path), extra_files=files)
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            raise ValueError(f"Cannot read {path} as a file of torch.export: {str(error).splitlines()[0]}") from error
        super().__init__(Path(path), files[METADATA_KEY])
        self.module = program.module()

    def run(self, pixel_values: torch.Tensor, t: float, K: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        knobs: list[Any] = [torch.tensor(t)] if K is None else [torch.tensor(t), torch.tensor(K)]
        return self.module(pixel_values, *knobs)


class TimmClassifier:
    """A folder in timm."""

    num_active_queries: ClassVar[int | None] = None

    def __init__(self, folder: str | Path):
        self.model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        self.config = self.model.config

    @torch.inference_mode()
    def __call__(
        self, pixel_values: torch.Tensor, num_active_queries: int, dqs_threshold: float
    ) -> VisualPerceiverImageClassifierOutput:
        return VisualPerceiverImageClassifierOutput(logits=self.model(pixel_values, num_active_queries, dqs_threshold))


def load_exported(path: str | Path) -> ExportedClassifier:
    """An exported file, by its suffix.

    Raises:
        ValueError: If it is none, or cannot be read.
    """
    for kind in (OnnxClassifier, ProgramClassifier):
        if Path(path).suffix == kind.suffix:
            if not Path(path).is_file():
                raise ValueError(f"Expected an exported file, got {str(path)!r}, which is not there.")
            return kind(path)
    raise ValueError(f"Expected an exported file that ends in .onnx or .pt2, got {str(path)!r}.")
