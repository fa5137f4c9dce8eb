"""The Visual Perceiver by ONNX Runtime: every budget from a few graphs, selection and cascades that really skip work.

An image is read once; the queries that it keeps go through the trunk with those of images that keep as many, or nearly as
many, padded to the longest. Which lengths share a call is decided by what a call and a token cost on this machine, measured
when selection is first used.
"""

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..modeling import VisualPerceiverConfig, VisualPerceiverImageClassifierOutput, select_queries
from ..modeling.attention_groups import boundaries
from ..modeling.engines import fold_batch_norms
from .onnx_graphs import Sessions, cache_folder, checked_threads, graphs_key, graphs_of, import_onnxruntime
from .stages import stages_of


# So many tokens go through a stage together: enough for matrix products to be efficient, few enough to stay in the cache.
TOKENS_PER_CALL = 1024
# Graphs of the architectures that have checkpoints; others are exported when first needed, and kept in this machine's cache.
SHIPPED = Path(__file__).parent / "graphs"
# So many images have their cross-attention outputs in memory at once with selection.
WINDOW = 1024


def architecture_of(config: VisualPerceiverConfig, labels: int) -> dict[str, Any]:
    """What the graphs of a network depend on: its sizes, the number of classes, and the exporter."""
    fields = (
        "image_size",
        "patch_size",
        "num_channels",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "num_queries",
        "num_cross_attention_heads",
        "hidden_act",
        "qkv_bias",
        "layer_norm_eps",
        "dqs_reference",
        "stem",
        "stem_widths",
        "stem_downsample",
        "stem_residual",
        "trunk_attention",
        "block_ends",
    )
    return {**{name: getattr(config, name) for name in fields}, "labels": labels}


