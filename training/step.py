"""The forward and backward pass of a training step."""

import contextlib
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3

from hf_visual_perceiver.modeling import Pass
from hf_visual_perceiver.training.recipe import Recipe
from hf_visual_perceiver.training.schedules import Schedule
from hf_visual_perceiver.training.teacher import FrozenTeacher


def forward_backward(
    accelerator: Accelerator,
    model: torch.nn.Module,
    pixel_values: torch.Tensor,
    targets: torch.Tensor,
    passes: list[Pass],
    schedule: Schedule,
    recipe: Recipe,
    teacher: FrozenTeacher | None = None,
    average: ModelEmaV3 | None = None,
    teacher_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the gradients of a step, in micro-batches if the recipe says so; return the (2,) losses of `Objective`.

    `teacher_logits`, (B, labels), are the teacher's logits if they are cached.
    """
    objective: Any = accelerator.unwrap_model(model)
    B = len(pixel_values)
    size = recipe.micro_batch_size or B
    losses = torch.zeros(2, device=pixel_values.device)
    for first in range(0, B, size):
        part = slice(first, min(first + size, B))
        averaged = None
        taught = None if teacher_logits is None else teacher_logits[part]
        with accelerator.autocast(), torch.no_grad():
            if teacher is not None:
                taught = teacher(pixel_values[part])
            if average is not None and schedule.distils and recipe.students.teacher == "ema":
                averaged = average.module.forward_budgets(pixel_values[part], passes[:1])[0]
        # Processes synchronise gradients once, with the last micro-batch.
        last = part.stop == B
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            parts = model(pixel_values[part], targets[part], passes, schedule.distils, taught, averaged)
            share = (part.stop - first) / B
            accelerator.backward(objective.total_loss(parts) * share)
        losses += parts.detach() * share
    return losses


def check_batch(recipe: Recipe, schedule: Schedule, num_processes: int) -> None:
    """Raise a `ValueError` unless each process and micro-batch can split its images into the schedule's groups."""
    multiple = 2 * num_processes * schedule.groups
    if recipe.batch_size % multiple:
        raise ValueError(
            f"Expected `batch_size` to be a multiple of {multiple} (pairs of images x processes x groups of the schedule), "
            f"got {recipe.batch_size}."
        )
    if recipe.micro_batch_size is not None and recipe.micro_batch_size % schedule.groups:
        raise ValueError(
            f"Expected `micro_batch_size` to be a multiple of the schedule's {schedule.groups} groups, "
            f"got {recipe.micro_batch_size}."
        )
