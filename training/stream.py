"""Training images streamed from the Hub or from parquet files, without a local copy or loading all into memory.

The main process reads encoded images and assigns them to batches (`StreamOrder`); DataLoader workers decode them
(`DecodedImages`):

    order = StreamOrder("ILSVRC/imagenet-1k", "train", batch_size=1024, seed=0, last_step=1000)
    crop = torchvision.transforms.RandomResizedCrop(224)
    images = DecodedImages(crop, seed=0)
    loader = DataLoader(images, batch_sampler=order, num_workers=8, collate_fn=images.collate)
    for step, (pixels, labels, positions) in enumerate(loader, start=order.first_step):
        ...
        state = order.state_dict(step + 1)
"""

import atexit
import logging
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from hf_visual_perceiver.data.images import _find_columns, seed_everything, share_of_batch
from hf_visual_perceiver.data.splits import open_split
from hf_visual_perceiver.modeling.handler import open_image


logger = logging.getLogger(__name__)

# The states of this many steps are kept, as a DataLoader runs ahead of training: by workers times prefetched batches.
KEPT_STATES = 1024


def load_stream(dataset: str, split: str) -> datasets.IterableDataset:
    """Open one split as a stream of encoded images.

    Args:
        dataset: A folder of parquet files, as in `splits.open_split`, a single parquet file, or a Hub id.
        split: Name of the split.

    Raises:
        ValueError: If there is no such split, or the dataset does not describe its columns.
        FileNotFoundError: If `dataset` looks like a path and does not exist.
    """
    try:
        stream = open_split(dataset, split, streaming=True)
        # Unlike casting the image column, this also undoes the decoding that `datasets` sets up for some Hub datasets.
        return stream.decode(False)
    except ValueError as error:
        raise ValueError(f"Cannot stream split {split!r} of {dataset}: {error}") from error


@dataclass(frozen=True)
class EncodedImage:
    """An image as it is stored, with its position in a batch."""

    step: int
    position: int  # in the step's global batch, over all processes
    label: int
    data: bytes
    name: str  # identifies the image in messages


@dataclass(frozen=True)
class _Window:
    """Consecutive images of a share, which are shuffled among themselves."""

    epoch: int
    number: int  # index of the window in the epoch
    start: dict[str, Any] | None  # the `datasets` stream's state before the first image; None: start of the epoch


