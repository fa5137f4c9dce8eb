"""Where a step's images come from: the device's memory, worker processes, or a stream."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from .data import BatchOrder, ImageDataset


class ResidentBatches:
    """Batches of images that all lie on the device, as uint8: nothing is decoded or copied from step to step.

    Iterating yields the images (b, 3, H, W) uint8 and labels (b,) of this process's share of each step.

    Args:
        data: Decoded images of one size.
        order: Which images make up each step.
        device: Where they are to lie.
    """

    def __init__(self, data: ImageDataset, order: BatchOrder, device: torch.device):
        self.images = torch.from_numpy(data.images).permute(0, 3, 1, 2).contiguous().to(device)
        self.labels = torch.from_numpy(data.labels).to(device)
        self.order = order

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for keys in self.order:
            indices = to_device(torch.tensor([index for _, _, index in keys]), self.images.device)
            yield self.images[indices], self.labels[indices]

    def state_dict(self, step: int) -> dict[str, Any]:
        """Nothing: the order follows from the step."""
        return {}


class LoadedBatches:
    """As `ResidentBatches`, of images that worker processes decode and bring to size.

    Args:
        images: A map from an order's keys to (image, label), such as `ResizedImages`.
        order: A `BatchOrder` or `StreamOrder`.
        device: Where the batches go.
        workers: Number of processes; 0 is this one.
        collate: For the DataLoader.
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

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels, *_ in self.loader:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def state_dict(self, step: int) -> dict[str, Any]:
        """What a stream needs to go on after `step` steps; nothing for other orders."""
        return self.order.state_dict(step) if hasattr(self.order, "state_dict") else {}


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy from the host that does not make it wait."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def fits_in_memory(data: ImageDataset, image_size: tuple[int, int]) -> bool:
    """Whether the images are decoded and of the network's size."""
    return isinstance(data.images, np.ndarray) and data.images.shape[1:3] == image_size