class OnnxPerceiver:
    """Logits of images by ONNX Runtime, from a snapshot of a network's weights.

    Args:
        parts: The network: a `PerceiverParts` with a decoder.
        head: The classifier.
        num_threads: Threads of a call; None is torch's number.
        int8: Linears in 8 bits.

    Raises:
        ValueError: If the number of threads is not at least 1.
        ImportError: If onnxruntime is not installed; onnx and onnxscript to export, onnx for `int8`.
    """

    def __init__(
        self,
        parts: Any,
        head: nn.Module,
        num_threads: int | None = None,
        int8: bool = False,
    ):
        import_onnxruntime()  # exporting takes seconds, so what would fail after it fails now
        threads = checked_threads(num_threads)
        self.config, self.dtype, self.device = copy.deepcopy(parts.config), torch.float32, torch.device("cpu")
        parts = copy.deepcopy(parts).float().cpu().eval().requires_grad_(False)
        fold_batch_norms(parts)
        head = copy.deepcopy(head).float().cpu().eval().requires_grad_(False)
        stages = stages_of(parts, head)
        self.num_labels = head.out_features if isinstance(head, nn.Linear) else self.config.hidden_size
        architecture = architecture_of(self.config, self.num_labels)
        folders = [SHIPPED / graphs_key(architecture), cache_folder(architecture)]
        module = stages["trunk"].module
        weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.sessions = Sessions(graphs_of(stages, architecture, folders), weights, threads, int8)
        self.cost: CallCost | None = None
        # Reading these from a config takes longer than a small network's matrix products.
        self.num_queries, self.num_patches = self.config.num_queries, self.config.num_patches
        self.places = np.arange(self.num_queries)

    def __call__(
        self, pixel_values: torch.Tensor, K: int, threshold: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, labels) and the active queries (B, Q) bool.

        Args:
            pixel_values: (B, C, H, W), normalised, of the config's size.
            K: Use the first K queries.
            threshold: Drop those of them that are more similar than this to an earlier one.
        """
        pixels = pixel_values.detach().float().numpy()
        B, query = len(pixels), self.places[:K]
        keep = np.ones((B, K), dtype=bool)
        logits = np.empty((B, self.num_labels), dtype=np.float32)
        if threshold is None:
            for part in self.parts_of(B, K):
                y = self.read(pixels[part], query)
                logits[part] = self.trunk(y, np.repeat(query[None], len(y), 0), keep[part])
        else:
            for first in range(0, B, WINDOW):
                window = slice(first, min(first + WINDOW, B))
                y, keep[window] = self.select(pixels[window], query, threshold)
                logits[window] = self.ragged(y, keep[window])
        active = np.zeros((B, self.num_queries), dtype=bool)
        active[:, :K] = keep
        return torch.from_numpy(logits), torch.from_numpy(active)

    def parts_of(self, images: int, length: int) -> Iterator[slice]:
        """Cut a batch of images with `length` tokens each in pieces of `TOKENS_PER_CALL` tokens."""
        size = max(1, TOKENS_PER_CALL // max(length, self.num_patches // 4))
        for first in range(0, images, size):
            yield slice(first, min(first + size, images))

    def read(self, pixels: np.ndarray, query: np.ndarray) -> np.ndarray:
        """Cross-attention outputs (n, k, D) of some queries (k,)."""
        return self.sessions.run("read", pixel_values=pixels, query=query)[0]

    def select(self, pixels: np.ndarray, query: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Cross-attention outputs (n, k, D), and which of them stay, (n, k) bool."""
        t, results = np.array(threshold, dtype=np.float32), []
        for part in self.parts_of(len(pixels), self.num_patches):
            if "select" in self.sessions.graphs:
                results.append(self.sessions.run("select", pixel_values=pixels[part], query=query, threshold=t))
            else:  # each decision depends on those before
                y = self.read(pixels[part], query)
                keep = select_queries(torch.from_numpy(y), threshold, self.config.dqs_reference)
                results.append([y, keep.numpy()])
        y, keep = (np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*results, strict=True))
        return y, keep

    def trunk(self, y: np.ndarray, query: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """Logits (n, labels) of tokens (n, k, D) of the queries (n, k), of which `keep` (n, k) count."""
        return self.sessions.run("trunk", y=y, query=query, keep=keep)[0]

    def ragged(self, y: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """Logits (n, labels) of images that keep different numbers of tokens: of `y` (n, K, D) those that `keep` marks."""
        if len(y) == 1:  # nothing to group
            query = keep[0].nonzero()[0]
            return self.trunk(y[0, query][None], query[None], np.ones((1, len(query)), dtype=bool))
        lengths = keep.sum(1)
        logits = np.empty((len(y), self.num_labels), dtype=np.float32)
        order = np.argsort(lengths, kind="stable")
        for chosen in self.groups(lengths, order):
            length = lengths[chosen[-1]]
            # The queries that stay come first, in their order; then, as padding, others.
            query = np.argsort(~keep[chosen], axis=1, kind="stable")[:, :length]
            counted = np.arange(length) < lengths[chosen, None]
            for part in self.parts_of(len(chosen), int(length)):
                tokens = y[chosen[part, None], query[part]]
                logits[chosen[part]] = self.trunk(tokens, query[part], counted[part])
        return logits

    def groups(self, lengths: np.ndarray, order: np.ndarray) -> Iterator[np.ndarray]:
        """Images, shortest first, in the groups that cost least together: positions (n,) of each."""
        values, counts = np.unique(lengths, return_counts=True)
        ends = range(1, len(values) + 1)
        if len(values) > 1:
            if self.cost is None:
                self.cost = CallCost.measured(self)
            ends = boundaries(values.tolist(), counts.tolist(), self.cost)
        images = np.concatenate([[0], np.cumsum(counts)])
        first = 0
        for end in ends:
            yield order[images[first] : images[end]]
            first = end

    def tokens(self, pixels: np.ndarray) -> np.ndarray:
        """What queries read of some images, (n, N, ...)."""
        parts = self.parts_of(len(pixels), self.num_patches)
        return np.concatenate([self.sessions.run("tokens", pixel_values=pixels[part])[0] for part in parts])

    def ask(self, tokens: np.ndarray, query: np.ndarray) -> np.ndarray:
        """Cross-attention outputs (n, k, D) of the queries (k,), from `tokens` of some images."""
        parts = self.parts_of(len(tokens), len(query))
        return np.concatenate([self.sessions.run("ask", tokens=tokens[part], query=query)[0] for part in parts])

    def start(self, pixel_values: torch.Tensor) -> "OnnxState":
        """Read images, to answer with few queries first and with more later; see `VisualPerceiverForImageClassification.start`.

        Args:
            pixel_values: (B, C, H, W), normalised.
        """
        tokens = self.tokens(pixel_values.detach().float().numpy())
        return OnnxState(self, tokens, np.empty((len(tokens), 0, self.config.hidden_size), dtype=np.float32))


class CallCost:
    """What a call of the trunk costs, in seconds: that of a call and of an image, a quadratic function of its length.

    Args:
        call: Seconds of a call, however small.
        image: Seconds of an image: c0 + c1 length + c2 length^2.
    """

    def __init__(self, call: float, image: tuple[float, float, float]):
        self.call, self.image = call, image

    def of(self, images: int, length: int, equal: bool = False) -> float:
        """Of images padded to `length`."""
        constant, linear, quadratic = self.image
        return self.call + images * (constant + linear * length + quadratic * length**2)

    @classmethod
    def measured(cls, engine: OnnxPerceiver) -> "CallCost":
        """What this machine takes, by a few calls of different sizes."""
        Q, D = engine.config.num_queries, engine.config.hidden_size
        rows, seconds = [], []
        for length in sorted({1, max(1, Q // 8), max(1, Q // 4), max(1, Q // 2), Q}):
            for images in (1, max(2, TOKENS_PER_CALL // (2 * max(length, 8)))):
                y = np.zeros((images, length, D), dtype=np.float32)
                query = np.repeat(engine.places[None, :length], images, 0)
                keep = np.ones((images, length), dtype=bool)
                taken = []
                for _ in range(3):
                    began = time.perf_counter()
                    engine.trunk(y, query, keep)
                    taken.append(time.perf_counter() - began)
                rows.append([1, images, images * length, images * length**2])
                seconds.append(min(taken))
        # Relative errors count, or the longest calls would decide alone.
        weights = 1 / np.array(seconds)
        solution = np.linalg.lstsq(np.array(rows) * weights[:, None], np.ones(len(rows)), rcond=None)[0]
        call, constant, linear, quadratic = np.maximum(solution, 0).tolist()
        return cls(call, (constant, linear, quadratic))


class OnnxState:
    """Images that have been answered with some queries, and can be with more; see `IncrementalState`.

    Args:
        engine: What computes.
        tokens: (B, N, ...) what queries read.
        y: (B, K, D) cross-attention outputs of the queries that have read.
        past: Keys and values of those that have gone through a block-causal trunk, (B, 2 (L + 1), H, K, d).
    """

    def __init__(self, engine: OnnxPerceiver, tokens: np.ndarray, y: np.ndarray, past: np.ndarray | None = None):
        self.engine, self.tokens, self.y, self.past = engine, tokens, y, past

    @property
    def num_active_queries(self) -> int:
        """K so far; 0 before the first answer."""
        return self.y.shape[1]

    def read(self, K: int) -> np.ndarray:
        """Cross-attention outputs of the first K queries, (B, K, D); those that are missing read now."""
        before = self.num_active_queries
        if before == K:
            return self.y
        return np.concatenate([self.y, self.engine.ask(self.tokens, self.engine.places[before:K])], axis=1)

    def extend(self, num_active_queries: int) -> Any:
        """Answer with the first K queries, going on from those that there are.

        Raises:
            ValueError: If K is out of its range or smaller than before.
        """
        engine, before = self.engine, self.num_active_queries
        K, _ = engine.config.operating_point(num_active_queries)
        if before > K:
            raise ValueError(f"Expected at least the {before} queries that there are, got {K}.")
        read = self.read(K)
        B, causal = len(read), engine.config.trunk_attention == "block_causal"
        logits = np.empty((B, engine.num_labels), dtype=np.float32)
        start = max(end for end in [0, *engine.config.block_ends] if end <= before) if causal else 0
        if causal and start == K:  # asked again: only the last block can give the answer
            start = max(end for end in [0, *engine.config.block_ends] if end < K)
        query, kept = engine.places[start:K], []
        for part in engine.parts_of(B, K - start):
            y = np.ascontiguousarray(read[part, start:])
            if causal:
                logits[part], past = engine.sessions.run("extend", y=y, query=query, past=self.past_of(part, start))
                kept.append(past)
            else:
                keep = np.ones((len(y), K), dtype=bool)
                logits[part] = engine.trunk(y, np.repeat(query[None], len(y), 0), keep)
        self.y, self.past = read, np.concatenate(kept) if causal else None
        active = torch.arange(engine.config.num_queries) < K
        return VisualPerceiverImageClassifierOutput(logits=torch.from_numpy(logits), active_queries=active.repeat(B, 1))

    def past_of(self, images: slice, length: int) -> np.ndarray:
        """Keys and values of the first `length` queries of some images, (n, 2 (L + 1), H, length, d)."""
        if self.past is not None:
            return np.ascontiguousarray(self.past[images, :, :, :length])
        config, n = self.engine.config, len(self.y[images])
        heads = config.num_attention_heads
        shape = (n, 2 * (config.num_hidden_layers + 1), heads, 0, config.hidden_size // heads)
        return np.empty(shape, dtype=np.float32)

    def __getitem__(self, images: torch.Tensor) -> "OnnxState":
        """The state of some of the images: (B,) bool or indices."""
        chosen = images.numpy()
        past = None if self.past is None else self.past[chosen]
        return OnnxState(self.engine, self.tokens[chosen], self.y[chosen], past)