class StreamOrder:
    """The encoded images of each step, for one of several processes that each read a share of the stream.

    A process repeats its share for as many steps as asked, and does not wait for the others at the end of an epoch. If
    the number of files is a multiple of the number of processes, a share is whole files; otherwise it is every
    world_size-th image of all files. Images are shuffled in windows. A window is read while the previous one is
    consumed, so about one window is in memory. A dataset that is sorted by class should be shuffled beforehand.

    Iterating yields lists of `EncodedImage`, batch_size / world_size long, as a DataLoader's `batch_sampler` does.

    Args:
        dataset: See `load_stream`.
        split: Name of the split.
        batch_size: Number of images per step, over all processes.
        seed: Random seed for the order of the images.
        last_step: Number of steps of the training.
        rank: Rank of this process.
        world_size: Number of processes.
        shuffle_window: Number of images that are shuffled among themselves.
        repeats: How often an image occurs in a row, to be augmented anew each time.

    Raises:
        ValueError: If the dataset does not fit. Some faults only show, and are raised, during iteration.
        FileNotFoundError: If `dataset` looks like a path and does not exist.
    """

    def __init__(
        self,
        dataset: str,
        split: str,
        batch_size: int,
        seed: int,
        last_step: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle_window: int = 8192,
        repeats: int = 1,
    ):
        for name, value in (("shuffle_window", shuffle_window), ("repeats", repeats)):
            if value < 1:
                raise ValueError(f"Expected `{name}` to be at least 1, got {value}.")
        self.share = share_of_batch(batch_size, rank, world_size)
        self.dataset, self.seed, self.last_step = dataset, seed, last_step
        self.rank, self.world_size = rank, world_size
        self.shuffle_window, self.repeats = shuffle_window, repeats

        self._stream = load_stream(dataset, split)
        self._image_column, self._label_column = _find_columns(self._stream, dataset)
        label_feature = self._stream.features[self._label_column]
        if not isinstance(label_feature, datasets.ClassLabel):
            raise ValueError(
                f"Expected column {self._label_column!r} of {dataset} to be a ClassLabel, which names the classes, "
                f"got {label_feature}."
            )
        self.label_names: list[str] = list(label_feature.names)
        info = (self._stream.info.splits or {}).get(split)
        if info is not None and 0 < info.num_examples < batch_size:
            raise ValueError(
                f"Expected at least {batch_size} images, one batch, in {dataset}, got {info.num_examples}."
            )

        self.first_step = 0
        self._start = _Window(0, 0, None), 0
        self._places = {self.first_step: self._start}

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self) -> "Batches":
        batches = self._batches()
        _close_at_exit(batches)
        return batches

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return the state to resume from after `step` finished steps, as JSON-serialisable values.

        Raises:
            ValueError: If the iteration has not reached `step` yet, or is more than `KEPT_STATES` steps past it.
        """
        if step not in self._places:
            raise ValueError(
                f"Expected a step in [{min(self._places)}, {max(self._places)}], whose states are known, got {step}."
            )
        window, offset = self._places[step]
        place = {"step": step, "epoch": window.epoch, "window": window.number, "offset": offset, "stream": window.start}
        return {**place, **self._identity()}

    def load_state_dict(self, state: dict[str, Any], allow_other_world: bool = False) -> None:
        """Resume from the state of another order over this dataset; sets `first_step`.

        Args:
            state: State from `state_dict`, of the same rank.
            allow_other_world: Whether the state may be of another rank or number of processes. The shares then differ,
                so the order continues with the start of the next epoch.

        Raises:
            ValueError: If the state was written with other settings.
        """
        moved = state["world_size"] != self.world_size or state["rank"] != self.rank
        if moved and allow_other_world:
            self._start = _Window(state["epoch"] + 1, 0, None), 0
        else:
            for name, value in self._identity().items():
                if state[name] != value:
                    raise ValueError(f"Expected a state written with `{name}` = {value}, got one with {state[name]}.")
            self._start = _Window(state["epoch"], state["window"], state["stream"]), state["offset"]
        self.first_step = state["step"]
        self._places = {self.first_step: self._start}

    def _identity(self) -> dict[str, int]:
        """The settings on which a position in the order depends."""
        return {name: getattr(self, name) for name in ("world_size", "rank", "seed", "shuffle_window", "repeats")}

    def _batches(self) -> "Batches":
        window, offset = self._start
        self._places = {self.first_step: self._start}
        dealt = self._deal(window, offset)
        for step in range(self.first_step, self.last_step):
            batch = list(islice(dealt, len(self.share)))
            window, offset, _ = batch[-1]
            self._places[step + 1] = window, offset
            self._places.pop(step + 1 - KEPT_STATES, None)
            yield [
                EncodedImage(step, int(position), *image)
                for position, (_, _, image) in zip(self.share, batch, strict=True)
            ]

    def _deal(self, window: _Window, skip: int) -> Iterator[tuple[_Window, int, tuple[int, bytes, str]]]:
        """Yield shuffled images from `window` on, without the first `skip`, each with the position right after it."""
        stream = self._read(window)
        upcoming = [next(stream)]
        while True:
            # Read the rest of this window; the image that shows its end is the first of the next.
            while upcoming[-1][0] is upcoming[0][0]:
                upcoming.append(next(stream))
            *images, first = upcoming
            window, upcoming = images[0][0], [first]
            rng = np.random.default_rng((self.seed, window.epoch, window.number, self.rank))
            shuffled = [images[i][1] for i in rng.permutation(len(images))]
            del images
            offset = 0
            while shuffled:
                image = shuffled.pop()
                # Read one image for each one yielded, so that neither reading nor memory comes in bursts.
                if upcoming[-1][0] is upcoming[0][0]:
                    upcoming.append(next(stream))
                for _ in range(self.repeats):
                    offset += 1
                    if offset > skip:
                        yield window, offset, image
            skip = 0

    def _read(self, window: _Window) -> Iterator[tuple[_Window, tuple[int, bytes, str]]]:
        """Yield the label, data and name of this share's images from `window` on, with their windows, endlessly."""
        while True:
            share = split_dataset_by_node(self._stream, rank=self.rank, world_size=self.world_size)
            if window.start is not None:
                share.load_state_dict(window.start)
            count = window.number * self.shuffle_window
            for example in share:
                yield window, self._encoded(example, count)
                count += 1
                if count % self.shuffle_window == 0:
                    window = _Window(window.epoch, window.number + 1, share.state_dict())
            if count < len(self.share):
                raise ValueError(
                    f"Expected at least {len(self.share)} images, its part of a batch, in the share of rank {self.rank} of "
                    f"{self.world_size} of {self.dataset}, got {count}."
                )
            window = _Window(window.epoch + 1, 0, None)

    def _encoded(self, example: dict[str, Any], number: int) -> tuple[int, bytes, str]:
        encoded = example[self._image_column] or {}
        name = f"image {number} of the share of rank {self.rank} of {self.dataset}"
        if encoded.get("path"):
            name = f"{encoded['path']} ({name})"
        label = example[self._label_column]
        # ClassLabel is an integer in the file, but may be null.
        if label is None or not 0 <= label < len(self.label_names):
            raise ValueError(
                f"Expected labels in [0, {len(self.label_names)}), got {label} for {name}; unlabelled test splits have -1."
            )
        # A missing image is treated like an unreadable one.
        return label, encoded.get("bytes") or b"", name


