"""Find a batch size that fits in memory, with accelerate's `find_executable_batch_size`."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils.memory import find_executable_batch_size, should_reduce_batch_size


@contextmanager
def fitting(run: Callable[[torch.Tensor], Any], pixels: torch.Tensor) -> Iterator[None]:
    """Run the body, which calls `run(pixels)`; if it runs out of memory, raise an error that names a size that fits.

    Args:
        run: Function of a batch of images (n, C, H, W).
        pixels: The batch that the body runs, (B, C, H, W).

    Raises:
        ValueError: If the body runs out of memory; the message names a batch size that fits.
    """
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        traceback.clear_frames(error.__traceback__)  # the frames hold tensors
        B = len(pixels)

        def tried(batch_size: int) -> int:
            run(pixels[:batch_size])
            return batch_size

        try:
            advice = f"{find_executable_batch_size(tried, starting_batch_size=B // 2)()} fit"
        except RuntimeError as smallest:
            if "reached zero" not in str(smallest):
                raise
            advice = "not even one image fits"
        raise ValueError(
            f"Expected a batch of {B} images to fit in the memory of {pixels.device}; {advice}."
        ) from error
