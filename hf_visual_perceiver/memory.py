"""Batches that do not fit in memory: which size would."""

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .timing import peak_memory
from .training.console import OUT_OF_MEMORY


# Of what is free; the rest is for fragments and for what else runs.
USABLE = 0.9


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory, on a GPU or on a CPU, where it has no exception of its own for that."""
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    return isinstance(error, torch.OutOfMemoryError) or said


@contextmanager
def fitting(run: Callable[[torch.Tensor], Any], pixels: torch.Tensor) -> Iterator[None]:
    """Name a batch size that fits if the body, which does `run(pixels)`, runs out of memory.

    Args:
        run: Of a batch of images, (n, C, H, W).
        pixels: The batch, (B, C, H, W).

    Raises:
        ValueError: With that size, in place of the error of the body.
    """
    try:
        yield
    except (RuntimeError, torch.OutOfMemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold tensors
        B, fits = len(pixels), batch_size_that_fits(run, pixels)
        advice = f"{fits} would" if fits else "not even one image would"
        raise ValueError(
            f"Expected a batch of {B} images to fit in the memory of {pixels.device}, which it does not; {advice}."
        ) from error


def batch_size_that_fits(run: Callable[[torch.Tensor], Any], pixels: torch.Tensor) -> int:
    """A size, smaller than that of `pixels`, with which `run` has just succeeded; 0 if one image is too many.

    Halves until it fits, then tries what the memory used for each image suggests.
    """
    size, B = len(pixels) // 2, len(pixels)
    while size:
        used = _memory_used(run, pixels[:size])
        if used is not None:
            break
        size //= 2
    else:
        return 0
    free = free_memory(pixels.device)
    if free is None:
        return size
    larger = min(B - 1, int(USABLE * free * size / max(1, used)))
    return larger if larger > size and _memory_used(run, pixels[:larger]) is not None else size


def _memory_used(run: Callable[[torch.Tensor], Any], pixels: torch.Tensor) -> int | None:
    """Bytes, or None if there are too few."""
    try:
        return peak_memory(lambda: run(pixels), pixels.device)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return None


def free_memory(device: torch.device) -> int | None:
    """Bytes that a device has left; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows and macOS
        return None
