"""The network as few launches, for inference on GPUs: compiled, and replayed from CUDA graphs.

A GPU does the work of a small network faster than Python launches it. torch's compiler fuses what lies between the matrix
products, and its mode "reduce-overhead" records a CUDA graph for each new size, which later batches of that size replay.

At a fixed K the size is (B, K), and all of a forward is one graph. With selection there are two, and between them the host
waits once, to learn how many tokens T stay. T is rounded up, so that batches share graphs; the rows in excess belong to
images that are not there.

Shapes: B images, K active queries, Q learned queries, D width, T tokens of a packed batch.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from .query_selection import select_queries
from .ragged import PackedLayout


# The finer T is rounded, the less is computed in vain, and the more graphs are recorded.
STEPS = 128

# One code for all sizes but 1; only the CUDA graphs are for each. Where torch can, every snapshot has its own limit of how
# often something may be compiled anew, beyond which torch would go on without compiling.
OWN_LIMIT = {"isolate_recompiles": True} if "isolate_recompiles" in (torch.compile.__kwdefaults__ or {}) else {}
COMPILER = partial(torch.compile, dynamic=True, mode="reduce-overhead", **OWN_LIMIT)


class CompiledPerceiver:
    """Patches to what the output query reads, from a snapshot of a network; the counterpart of `FastPerceiver` on GPUs.

    Args:
        parts: The network: a `PerceiverParts` with a decoder.
        dtype: Of weights and activations; None is that of the network.
        tokens_per_chunk: Tokens that go through the trunk together; None is all.
        compiler: Makes the fast form of a function.
    """

    def __init__(
        self,
        parts: Any,
        dtype: torch.dtype | None = None,
        tokens_per_chunk: int | None = None,
        compiler: Callable = COMPILER,
    ):
        if tokens_per_chunk is not None and tokens_per_chunk < 1:
            raise ValueError(f"Expected `tokens_per_chunk` to be at least 1, got {tokens_per_chunk}.")
        self.config, self.tokens_per_chunk = parts.config, tokens_per_chunk
        self.dtype = dtype or parts.cross_attention.queries.dtype
        self.parts = copy.deepcopy(parts).to(self.dtype).requires_grad_(False).eval()
        self.queries = self.parts.cross_attention.queries
        self.compiler = compiler
        self.compile()

    def compile(self) -> None:
        """Make the fast forms."""
        self.answer, self.candidates, self.finish = map(self.compiler, (self._answer, self._candidates, self._finish))

    def __getstate__(self) -> dict[str, Any]:
        # What is compiled belongs to this process.
        return {name: value for name, value in self.__dict__.items() if name not in ("answer", "candidates", "finish")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.compile()

    def __call__(
        self, pixel_values: torch.Tensor, K: int, threshold: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `FastPerceiver.__call__`."""
        B = pixel_values.shape[0]
        size = B if self.tokens_per_chunk is None else max(1, self.tokens_per_chunk // K)
        results = []
        for images in pixel_values.to(self.dtype).split(size):
            torch.compiler.cudagraph_mark_step_begin()
            answer, keep = self.fixed(images, K) if threshold is None else self.selected(images, K, threshold)
            # The next replay of a graph overwrites its results.
            results.append((answer.clone(), keep.clone()))
        pooled, keep = (torch.cat(parts) for parts in zip(*results, strict=True))
        return pooled, F.pad(keep, (0, self.config.num_queries - K))

    def fixed(self, images: torch.Tensor, K: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the output query reads, (B, D), and the active queries, (B, K), at a fixed K."""
        return self.answer(images, K), torch.ones(len(images), K, dtype=torch.bool, device=images.device)

    def selected(self, images: torch.Tensor, K: int, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with selection among the first K."""
        y, keep = self.candidates(images, K, threshold)
        if self.parts.ragged_backend_for(y) != "varlen":
            active = self.parts.keep_queries(y, keep)
            return self.parts.decode(self.parts.process(active)), keep
        layout = PackedLayout.from_mask(keep, "varlen", round_to=max(8, keep.numel() // STEPS))
        return self.finish(y, layout), keep

    def _answer(self, images: torch.Tensor, K: int) -> torch.Tensor:
        return self.parts.decode(self.parts.process(self.parts.select(self.parts.read(images, K), None)))

    def _candidates(self, images: torch.Tensor, K: int, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.parts.read(images, K)
        return y, select_queries(y, threshold, self.config.dqs_reference)

    def _finish(self, y: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        return self.parts.decode(self.parts.process(self.parts.packed(y, layout)))
