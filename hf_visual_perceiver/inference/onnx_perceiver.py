"""The Visual Perceiver in ONNX Runtime: a few graphs serve every budget, and selection and cascades save work.

The stem runs once per image. Images that keep equal or similar numbers of queries go through the trunk together, padded
to the longest. The measured costs of a call and of a token on this machine decide which lengths share a call.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_visual_perceiver.inference.onnx_graphs import (
    Sessions,
    cache_folder,
    checked_threads,
    graphs_key,
    graphs_of,
    import_onnxruntime,
)
from hf_visual_perceiver.inference.stages import stages_of
from hf_visual_perceiver.modeling import VisualPerceiverConfig, VisualPerceiverImageClassifierOutput, select_queries
from hf_visual_perceiver.modeling.engines import fold_batch_norms


# Tokens that go through a stage together: enough for efficient matrix products, few enough to stay in the CPU's cache.
TOKENS_PER_CALL = 1024
# Graphs of the bundled checkpoints' architectures; others are exported at first use and kept in this machine's cache.
SHIPPED = Path(__file__).parent / "graphs"
# With selection, the cross-attention outputs of at most this many images are in memory at once.
WINDOW = 1024


def architecture_of(config: VisualPerceiverConfig, labels: int) -> dict[str, Any]:
    """The values that the graphs of a network depend on: its sizes and options, and the number of classes."""
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
        "level_starts",
        "level_widths",
        "trunk_attention",
        "block_ends",
        "decoder_reads",
    )
    return {**{name: getattr(config, name) for name in fields}, "labels": labels}


class OnnxPerceiver:
    """Computes logits of images with ONNX Runtime, from a snapshot of a network's weights.

    Args:
        parts: The network: a `PerceiverNetwork` with a decoder.
        head: The classification head.
        num_threads: Number of threads per call; None is torch's number.
        int8: Run linear layers in 8 bits.

    Raises:
        ValueError: If the number of threads is not at least 1.
        ImportError: If onnxruntime is not installed, or onnx and onnxscript to export graphs, or onnx for `int8`.
    """

    torch_allocates = False  # ONNX Runtime's memory does not show in measurements of torch's memory

    def __init__(
        self,
        parts: Any,
        head: nn.Module,
        num_threads: int | None = None,
        int8: bool = False,
    ):
        import_onnxruntime()  # fail early, before an export that takes seconds
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
        # Cached, as reading them from a config takes longer than a small network's matrix products.
        self.num_queries, self.num_patches = self.config.num_queries, self.config.num_patches
        self.places = np.arange(self.num_queries)
        self.all_spans = self.config.query_spans(0, self.num_queries)

    def __call__(
        self, pixel_values: torch.Tensor, K: int | torch.Tensor, threshold: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute logits (B, labels) and the active queries (B, Q) bool.

        Args:
            pixel_values: (B, C, H, W), normalised, of the config's size.
            K: Number of queries to use, for all images or for each, (B,).
            threshold: Drop queries that are more similar than this to an earlier one; None drops none.
        """
        pixels = pixel_values.detach().float().numpy()
        B, each = len(pixels), isinstance(K, torch.Tensor)
        if isinstance(K, torch.Tensor) and len(K) != B:
            raise ValueError(f"Expected `num_active_queries` of {B} images, got {len(K)}.")
        most = int(K.max()) if isinstance(K, torch.Tensor) else K
        keep = np.ones((B, most), dtype=bool)
        logits = np.empty((B, self.num_labels), dtype=np.float32)
        if threshold is None and not each:
            query = self.places[:most]
            for part in self.parts_of(B, most):
                y = Reader(self, pixels[part]).read(0, most)
                logits[part] = self.trunk(y, np.repeat(query[None], len(y), 0), keep[part])
        else:
            allowed = K.numpy() if isinstance(K, torch.Tensor) else np.full(B, most)
            for first in range(0, B, WINDOW):
                window = slice(first, min(first + WINDOW, B))
                y, keep[window] = self.select(pixels[window], allowed[window], most, threshold)
                logits[window] = self.ragged(y, keep[window])
        active = np.zeros((B, self.num_queries), dtype=bool)
        active[:, :most] = keep
        return torch.from_numpy(logits), torch.from_numpy(active)

    def spans(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Like the config's `query_spans`, from a cached list."""
        spans = [(level, max(start, a), min(end, b)) for level, a, b in self.all_spans]
        return [span for span in spans if span[1] < span[2]]

    def parts_of(self, images: int, length: int) -> Iterator[slice]:
        """Cut a batch of images with `length` tokens each into parts of about `TOKENS_PER_CALL` tokens."""
        size = max(1, TOKENS_PER_CALL // max(length, self.num_patches // 4))
        for first in range(0, images, size):
            yield slice(first, min(first + size, images))

    def select(
        self, pixels: np.ndarray, K: np.ndarray, most: int, threshold: float | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Compute cross-attention outputs (n, most, D) and which of each image's first K (n,) to keep, (n, most)."""
        results = []
        for part in self.parts_of(len(pixels), self.num_patches):
            reader = Reader(self, pixels[part])
            y = reader.read(0, most) if (K[part] == most).all() else reader.read_each(K[part], most)
            keep = np.arange(most) < K[part, None]
            if threshold is not None:
                keep &= self.dissimilar(y, threshold)
            results.append((y, keep))
        y, keep = (np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*results, strict=True))
        return y, keep

    def dissimilar(self, y: np.ndarray, threshold: float) -> np.ndarray:
        """Return which queries selection keeps, (n, K) bool."""
        if "select" in self.sessions.graphs:
            return self.sessions.run("select", y=y, threshold=np.array(threshold, dtype=np.float32))[0]
        # With the reference "kept", each decision depends on the earlier ones, so it is not a graph.
        return select_queries(torch.from_numpy(y), threshold, self.config.dqs_reference).numpy()

    def trunk(self, y: np.ndarray, query: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """Compute logits (n, labels) from tokens (n, k, D) of queries (n, k); `keep` (n, k) marks those that count."""
        return self.sessions.run("trunk", y=y, query=query, keep=keep)[0]

    def ragged(self, y: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """Compute logits (n, labels) of images that keep different tokens of `y` (n, K, D), those that `keep` marks."""
        if len(y) == 1:  # nothing to group
            query = keep[0].nonzero()[0]
            return self.trunk(y[0, query][None], query[None], np.ones((1, len(query)), dtype=bool))
        lengths = keep.sum(1)
        logits = np.empty((len(y), self.num_labels), dtype=np.float32)
        order = np.argsort(lengths, kind="stable")
        for chosen in self.groups(lengths, order):
            length = lengths[chosen[-1]]
            # The kept queries come first, in order; dropped ones follow as padding.
            query = np.argsort(~keep[chosen], axis=1, kind="stable")[:, :length]
            counted = np.arange(length) < lengths[chosen, None]
            for part in self.parts_of(len(chosen), int(length)):
                tokens = y[chosen[part, None], query[part]]
                logits[chosen[part]] = self.trunk(tokens, query[part], counted[part])
        return logits

    def groups(self, lengths: np.ndarray, order: np.ndarray) -> Iterator[np.ndarray]:
        """Yield groups of images, shortest first, as positions (n,); together they have the lowest cost."""
        values, counts = np.unique(lengths, return_counts=True)
        ends = list(range(1, len(values) + 1))
        if len(values) > 1:
            if self.cost is None:
                self.cost = CallCost.measured(self)
            ends = boundaries(values.tolist(), counts.tolist(), self.cost)
        images = np.concatenate([[0], np.cumsum(counts)])
        first = 0
        for end in ends:
            yield order[images[first] : images[end]]
            first = end

    def start(self, pixel_values: torch.Tensor) -> "OnnxState":
        """Prepare images for few queries first and more later; see `VisualPerceiverForImageClassification.start`.

        Args:
            pixel_values: (B, C, H, W), normalised.
        """
        return OnnxState(self, Reader(self, pixel_values.detach().float().numpy()))


class Reader:
    """Runs the stem lazily: each level is computed when a query first needs it.

    Args:
        engine: The engine.
        x: Images (n, C, H, W), or features of a level.
        level: Level of `x`; -1 for images.
        tokens: (n, N, D) tokens of the level; None if no further query of the level will read them.
    """

    def __init__(self, engine: OnnxPerceiver, x: np.ndarray, level: int = -1, tokens: np.ndarray | None = None):
        self.engine, self.x, self.level, self.tokens = engine, x, level, tokens

    def read(self, first: int, end: int, go_on: bool = False) -> np.ndarray:
        """Compute cross-attention outputs (n, end - first, D) of queries `first` to `end`; calls have to be ascending.

        Args:
            first: The first query.
            end: One after the last query.
            go_on: Keep the state that a further call needs.
        """
        engine, sessions, results = self.engine, self.engine.sessions, []
        spans = engine.spans(first, end)
        for level, a, b in spans:
            query = engine.places[a:b]
            if level == self.level:
                assert self.tokens is not None, "the level is kept for as long as it has queries to read it"
                results += sessions.run("read", tokens=self.tokens, query=query)
                continue
            last = (level, a, b) == spans[-1]
            names = ["y"] if last and not go_on else sessions.outputs(f"level_{level}")
            y, *rest = sessions.run(f"level_{level}", names, x=self.x, query=query)
            results.append(y)
            self.level = level
            if rest:
                self.tokens, self.x = rest[0], rest[-1]
        return results[0] if len(results) == 1 else np.concatenate(results, axis=1)

    def read_each(self, K: np.ndarray, most: int) -> np.ndarray:
        """Like `read` of the first `most` queries, but of each image's first K (n,) only; other outputs are zero."""
        y = np.zeros((len(K), most, self.engine.config.hidden_size), dtype=np.float32)
        rows, reader = np.arange(len(K)), self
        for _, first, end in self.engine.spans(0, most):
            going_on = K[rows] > first
            rows, reader = rows[going_on], reader[going_on]
            y[rows, first:end] = reader.read(first, end, go_on=True)
        return y

    def __getitem__(self, images: np.ndarray | slice) -> "Reader":
        """Select some of the images."""
        tokens = None if self.tokens is None else self.tokens[images]
        return Reader(self.engine, self.x[images], self.level, tokens)

    @classmethod
    def join(cls, readers: list["Reader"]) -> "Reader":
        """Concatenate the images of readers that are at the same level."""
        first = readers[0]
        tokens = None if first.tokens is None else joined([r.tokens for r in readers if r.tokens is not None])
        return cls(first.engine, joined([r.x for r in readers]), first.level, tokens)


class CallCost:
    """A cost model of the trunk in seconds: a constant per call, and a quadratic function of the length per image.

    Args:
        call: Fixed seconds per call.
        image: Coefficients of the seconds per image: c0 + c1 length + c2 length^2.
    """

    def __init__(self, call: float, image: tuple[float, float, float]):
        self.call, self.image = call, image

    def of(self, images: int, length: int) -> float:
        """Seconds of a call with this many images, padded to `length`."""
        constant, linear, quadratic = self.image
        return self.call + images * (constant + linear * length + quadratic * length**2)

    @classmethod
    def measured(cls, engine: OnnxPerceiver) -> "CallCost":
        """Fit the cost model to the times of a few calls of different sizes on this machine."""
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
        # Fit relative errors, as otherwise the longest calls would dominate.
        weights = 1 / np.array(seconds)
        solution = np.linalg.lstsq(np.array(rows) * weights[:, None], np.ones(len(rows)), rcond=None)[0]
        call, constant, linear, quadratic = np.maximum(solution, 0).tolist()
        return cls(call, (constant, linear, quadratic))


def boundaries(lengths: Sequence[int], counts: Sequence[int], cost: CallCost) -> list[int]:
    """Where to cut ascending distinct lengths, `counts` images of each, so that the calls cost least together.

    A call pads its images to the longest. The cheapest cut is a shortest path.

    Returns:
        The end of each call, as an index into `lengths`; the last is their number.

    Example:
        >>> boundaries([1, 2, 3, 40], [1, 1, 1, 1], CallCost(10, (0, 1, 0)))
        [3, 4]
    """
    best, cut = [0.0], [0]  # for the first j lengths: the least cost, and the start of the last call
    for j in range(1, len(lengths) + 1):
        options, images = [], 0
        for i in range(j - 1, -1, -1):
            images += counts[i]
            options.append((best[i] + cost.of(images, lengths[j - 1]), i))
        least, begin = min(options)
        best.append(least)
        cut.append(begin)
    ends = [len(lengths)]
    while cut[ends[-1]]:
        ends.append(cut[ends[-1]])
    return ends[::-1]


class OnnxState:
    """Images with the state of some queries, which more queries can extend; see `IncrementalState`.

    Args:
        engine: The engine.
        reader: The images.
    """

    def __init__(self, engine: OnnxPerceiver, reader: Reader):
        D, images = engine.config.hidden_size, len(reader.x)
        self.engine, self.reader = engine, reader
        self.y = np.empty((images, 0, D), dtype=np.float32)  # (B, K, D) cross-attention outputs
        self.past: np.ndarray | None = None  # keys and values in each block, (B, 2 (L + 1), H, K, d)

    @property
    def num_active_queries(self) -> int:
        """K so far; 0 before the first call of `extend`."""
        return self.y.shape[1]

    def extend(self, num_active_queries: int | None = None) -> Any:
        """Compute logits with the first K queries, or all if None, continuing from the queries so far.

        Raises:
            ValueError: If K is out of range, not the same for all images or smaller than before.
        """
        engine, before = self.engine, self.num_active_queries
        K = engine.config.queries_of_all(num_active_queries, least=before)
        causal = engine.config.trunk_attention == "block_causal"
        # Queries attend to their whole block, so a block that was cut off has to be recomputed. If K is unchanged, only
        # the last block is recomputed, to get the logits.
        ends = [0, *engine.config.block_ends] if causal else [0]
        start = max(end for end in ends if end <= before and end < K)
        parts, readers, read, logits, past = engine.parts_of(len(self.y), K - start), [], [], [], []
        for part in parts:
            reader, y = self.reader[part], self.y[part]
            if before < K:
                y = np.concatenate([y, reader.read(before, K, go_on=True)], axis=1)
            readers.append(reader)
            read.append(y)
            if causal:
                query, new = engine.places[start:K], np.ascontiguousarray(y[:, start:])
                answer, kept = engine.sessions.run("extend", y=new, query=query, past=self.past_of(part, start))
                past.append(kept)
            else:
                keep = np.ones((len(y), K), dtype=bool)
                answer = engine.trunk(y, np.repeat(engine.places[None, :K], len(y), 0), keep)
            logits.append(answer)
        self.reader, self.y = Reader.join(readers), joined(read)
        self.past = joined(past) if causal else None
        active = (torch.arange(engine.num_queries) < K).repeat(len(self.y), 1)
        return VisualPerceiverImageClassifierOutput(logits=torch.from_numpy(joined(logits)), active_queries=active)

    def past_of(self, images: slice, length: int) -> np.ndarray:
        """Keys and values of the first `length` queries of some images, (n, 2 (L + 1), H, length, d)."""
        if self.past is not None:
            return np.ascontiguousarray(self.past[images, :, :, :length])
        config, n = self.engine.config, len(self.y[images])
        heads = config.num_attention_heads
        shape = (n, 2 * (config.num_hidden_layers + 1), heads, 0, config.hidden_size // heads)
        return np.empty(shape, dtype=np.float32)

    def __getitem__(self, images: torch.Tensor) -> "OnnxState":
        """Select the state of some of the images: (B,) bool or indices."""
        chosen = images.numpy()
        state = OnnxState(self.engine, self.reader[chosen])
        state.y = self.y[chosen]
        state.past = None if self.past is None else self.past[chosen]
        return state


def joined(parts: list[np.ndarray]) -> np.ndarray:
    """Concatenate arrays along the first axis; a single array is returned without a copy."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