Batches = Generator[list[EncodedImage], None, None]
_open: weakref.WeakSet[Batches] = weakref.WeakSet()


def _close_at_exit(batches: Batches) -> None:
    _open.add(batches)
    atexit.unregister(_close_streams)
    atexit.register(_close_streams)


def _close_streams() -> None:
    """Close the streams and wait for pyarrow's threads to stop.

    These threads read ahead through Python file objects; if one still reads at interpreter shutdown, the process hangs.
    """
    for batches in list(_open):
        batches.close()
    time.sleep(1)


class DecodedImages(torch.utils.data.Dataset[Any]):
    """Decodes images to pixels; the randomness of each follows from the seed, the step and its position in the batch.

    Args:
        transform: Function from PIL image to PIL image, all of one output size, such as a random crop.
        seed: Random seed of the transform.
        unreadable: `"error"` to raise, or `"replace"` to have `collate` use another image of the batch instead.
    """

    def __init__(self, transform: Callable[[Image.Image], Image.Image], seed: int, unreadable: str = "error"):
        if unreadable not in ("error", "replace"):
            raise ValueError(f"Expected `unreadable` to be error or replace, got {unreadable!r}.")
        self.transform, self.seed, self.unreadable = transform, seed, unreadable

    def __getitem__(self, key: EncodedImage) -> tuple[torch.Tensor | None, int, int]:
        """Return pixels (3, H, W) uint8, or None for an unreadable image; the label; the position in the global batch.

        Raises:
            ValueError: If the image is unreadable and `unreadable` is `"error"`.
        """
        try:
            image = open_image(key.data)
        except ValueError as error:
            if self.unreadable == "error":
                raise ValueError(f"Cannot read {key.name}: {error}") from error
            logger.warning("Replacing %s by another image of its batch: %s", key.name, error)
            return None, key.label, key.position
        seed_everything(self.seed, key.step, key.position)
        return pil_to_tensor(self.transform(image)), key.label, key.position

    @staticmethod
    def collate(
        batch: Sequence[tuple[torch.Tensor | None, int, int]],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Collate a batch to images (B, 3, H, W) uint8, labels (B,) and positions (B,).

        The next readable image, with its label, replaces an unreadable one.

        Raises:
            ValueError: If no image is readable.
        """
        readable = [i for i, (image, _, _) in enumerate(batch) if image is not None]
        if not readable:
            raise ValueError(f"Expected a readable image in each batch, got none among {len(batch)}.")
        chosen = [next((j for j in readable if j >= i), readable[0]) for i in range(len(batch))]
        whole = [(*batch[j][:2], batch[i][2]) for i, j in enumerate(chosen)]
        images, labels, positions = torch.utils.data.default_collate(whole)
        return images, labels, positions
