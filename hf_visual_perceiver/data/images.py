"""Images for training and evaluation: loading, decoding, resizing, normalisation and the order of batches."""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from datasets.utils.file_utils import xopen
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

from hf_visual_perceiver.data.image_processor import RESAMPLING
from hf_visual_perceiver.data.splits import open_split
from hf_visual_perceiver.modeling.handler import open_image


# Preferred column names if several columns qualify. CIFAR-100 calls its 100 classes fine_label.
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")


@dataclass
class ImageDataset:
    """Labelled images: decoded, (n, H, W, 3) uint8, or encoded in a `datasets.Dataset` and decoded at each use."""

    images: Any
    labels: np.ndarray
    label_names: list[str]

    def __post_init__(self) -> None:
        # Images are decoded by `open_image`, as everywhere in this package.
        if isinstance(self.images, datasets.Dataset) and self.images.features["image"].decode:
            self.images = self.images.cast_column("image", datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Return one image, in RGB."""
        if isinstance(self.images, np.ndarray):
            return Image.fromarray(self.images[index])
        return _decode(self.images, int(index), "the dataset")

    def subset(self, indices: slice | np.ndarray) -> "ImageDataset":
        """Select images by a slice, without copying decoded pixels, or by indices (n,), with a copy."""
        if isinstance(self.images, np.ndarray):
            images = self.images[indices]
        else:
            images = self.images.select(np.arange(len(self))[indices])
        return ImageDataset(images, self.labels[indices], self.label_names)

    def split_off(self, count: int) -> tuple["ImageDataset", "ImageDataset"]:
        """Split off `count` images; returns the rest and these.

        They are the last images, or evenly spaced ones if the dataset is sorted by class: the last images of an
        imagefolder would all be of its last class.
        """
        n = len(self)
        if 0 < count < n and (np.diff(self.labels) >= 0).all():
            chosen = (np.arange(count) + 1) * n // count - 1
            return self.subset(np.setdiff1d(np.arange(n), chosen)), self.subset(chosen)
        return self.subset(slice(None, n - count)), self.subset(slice(n - count, None))


def load_images(dataset: str, split: str = "train", cache_gib: float = 8.0) -> ImageDataset:
    """Load a labelled image dataset.

    Images are decoded once and kept as uint8 if all have the same size and they fit in `cache_gib`; otherwise they are
    decoded at each use.

    Args:
        dataset: A folder of parquet files, a single parquet file, an imagefolder, or a Hub id. `splits.open_split` says
            which files of a folder are a split.
        split: Name of the split, or a part of it such as `test[:200]`.
        cache_gib: GiB that the decoded images may take in memory.

    Raises:
        ValueError: If the dataset has no such split, no image or no label column, or an unreadable image.
        FileNotFoundError: If `dataset` looks like a path and does not exist.
    """
    table = load_table(dataset, split)
    image_column, label_column = _find_columns(table, dataset)
    label_feature = table.features[label_column]
    if len(table) == 0:
        raise ValueError(f"Expected images in split {split!r} of {dataset}, got none.")
    values = table[label_column][:]
    if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        odd = next(v for v in values if isinstance(v, bool) or not isinstance(v, int))
        raise ValueError(f"Expected integers in column {label_column!r} of {dataset}, got {odd!r}.")
    labels = np.asarray(values, dtype=np.int64)
    if hasattr(label_feature, "names"):
        names = list(label_feature.names)
    else:
        names = [str(i) for i in range(int(labels.max()) + 1)]
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(
            f"Expected labels in [0, {len(names)}) in {dataset}, got {labels.min()} to {labels.max()}; "
            "unlabelled splits have -1."
        )
    table = table.select_columns([image_column])
    if image_column != "image":
        table = table.rename_column(image_column, "image")
    table = table.cast_column("image", datasets.Image(decode=False))
    first = _decode(table, 0, dataset)
    size = len(table) * first.size[0] * first.size[1] * 3
    decoded = _decode_all(table, first.size, dataset) if size <= cache_gib * 2**30 else None
    return ImageDataset(table if decoded is None else decoded, labels, names)


def load_table(dataset: str, split: str) -> datasets.Dataset:
    """Load the undecoded table of one split; see `load_images` for the arguments."""
    try:
        return open_split(dataset, split)
    except ValueError as error:
        raise ValueError(f"Cannot load split {split!r} of {dataset}: {error}") from error


def _find_columns(table: datasets.Dataset, dataset: str) -> tuple[str, str]:
    features = table.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise ValueError(f"Expected an image column in {dataset}, got columns {', '.join(features)}.")
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels += [name for name in LABEL_COLUMNS if name in features and name not in labels]
    if not labels:
        raise ValueError(f"Expected a label column in {dataset}, got columns {', '.join(features)}.")
    return _choose("image", images, IMAGE_COLUMNS, dataset), _choose("label", labels, LABEL_COLUMNS, dataset)


def _choose(kind: str, columns: list[str], usual: Sequence[str], dataset: str) -> str:
    """Choose the only column of this kind, or the first one with a usual name."""
    if len(columns) == 1:
        return columns[0]
    if named := [name for name in usual if name in columns]:
        return named[0]
    raise ValueError(
        f"Expected one {kind} column in {dataset}, or one called {' or '.join(usual)}, got {', '.join(columns)}."
    )


def _decode(table: datasets.Dataset, index: int, dataset: str) -> Image.Image:
    encoded = table[index]["image"] or {"bytes": None, "path": None}
    try:
        if encoded["bytes"] is not None:
            return open_image(encoded["bytes"])
        if encoded["path"] is None:
            raise ValueError("the image is missing.")
        with xopen(encoded["path"], "rb") as file:
            return open_image(file)
    except (OSError, ValueError) as error:
        path = encoded["path"]
        raise ValueError(f"Cannot read image {index} of {dataset}{f' ({path})' if path else ''}: {error}") from error


def _decode_all(table: datasets.Dataset, size: tuple[int, int], dataset: str) -> np.ndarray | None:
    """Decode all images to one uint8 array; None if an image has another size."""
    pixels = np.empty((len(table), size[1], size[0], 3), dtype=np.uint8)
    for i in range(len(table)):
        image = _decode(table, i, dataset)
        if image.size != size:
            return None
        pixels[i] = np.asarray(image)
    return pixels


def normalise(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Convert uint8 images (B, H, W, 3) to `pixel_values` (B, 3, H, W), as an image processor without resizing does."""
    x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def pixels_of_size(
    data: ImageDataset, indices: range, size: tuple[int, int], interpolation: str = "bicubic"
) -> np.ndarray:
    """Return uint8 images (B, H, W, 3) of the given (height, width); images of another size are resized."""
    if isinstance(data.images, np.ndarray) and data.images.shape[1:3] == size:
        return data.images[indices.start : indices.stop]
    images = (data.image(i) for i in indices)
    return np.stack([np.asarray(image.resize(size[::-1], RESAMPLING[interpolation])) for image in images])


def resize_transform(
    image_size: tuple[int, int], interpolation: str = "bicubic", random_crop: bool = False
) -> Callable[[Image.Image], Image.Image]:
    """Create a transform to the network's (height, width): timm's random resized crop, or a resize of the whole."""
    if random_crop:
        return RandomResizedCropAndInterpolation(image_size, interpolation=interpolation)
    height, width = image_size
    return lambda image: (
        image if image.size == (width, height) else image.resize((width, height), RESAMPLING[interpolation])
    )


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and torch (on the CPU) from a tuple of integers."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed, which also seeds accelerators: this is called for every image, in worker processes too.
    torch.default_generator.manual_seed(seed % 2**63)


def share_of_batch(batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """The positions in a batch that belong to one of several processes.

    Mixup and cutmix pair the i-th image from the front with the i-th from the back. Both go to the same process, so the
    pairs do not depend on the number of processes.

    Raises:
        ValueError: If the batch cannot be divided into pairs of images for each process.

    Example:
        >>> share_of_batch(8, rank=1, world_size=2).tolist()
        [2, 3, 4, 5]
    """
    if batch_size % (2 * world_size):
        raise ValueError(
            f"Expected `batch_size` to be a multiple of {2 * world_size}, twice the number of processes, got {batch_size}."
        )
    half = batch_size // (2 * world_size)
    front = np.arange(rank * half, (rank + 1) * half)
    return np.concatenate([front, batch_size - 1 - front[::-1]])


@dataclass
class BatchOrder:
    """The images of each step, for one of several processes.

    A step's batch is a function of the seed and the step; `share_of_batch` gives each process its part.

    Iterating yields lists of (position in the epoch, epoch, index of the image).
    """

    num_images: int
    batch_size: int
    seed: int
    repeats: int = 1
    first_step: int = 0
    last_step: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        share_of_batch(self.batch_size, self.rank, self.world_size)
        if self.num_images < self.batch_size:
            raise ValueError(f"Expected at least {self.batch_size} images, one batch, got {self.num_images}.")

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.batch_size

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        shown_epoch, order = -1, np.empty(0, dtype=np.int64)
        share = share_of_batch(self.batch_size, self.rank, self.world_size)
        for step in range(self.first_step, self.last_step):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if epoch != shown_epoch:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.num_images)
                order = order.repeat(self.repeats)[: self.num_images]
                shown_epoch = epoch
            positions = batch * self.batch_size + share
            yield [(int(p), epoch, int(order[p])) for p in positions]


class ResizedImages(torch.utils.data.Dataset[Any]):
    """Training images in the network's size; each random crop is a function of the seed, the epoch and the position."""

    def __init__(self, data: ImageDataset, transform: Callable[[Image.Image], Image.Image], seed: int):
        self.data, self.transform, self.seed = data, transform, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[torch.Tensor, int]:
        """Return the image, (3, H, W) uint8, and its label."""
        position, epoch, index = key
        seed_everything(self.seed, epoch, position)
        pixels = np.asarray(self.transform(self.data.image(index)))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1), int(self.data.labels[index])
