"""A teacher's logits on a fixed set of augmented views of the training images, computed once and read from a file.

Epoch e uses view e mod V of every image, so a step needs no pass through the teacher. The teacher's logits are of the
same view that the student gets, because of "Knowledge distillation: A good teacher is patient and consistent" (Beyer et
al. 2022).
"""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from hf_visual_perceiver.data.images import ImageDataset
from hf_visual_perceiver.training.augmentation import BatchAugmentation, Draws
from hf_visual_perceiver.training.recipe import Augmentation
from hf_visual_perceiver.training.teacher import FrozenTeacher
from hf_visual_perceiver.utils.console import tracked
from hf_visual_perceiver.utils.files import folder_written_aside, write_json


FACTS, LOGITS = "cache.json", "logits.npy"
# Random seed of the views; the same for every run, so that runs with different seeds share a cache.
VIEW_SEED = 0


class TeacherCache:
    """Augmented views of the training images and a teacher's logits on them.

    `open_cache` opens one that `create_cache` wrote.

    Args:
        augment: Function that makes a view.
        image_size: Height and width.
        logits: (V, n, labels) float16.
    """

    def __init__(self, augment: BatchAugmentation, image_size: tuple[int, int], logits: np.ndarray):
        self.augment, self.image_size, self.logits = augment, image_size, logits
        self._view = -1
        self._draws: Draws | None = None

    def draws(self, epoch: int) -> Draws:
        """The random draws of each of the n images in this epoch."""
        view = epoch % len(self.logits)
        if view != self._view or self._draws is None:
            self._draws = view_draws(self.augment, view, self.logits.shape[1], self.image_size)
            self._view = view
        return self._draws

    def batch(
        self, images: torch.Tensor, labels: torch.Tensor, indices: np.ndarray, epoch: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Make the views of some of the images in an epoch.

        Args:
            images: (B, 3, H, W) uint8.
            labels: (B,) int64.
            indices: (B,) indices of the images in the training set.
            epoch: Epoch of the run.

        Returns:
            `pixel_values` (B, 3, H, W), targets (B, labels) and the teacher's logits (B, labels), all float32.
        """
        pixel_values, targets = self.augment.apply(images, labels, self.draws(epoch)[indices])
        taught = torch.from_numpy(self.logits[epoch % len(self.logits)][indices].astype(np.float32))
        return pixel_values, targets, taught.to(pixel_values.device)


def view_draws(augment: BatchAugmentation, view: int, num_images: int, image_size: tuple[int, int]) -> Draws:
    """The random draws of each image in a view, a function of the view alone."""
    draws = augment.draw(view, num_images, *image_size)
    if augment.augmentation.alternating_flip:
        draws = dataclasses.replace(draws, flip=augment.flipped_at_first ^ bool(view % 2))
    return draws


def cache_facts(
    teacher: FrozenTeacher, augmentation: Augmentation, preprocessing: dict[str, Any], data: ImageDataset, views: int
) -> dict[str, Any]:
    """Everything that a cache depends on, as plain values; caches with equal facts are interchangeable."""
    weights = hashlib.blake2b(digest_size=16)
    for name, value in sorted(teacher.state_dict().items()):
        weights.update(
            name.encode() + value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    pixels = hashlib.blake2b(np.ascontiguousarray(data.images).data, digest_size=16)
    pixels.update(data.labels.tobytes())
    return {
        "views": views,
        "images": len(data),
        "image_size": list(data.images.shape[1:3]),
        "label_names": data.label_names,
        "images_hash": pixels.hexdigest(),
        "teacher_hash": weights.hexdigest(),
        # Label smoothing only changes the targets.
        "augmentation": {k: v for k, v in dataclasses.asdict(augmentation).items() if k != "label_smoothing"},
        "preprocessing": {key: list(preprocessing[key]) for key in ("mean", "std")},
    }


def open_cache(folder: str | Path, facts: dict[str, Any], augment: BatchAugmentation) -> TeacherCache:
    """Open a cache as a memory map.

    Args:
        folder: Folder that `create_cache` wrote.
        facts: Facts that the cache must match, from `cache_facts`; it may hold more views.
        augment: Function that makes a view, from `view_augmentation`.

    Raises:
        ValueError: If the folder holds no complete cache, or one with other facts; the message names the first of them.
    """
    folder = Path(folder)
    try:
        made = dict(json.loads((folder / FACTS).read_text()))
        logits = np.load(folder / LOGITS, mmap_mode="r")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"Expected a teacher's cached answers in {folder}, got: {error}") from error
    for key, expected in facts.items():
        given = made.get(key)
        if key == "views":
            if not isinstance(given, int) or given < expected:
                raise ValueError(f"Expected at least {expected} views in the cache {folder}, got {given}.")
        elif given != expected:
            raise ValueError(
                f"Expected the cache {folder} to be made with this run's `{key}`, {expected!r}, got {given!r}. "
                "Another folder as `teacher.cache` makes a new one."
            )
    shape = (made["views"], facts["images"], len(facts["label_names"]))
    if logits.shape != shape or logits.dtype != np.float16:
        raise ValueError(
            f"Expected {LOGITS} of shape {shape} in float16 in {folder}, got {logits.shape} {logits.dtype}."
        )
    return TeacherCache(augment, (facts["image_size"][0], facts["image_size"][1]), logits[: facts["views"]])


@torch.no_grad()
def create_cache(
    folder: str | Path,
    facts: dict[str, Any],
    augment: BatchAugmentation,
    teacher: FrozenTeacher,
    data: ImageDataset,
    accelerator: Accelerator,
    batch_size: int = 500,
) -> None:
    """Compute and write a cache; the folder is written atomically. Progress is shown on stderr.

    Args:
        folder: A folder that does not exist.
        facts: Facts to store with the cache, from `cache_facts`.
        augment: Function that makes a view, from `view_augmentation`.
        teacher: The teacher.
        data: The training images, decoded and of one size.
        accelerator: Determines the device and the precision.
        batch_size: Number of images per forward pass.
    """
    n, size = len(data), (data.images.shape[1], data.images.shape[2])
    teacher.to(accelerator.device)
    with folder_written_aside(folder) as aside:
        shape = (facts["views"], n, len(data.label_names))
        logits = np.lib.format.open_memmap(aside / LOGITS, mode="w+", dtype=np.float16, shape=shape)
        batches = list(itertools.product(range(facts["views"]), range(0, n, batch_size)))
        for view, first in tracked(batches, "the teacher's answers, batches"):
            if first == 0:
                draws = view_draws(augment, view, n, size)
            chosen = np.arange(first, min(first + batch_size, n))
            images = torch.from_numpy(data.images[chosen]).permute(0, 3, 1, 2).contiguous()
            labels = torch.from_numpy(data.labels[chosen])
            pixel_values, _ = augment.apply(images.to(accelerator.device), labels.to(accelerator.device), draws[chosen])
            with accelerator.autocast():
                answers = teacher(pixel_values)
            logits[view, chosen] = answers.float().cpu().numpy()
        logits.flush()
        write_json(aside / FACTS, facts)


def view_augmentation(
    augmentation: Augmentation, num_labels: int, preprocessing: dict[str, Any], num_images: int
) -> BatchAugmentation:
    """The augmentation that makes views: that of a run, but with the seed of the views."""
    mean, std = preprocessing["mean"], preprocessing["std"]
    return BatchAugmentation(augmentation, num_labels, mean, std, VIEW_SEED, num_images=num_images)
