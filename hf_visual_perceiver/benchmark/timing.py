"""Measure time and memory: interleaved runs, the machine's peak of matrix products, peak memory and page faults."""

import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_visual_perceiver.utils.console import tracked


try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


# torch compiles at the first run of a size, warms up at the second and records its CUDA graph at the third.
GRAPH_WARMUPS = 3
# Runs that take fewer seconds than this are slowed by the run before, which has mostly evicted their weights from the
# cache.
SHORT = 0.05


def synchronise(device: torch.device) -> None:
    """Wait for an accelerator; does nothing on a CPU, which runs synchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    repetitions: int,
    device: torch.device,
    title: str = "",
    progress: bool = True,
    warmups: int = 1,
) -> dict[str, list[float]]:
    """Time runs in turn, repetition after repetition, so that whatever slows the machine affects all of them alike.

    A short run (`SHORT`) is repeated once untimed just before it is timed. Otherwise the first of a network's settings
    would pay for loading the weights into the cache for all of them.

    Args:
        runs: Functions to time, by name.
        repetitions: Number of repetitions, at least 1.
        device: Device that they run on.
        title: Title of the progress on stderr.
        progress: Whether to show progress on stderr.
        warmups: Number of untimed repetitions beforehand. Runs that record CUDA graphs need `GRAPH_WARMUPS`.

    Returns:
        The seconds of each repetition, by name.

    Raises:
        ValueError: If there are no repetitions.

    Example:
        >>> times = interleaved({"sum": lambda: torch.ones(10).sum()}, 3, torch.device("cpu"), progress=False)
        >>> len(times["sum"])
        3
    """
    if repetitions < 1:
        raise ValueError(f"Expected at least 1 repetition, got {repetitions}.")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    last = dict.fromkeys(runs, SHORT)
    for number in tracked(range(warmups + repetitions), title if progress else None):
        for name, run in runs.items():
            if last[name] < SHORT:
                run()
            synchronise(device)
            began = time.perf_counter()
            run()
            synchronise(device)
            last[name] = time.perf_counter() - began
            if number >= warmups:
                seconds[name].append(last[name])
    return seconds


def median_ratio(seconds: list[float], reference: list[float]) -> float:
    """The median over repetitions of the ratio of the two times."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


@torch.inference_mode()
def matmul_peak(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> float:
    """The highest multiply-accumulates per second that a linear layer of the network's shapes reaches.

    It is measured on products of 256 to 4,096 tokens (4,096 to 32,768 on a GPU) with weights shaped like those of the
    network's larger linear layers, and on a large square product.
    """
    best = 0.0
    large, launches = (2048, 1) if device.type == "cpu" else (8192, 20)  # a launch may take longer than a product
    rows_of = (256, 1024, 4096) if device.type == "cpu" else (4096, 16384, 32768)
    weights = {(m.in_features, m.out_features) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    largest = max((a * b for a, b in weights), default=0)
    shapes = [(rows, a, b) for rows in rows_of for a, b in sorted(weights) if 8 * a * b > largest]
    for rows, width, out in [*shapes, (large, large, large)]:
        x, weight, bias = (torch.randn(s, device=device, dtype=dtype) for s in ((rows, width), (out, width), (out,)))
        repeated = {"torch": partial(_repeat, partial(F.linear, x, weight, bias), launches)}
        fastest = min(min(times) for times in interleaved(repeated, 10, device, progress=False).values())
        best = max(best, launches * rows * width * out / fastest)
    return best


def _repeat(run: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        run()


class PeakMemory(TorchDispatchMode):
    """Records the peak number of bytes of tensors that are created inside the context and alive at once.

    Example:
        >>> with PeakMemory() as memory:
        ...     for _ in range(3):
        ...         x = torch.zeros(100)
        >>> memory.peak
        800
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata in self.known or storage._cdata in inputs:
                continue
            self.known.add(storage._cdata)
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return result

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def _tensors(values: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(values)
    # oneDNN's opaque tensors, which hold packed weights, have no storage.
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.layout == torch.strided]


@torch.inference_mode()
def page_faults(run: Callable[[], Any]) -> int | None:
    """The number of minor page faults during a run; None where the system does not report it (Windows)."""
    if resource is None:
        return None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@torch.inference_mode()
def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """The peak number of bytes of tensors alive at once during a run, beyond those that existed before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with PeakMemory() as memory:
        run()
    return memory.peak
