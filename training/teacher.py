"""Frozen teachers: any image classifier from transformers or timm."""

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification


class FrozenTeacher(nn.Module):
    """A frozen classifier that takes images in the student's normalisation.

    Args:
        model: A transformers image classifier, or a timm model.
        mean: Mean that the teacher normalises with.
        std: Standard deviation that the teacher normalises with.
        student: The student's `mean` and `std`.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, model: nn.Module, mean: Any, std: Any, student: dict[str, Any]):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        theirs, ours = (
            (torch.tensor(x["mean"]), torch.tensor(x["std"])) for x in ({"mean": mean, "std": std}, student)
        )
        # (x * our std + our mean - their mean) / their std, as one multiply-add.
        self.register_buffer("scale", (ours[1] / theirs[1]).view(1, 3, 1, 1))
        self.register_buffer("shift", ((ours[0] - theirs[0]) / theirs[1]).view(1, 3, 1, 1))

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stay in eval mode, whatever `mode` is."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) images, normalised for the student -> (B, labels) logits."""
        output = self.model(pixel_values * self.scale + self.shift)
        return getattr(output, "logits", output)


def load_teacher(
    name: str, label_names: list[str], image_size: tuple[int, int], preprocessing: dict[str, Any]
) -> FrozenTeacher:
    """Load a teacher and check that it fits the student.

    Args:
        name: A folder or Hub id that transformers loads as an image classifier, or the name of a timm model.
        label_names: The student's class names.
        image_size: The student's height and width.
        preprocessing: The student's `mean` and `std`.

    Raises:
        ValueError: If there is no such model, or it has other labels or another image size.
    """
    try:
        if not Path(name).is_dir() and timm.is_model(name):
            model: Any = timm.create_model(name, pretrained=True)
            cfg, names = model.pretrained_cfg, None
            size, mean, std = tuple(cfg["input_size"][1:]), cfg["mean"], cfg["std"]
            num_labels = model.num_classes
        else:
            model = AutoModelForImageClassification.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
            processor: Any = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
            if hasattr(processor, "data_config"):  # transformers' wrapper of timm's models
                cfg = processor.data_config
                size, mean, std = tuple(cfg["input_size"][1:]), cfg["mean"], cfg["std"]
            else:
                size, mean, std = _height_width(processor), processor.image_mean, processor.image_std
            num_labels = model.config.num_labels
            names = [model.config.id2label[i] for i in range(num_labels)]
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"Expected `teacher.model` to be a folder or Hub id of an image classifier or a timm model, got {name!r}: {reason}"
        ) from error
    if num_labels != len(label_names):
        raise ValueError(
            f"Expected a teacher with the dataset's {len(label_names)} labels, got {num_labels} in {name}."
        )
    generic = names is None or all(label.startswith("LABEL_") for label in names)
    if not generic and names != label_names:
        i = next(i for i, pair in enumerate(zip(names or [], label_names, strict=True)) if pair[0] != pair[1])
        raise ValueError(
            f"Expected a teacher with the dataset's labels, got {names[i]!r} for {label_names[i]!r} in {name}."  # type: ignore[index]
        )
    if size != image_size:
        raise ValueError(
            f"Expected a teacher for {'x'.join(map(str, image_size))} images, got {'x'.join(map(str, size))} in {name}."
        )
    return FrozenTeacher(model, mean, std, preprocessing)


def _height_width(processor: Any) -> tuple[int, int]:
    size = processor.size
    if "height" in size:
        return size["height"], size["width"]
    return size["shortest_edge"], size["shortest_edge"]
