"""When to stop a run, and how fast it trains."""

import math
import signal
import threading
import time
from typing import Any

import torch


class StopRequest:
    """Asks a run to stop when its time is over, or when SIGTERM arrives while the context is open.

    Args:
        max_minutes: Minutes from now until the run should stop; None is no limit.
    """

    def __init__(self, max_minutes: float | None):
        if max_minutes is not None and not max_minutes > 0:
            raise ValueError(f"Expected `--max-minutes` to be above 0, got {max_minutes}.")
        self.max_minutes = max_minutes
        self.deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.terminated = False

    def __enter__(self) -> "StopRequest":
        # Python allows signal handlers only in the main thread.
        self.handles = threading.current_thread() is threading.main_thread()
        if self.handles:
            self.previous = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.handles:
            signal.signal(signal.SIGTERM, self.previous)

    def _terminate(self, *signal_and_frame: Any) -> None:
        self.terminated = True

    def requested(self) -> bool:
        """Whether to stop now."""
        return self.terminated or time.monotonic() >= self.deadline

    def as_tensor(self, device: torch.device) -> torch.Tensor:
        """(1,) float: 1 if this process should stop, else 0."""
        return torch.tensor([float(self.requested())], device=device)

    def reason(self) -> str:
        """Why the run stopped."""
        return "SIGTERM" if self.terminated or self.max_minutes is None else f"{self.max_minutes:g} minutes are over"


class Stopwatch:
    """Measures images per second, and seconds, since the last restart."""

    def __init__(self) -> None:
        self.shown = time.perf_counter()
        self.restart()

    def restart(self) -> None:
        """Start measuring anew."""
        self.began, self.images = time.perf_counter(), 0

    def count(self, images: int) -> None:
        """Add images that were trained on."""
        self.images += images

    @property
    def seconds(self) -> float:
        """Seconds since the restart."""
        return time.perf_counter() - self.began

    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds

    def minute_passed(self) -> bool:
        """Whether more than a minute has passed since this last returned True."""
        passed = time.perf_counter() - self.shown > 60
        if passed:
            self.shown = time.perf_counter()
        return passed
