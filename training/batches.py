"""Sources of a step's images: the device's memory, worker processes, or a stream."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from hf_visual_perceiver.data.images import BatchOrder, ImageDataset, ResizedImages, load_images, resize_transform
from hf_visual_perceiver.training.recipe import Recipe
from hf_visual_perceiver.training.stream import DecodedImages, StreamOrder


class Batch(NamedTuple):
    """This process's share of a step's images.

    Attributes:
        images: (b, 3, H, W) uint8.
        labels: (b,) int64.
        indices: (b,) indices of the images in the training set; None where they are not known, as in a stream.
        epoch: Epoch of the step, if the indices are known.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: np.ndarray | None = None
    epoch: int | None = None


class ResidentBatches:
    """Batches from a dataset that is kept on the device as uint8: nothing is decoded or copied from step to step.

    Iterating yields a `Batch` for each step.

    Args:
        data: Decoded images of one size.
        order: Which images make up each step.
        device: Device on which to keep them.
    """

    def __init__(self, data: ImageDataset, order: BatchOrder, device: torch.device):
        self.images = torch.from_numpy(data.images).permute(0, 3, 1, 2).contiguous().to(device)
        self.labels = torch.from_numpy(data.labels).to(device)
        self.order = order

    def __iter__(self) -> Iterator[Batch]:
        for keys in self.order:
            indices = np.array([index for _, _, index in keys])
            places = to_device(torch.from_numpy(indices), self.images.device)
            yield Batch(self.images[places], self.labels[places], indices, keys[0][1])

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return an empty dict: the order follows from the step."""
        return {}


class LoadedBatches:
    """Like `ResidentBatches`, for images that worker processes decode and resize.

    Args:
        images: A map-style dataset from an order's keys to (image, label), such as `ResizedImages`.
        order: A `BatchOrder` or `StreamOrder`.
        device: Device for the batches.
        workers: Number of worker processes; 0 loads in this process.
        collate: The DataLoader's `collate_fn`.
    """

    def __init__(self, images: Any, order: Any, device: torch.device, workers: int = 0, collate: Any = None):
        self.order, self.device = order, device
        self.loader = DataLoader(
            images,
            batch_sampler=order,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            collate_fn=collate,
        )

    def __iter__(self) -> Iterator[Batch]:
        for images, labels, *_ in self.loader:
            yield Batch(images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True))

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return the state that a stream needs to resume after `step` steps; empty for other orders."""
        return self.order.state_dict(step) if hasattr(self.order, "state_dict") else {}


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the host to the device without blocking the host."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def fits_in_memory(data: ImageDataset, image_size: tuple[int, int]) -> bool:
    """Whether the images are decoded in memory and already of the network's size."""
    return isinstance(data.images, np.ndarray) and data.images.shape[1:3] == image_size


@dataclass
class TrainingData:
    """The training and validation images of a run.

    Attributes:
        label_names: Class names, the same for both.
        validation: Held-out images; may be empty.
        training: Training images, decoded or to be decoded on access; None for a stream.
        order: Which images make up each step.
        recipe: Recipe of the run.
        device: Device for the batches.
    """

    label_names: list[str]
    validation: ImageDataset
    training: ImageDataset | None
    order: Any
    recipe: Recipe
    device: torch.device

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Resume a stream from the states of all processes in a checkpoint; other orders follow from the step.

        With a different number of processes the shares differ, so the stream starts at the next epoch.
        """
        if any(states):
            own = states[self.order.rank] if len(states) == self.order.world_size else states[0]
            self.order.load_state_dict(own, allow_other_world=True)

    def batches(self, first_step: int, size: tuple[int, int], interpolation: str) -> Any:
        """Return an iterable that yields a `Batch` on the device for each step from `first_step` on."""
        recipe = self.recipe
        self.order.first_step = first_step
        random_crop = recipe.augmentation.random_crop_padding is None
        transform = resize_transform(size, interpolation, random_crop)
        if self.training is None:
            images = DecodedImages(transform, recipe.seed, recipe.unreadable)
            return LoadedBatches(images, self.order, self.device, recipe.workers, images.collate)
        if fits_in_memory(self.training, size) and not random_crop:
            return ResidentBatches(self.training, self.order, self.device)
        return LoadedBatches(
            ResizedImages(self.training, transform, recipe.seed), self.order, self.device, recipe.workers
        )


def open_data(recipe: Recipe, device: torch.device, rank: int = 0, world_size: int = 1) -> TrainingData:
    """Load or open the recipe's training and validation data, for one of several processes.

    Raises:
        ValueError: If the dataset and the recipe do not fit together.
        FileNotFoundError: If the dataset looks like a path and does not exist.
    """
    place = {"rank": rank, "world_size": world_size}
    order: Any
    if recipe.streaming:
        order = StreamOrder(
            recipe.dataset,
            recipe.split,
            recipe.batch_size,
            recipe.seed,
            recipe.steps,
            shuffle_window=recipe.shuffle_window,
            repeats=recipe.augmentation.repeats,
            **place,
        )
        training, names = None, order.label_names
    else:
        data = load_images(recipe.dataset, recipe.split, recipe.cache_gib)
        names, held_out = data.label_names, 0 if recipe.validation_split else recipe.validation
        if not held_out < len(data):
            raise ValueError(f"Expected `validation` to be below the {len(data)} images, got {held_out}.")
        training, validation = data.split_off(held_out)
        order = BatchOrder(
            num_images=len(training),
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            repeats=recipe.augmentation.repeats,
            last_step=recipe.steps,
            **place,
        )
    if recipe.validation_split:
        validation = load_images(recipe.dataset, recipe.validation_split, recipe.cache_gib)
        if validation.label_names != names:
            raise ValueError(f"Expected the labels of {recipe.split} in {recipe.validation_split}, got others.")
        if 0 < recipe.validation < len(validation):
            validation = validation.split_off(recipe.validation)[1]
    elif recipe.streaming:
        validation = ImageDataset([], np.empty(0, dtype=np.int64), names)
    return TrainingData(names, validation, training, order, recipe, device)
