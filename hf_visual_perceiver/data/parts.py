"""Load several parts of a dataset, such as `train[:10000]` and `train[-5000:]`, and limit their number of images."""

from itertools import combinations

import numpy as np

from hf_visual_perceiver.data.images import ImageDataset, load_images
from hf_visual_perceiver.data.splits import parse_split


def evenly_spaced(count: int, max_images: int | None = None) -> np.ndarray:
    """Return evenly spaced indices of at most `max_images` of `count` images; the first may all be of one class.

    Example:
        >>> evenly_spaced(10, 4).tolist()
        [0, 2, 5, 7]
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"Expected at least 1 image, got {max_images}.")
    taken = count if max_images is None else min(max_images, count)
    return np.arange(taken) * count // taken


def at_most(data: ImageDataset, max_images: int | None) -> ImageDataset:
    """Select at most `max_images` images, evenly spaced; None selects all."""
    return data if max_images is None else data.subset(evenly_spaced(len(data), max_images))


def load_splits(dataset: str, *splits: str, apart: bool = False) -> list[ImageDataset]:
    """Load several parts of a dataset; each split is loaded only once.

    Args:
        dataset: A folder, a parquet file or a Hub id, as in `load_images`.
        splits: Names of splits or of parts of them, such as `train[:10000]`.
        apart: Whether to forbid that parts overlap.

    Raises:
        ValueError: If `load_images` raises it, a part has no images, or `apart` is set and two parts overlap.
    """
    parts = [parse_split(split) for split in splits]
    whole = {name: load_images(dataset, name) for name in dict.fromkeys(name for name, _ in parts)}
    ranges = [range(len(whole[name]))[part] for name, part in parts]
    for split, (name, _), indices in zip(splits, parts, ranges, strict=True):
        if not indices:
            raise ValueError(f"Expected images in {split} of {dataset}, which has {len(whole[name]):,} in {name}.")
    for i, j in combinations(range(len(parts)), 2) if apart else ():
        shared = range(max(ranges[i].start, ranges[j].start), min(ranges[i].stop, ranges[j].stop))
        if parts[i][0] == parts[j][0] and shared:
            raise ValueError(
                f"Expected splits without common images, got {splits[i]} and {splits[j]}, which share {len(shared):,}."
            )
    return [whole[name].subset(part) for name, part in parts]
