"""The network as fewer, larger operations, for inference on CPUs; the numbers stay those of the modules it is made from.

What is done, and why (docs/cpu.md says more):

- Chunks. A batch goes through the trunk a few thousand tokens at a time, so that activations stay in the cache and the
  allocator hands out the same memory again, instead of fresh pages for each large tensor.
- oneDNN's linears, with what follows a linear (GELU, the residual sum) done while its output is still in registers.
- Folding. What does not depend on the image is computed once: the projected queries; the affine part of a norm, which
  goes into the next linear. A query q scores a token x by q . (W_k x) = (W_k^T q) . x and reads
  sum a (W_v x) = W_v (sum a x), so where queries are few, keys and values need not be computed for every token:
  of 2 N D^2 multiply-accumulates of the reading none are left, K D^2 come instead. The decoder, with its one query, likewise.

Shapes: B images, N patches, K active queries, Q learned queries, D width, H heads, d = D / H, T tokens of a packed batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .query_selection import select_queries


# Large enough for a matrix product to be efficient, small enough that no tensor of a chunk makes glibc return its memory to
# the system, as it does with what is freed beyond some megabytes; the next one would have to be paged in anew.
TOKENS_PER_CHUNK = 1024
# As many chunks, with all queries kept, have their cross-attention outputs in memory at once: enough images to find some of
# each length, so that memory does not grow with the batch.
WINDOW = 16

# Of the activations in ACT2FN, those that oneDNN applies to a linear's output, with its name for their variant.
ONEDNN_ACTIVATIONS = {"gelu": ("gelu", "none"), "gelu_pytorch_tanh": ("gelu", "tanh"), "relu": ("relu", "")}


def onednn_linears(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN's fused linears, for tensors of this device and dtype."""
    return (
        device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
    )


def copied(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor of its own."""
    return parameter.to(dtype, copy=True).contiguous()


class FusedLinear:
    """A frozen linear, with what comes after it.

    Args:
        weight: (out, in).
        bias: (out,), or None.
        dtype: Of the computation.
        gain: (in,) of a norm before the linear; it and `shift` go into the weights.
        shift: (in,) of that norm.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        gain: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ):
        if shift is not None:
            moved = weight @ shift
            bias = moved if bias is None else bias + moved
        if gain is not None:
            weight = weight * gain
        self.weight = copied(weight, dtype)
        self.bias = None if bias is None else copied(bias, dtype)
        self.fused = onednn_linears(weight.device, dtype)
        if self.fused:
            # In the order in which oneDNN reads them; 64 rows: other numbers of rows use the same order.
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, 64)

    @classmethod
    def of(cls, linear: nn.Linear, dtype: torch.dtype, norm: nn.LayerNorm | None = None) -> "FusedLinear":
        """A module's, with the affine part of the norm before it."""
        return cls(linear.weight, linear.bias, dtype, *((norm.weight, norm.bias) if norm is not None else ()))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        if not self.fused:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def activated(self, x: torch.Tensor, name: str, module: nn.Module) -> torch.Tensor:
        """The activation `name`, which `module` computes, of the linear."""
        if not self.fused or name not in ONEDNN_ACTIVATIONS:
            return module(self(x))
        operation, variant = ONEDNN_ACTIVATIONS[name]
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, operation, [], variant)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The linear of `x`, plus `residual` (..., out)."""
        if not self.fused:
            return F.linear(x, self.weight, self.bias).add_(residual)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")


class FusedMLP:
    """x + fc2(act(fc1(norm(x)))): (T, D) -> (T, D)."""

    def __init__(self, norm: nn.LayerNorm, mlp: Any, activation: str, dtype: torch.dtype):
        self.eps, self.activation, self.module = norm.eps, activation, mlp.act
        self.fc1, self.fc2 = FusedLinear.of(mlp.fc1, dtype, norm), FusedLinear.of(mlp.fc2, dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc1.activated(normalised(x, self.eps), self.activation, self.module)
        return self.fc2.plus(y, x)


def normalised(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer norm over the last dimension without its affine part."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, recurring: bool = True
) -> torch.Tensor:
    """softmax(scale q k^T) v, by what is fastest: (n, H, L_q, d), (n, H, L, d) x 2 -> (n, H, L_q, d).

    `recurring` says that the next batch will have these shapes again.
    """
    # torch's fused attention on CPUs is slower in bf16 than three plain operations, for whose products oneDNN however
    # compiles code for each new shape.
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and recurring:
        return (query @ key.transpose(-2, -1)).mul_(scale).softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


@dataclass(frozen=True)
class Group:
    """Images of the same number of tokens, neighbours in a packed batch: rows [first, first + images * length)."""

    first: int
    images: int
    length: int
    recurring: bool = False  # whether the next batch will have such a group again

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.images * self.length)


class FusedBlock:
    """One self-attention block on packed tokens: (T, D) -> (T, D)."""

    def __init__(self, layer: Any, activation: str, dtype: torch.dtype):
        self.eps, self.heads, self.scale = layer.norm1.eps, layer.attention.num_heads, layer.attention.scaling
        self.qkv = FusedLinear.of(layer.attention.qkv, dtype, layer.norm1)
        self.proj = FusedLinear.of(layer.attention.proj, dtype)
        self.mlp = FusedMLP(layer.norm2, layer.mlp, activation, dtype)

    def __call__(self, x: torch.Tensor, groups: Sequence[Group]) -> torch.Tensor:
        qkv = self.qkv(normalised(x, self.eps))  # (T, 3 D)
        if len(groups) == 1 and groups[0].length > 1 and groups[0].rows.stop == len(x):
            y = self.read(qkv, groups[0]).flatten(2).flatten(0, 1)  # on CPUs a view of what attention wrote
            return self.mlp(self.proj.plus(y, x))
        # Rows that belong to no image hold numbers too, or they could slow the arithmetic down.
        y = torch.empty_like(x) if groups[-1].rows.stop == len(x) else torch.zeros_like(x)
        for group in groups:
            target = y[group.rows].view(group.images, group.length, self.heads, -1)
            if group.length == 1:  # a token alone reads itself
                target.copy_(qkv[group.rows].view(group.images, 1, 3, self.heads, -1)[:, :, 2])
            else:
                target.copy_(self.read(qkv[group.rows], group))
        return self.mlp(self.proj.plus(y, x))

    def read(self, qkv: torch.Tensor, group: Group) -> torch.Tensor:
        """Attention within the images of a group, from its rows (n L, 3 D): (n, L, H, d)."""
        parts = qkv.view(group.images, group.length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind()  # (n, H, L, d)
        return attention(query, key, value, self.scale, group.recurring).transpose(1, 2)


class FoldedReading:
    """What learned queries read from tokens, without keys and values of the tokens.

    Args:
        block: The cross-attention block.
        dtype: Of the computation.
    """

    def __init__(self, block: Any, dtype: torch.dtype):
        D, H = block.queries.shape[1], block.num_heads
        gain, shift = block.norm_inputs.weight, block.norm_inputs.bias
        key, value = block.key_value.weight.view(2, H, D // H, D).unbind()  # (H, d, D)
        queries = block.query(block.norm_queries(block.queries)).unflatten(-1, (H, -1))  # (Q, H, d)
        # The key's bias and the norm's shift add the same to all scores of a query, which softmax takes away again.
        scorers = torch.einsum("qhd,hdc->hqc", queries, key) * gain * block.scaling
        self.eps, self.heads = block.norm_inputs.eps, H
        self.scorers = scorers.to(dtype).contiguous()  # (H, Q, D)
        bias = value @ shift  # (H, d)
        if block.key_value.bias is not None:
            bias = bias + block.key_value.bias.view(2, H, -1)[1]
        self.value = (value * gain).transpose(1, 2).to(dtype).contiguous()  # (H, D, d)
        self.value_bias = bias[:, None].to(dtype)  # (H, 1, d)

    def read(self, tokens: torch.Tensor, K: int, recurring: bool = True) -> torch.Tensor:
        """Weighted means of the normalised tokens: (n, N, D) -> (H, n, K, D); `recurring` as for `attention`."""
        z = normalised(tokens, self.eps)[:, None].expand(-1, self.heads, -1, -1)  # (n, H, N, D)
        query = self.scorers[None, :, :K].expand(z.shape[0], -1, -1, -1)  # (n, H, K, D)
        return attention(query, z, z, 1.0, recurring).transpose(0, 1)

    def values(self, read: torch.Tensor) -> torch.Tensor:
        """softmax(q k^T / sqrt(d)) v of what was read: (H, n, K, D) -> (n, K, D)."""
        H, n, K, _ = read.shape
        y = torch.baddbmm(self.value_bias, read.reshape(H, n * K, -1), self.value)  # (H, n K, d)
        return y.transpose(0, 1).reshape(n, K, -1)


class FastPerceiver:
    """Patches to what the output query reads, from a snapshot of a network's weights.

    Args:
        parts: The network: a `PerceiverParts` with a decoder.
        dtype: Of weights and activations; None is that of the network.
        tokens_per_chunk: Tokens that go through the trunk together; None is `TOKENS_PER_CHUNK`.
    """

    @torch.no_grad()
    def __init__(self, parts: Any, dtype: torch.dtype | None = None, tokens_per_chunk: int | None = None):
        tokens_per_chunk = TOKENS_PER_CHUNK if tokens_per_chunk is None else tokens_per_chunk
        if tokens_per_chunk < 1:
            raise ValueError(f"Expected `tokens_per_chunk` to be at least 1, got {tokens_per_chunk}.")
        self.config = parts.config
        self.dtype, self.tokens_per_chunk = dtype or parts.cross_attention.queries.dtype, tokens_per_chunk
        act, dtype = self.config.hidden_act, self.dtype
        projection = parts.embeddings.patch_embeddings.projection
        self.patches = FusedLinear(projection.weight.flatten(1), projection.bias, dtype)
        self.positions = copied(parts.embeddings.position_embeddings, dtype)  # (1, N, D)
        reader, decoder = parts.cross_attention, parts.decoder
        self.reading, self.reading_mlp = FoldedReading(reader, dtype), FusedMLP(reader.norm, reader.mlp, act, dtype)
        self.reading_proj, self.queries = FusedLinear.of(reader.proj, dtype), copied(reader.queries, dtype)
        self.blocks = [FusedBlock(layer, act, dtype) for layer in parts.layers]
        self.decoding, self.decoding_mlp = (
            FoldedReading(decoder, dtype),
            FusedMLP(decoder.norm, decoder.mlp, act, dtype),
        )
        self.decoding_proj, self.output_query = FusedLinear.of(decoder.proj, dtype), copied(decoder.queries, dtype)
        self.norm = (copied(parts.norm.weight, dtype), copied(parts.norm.bias, dtype), parts.norm.eps)

    def __call__(
        self, pixel_values: torch.Tensor, K: int, threshold: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the output query reads of each image, (B, D), and the active queries, (B, Q) bool.

        Args:
            pixel_values: (B, C, H, W), normalised, of the config's size.
            K: Use the first K queries.
            threshold: Drop those of them that are more similar than this to an earlier one.
        """
        window = max(1, WINDOW * self.tokens_per_chunk // K)
        results = [self.answer(images.to(self.dtype), K, threshold) for images in pixel_values.split(window)]
        pooled, keep = (torch.cat(parts) for parts in zip(*results, strict=True))
        return pooled, F.pad(keep, (0, self.config.num_queries - K))

    def answer(self, pixel_values: torch.Tensor, K: int, threshold: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """As `__call__`, for images whose cross-attention outputs are in memory together; the second is (B, K)."""
        B = pixel_values.shape[0]
        if threshold is None:
            size, reads = max(1, self.tokens_per_chunk // K), []
            y = torch.cat([part.flatten(0, 1) for part in self.read(pixel_values, K)])  # (B K, D)
            for part in y.split(size * K):
                n = part.shape[0] // K
                reads.append(self.process(part, self.queries[:K].repeat(n, 1), [Group(0, n, K, recurring=True)]))
            return self.decode(torch.cat(reads, dim=1)), torch.ones(B, K, dtype=torch.bool, device=y.device)
        masks, kept = [], []
        for part in self.read(pixel_values, K):
            masks.append(select_queries(part, threshold, self.config.dqs_reference))
            kept.append(part[masks[-1]])
        keep, y = torch.cat(masks), torch.cat(kept)  # (B, K), (T, D)
        del kept
        lengths = keep.sum(1)
        # The row of each kept query in y.
        row = (lengths.cumsum(0) - lengths)[:, None] + keep.cumsum(1) - 1  # (B, K)
        lengths, order = lengths.sort(stable=True)
        reads = []
        for first, last, groups in chunks(lengths.tolist(), self.tokens_per_chunk):
            chosen = order[first:last]
            mask = keep[chosen]
            rows, query = row[chosen][mask], mask.nonzero()[:, 1]
            # oneDNN compiles code for each new number of rows, which takes longer than to compute some in vain.
            spare = (0, rounded_up(len(rows), self.tokens_per_chunk) - len(rows))
            reads.append(self.process(y[F.pad(rows, spare)], self.queries[F.pad(query, spare)], groups))
        pooled = self.decode(torch.cat(reads, dim=1))
        return torch.empty_like(pooled).index_copy_(0, order, pooled), keep

    def read(self, pixel_values: torch.Tensor, K: int) -> Iterator[torch.Tensor]:
        """Cross-attention outputs of the first K queries, (n, K, D) of n images at a time."""
        N, size = self.config.num_patches, self.config.patch_size
        for images in pixel_values.split(max(1, self.tokens_per_chunk // N)):
            n, C, height, width = images.shape
            grid = images.view(n, C, height // size, size, width // size, size)
            patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(n, N, C * size * size)
            yield self.reading.values(self.reading.read(self.patches(patches).add_(self.positions), K))

    def process(self, y: torch.Tensor, queries: torch.Tensor, groups: Sequence[Group]) -> torch.Tensor:
        """What the decoder's query reads, (H, n, 1, D), from cross-attention outputs of a packed batch, (T, D).

        Rows after those of the last group belong to no image.
        """
        x = self.reading_mlp(self.reading_proj.plus(y, queries))
        for block in self.blocks:
            x = block(x, groups)
        reads = [
            self.decoding.read(x[group.rows].view(group.images, group.length, -1), 1, group.recurring)
            for group in groups
        ]
        return torch.cat(reads, dim=1)

    def decode(self, read: torch.Tensor) -> torch.Tensor:
        """The rest of the decoder and the norm: (H, B, 1, D) -> (B, D)."""
        pooled = self.decoding.values(read).squeeze(1)  # (B, D)
        pooled = self.decoding_proj.plus(pooled, self.output_query.expand_as(pooled).contiguous())
        weight, bias, eps = self.norm
        return F.layer_norm(self.decoding_mlp(pooled), weight.shape, weight, bias, eps)


def rounded_up(tokens: int, tokens_per_chunk: int) -> int:
    """A number of rows of which there are few: the next multiple of a sixteenth of a chunk.

    Example:
        >>> rounded_up(1000, 1024), rounded_up(70, 1024)
        (1024, 128)
    """
    step = max(1, tokens_per_chunk // 16)
    return -(-tokens // step) * step


def chunks(lengths: Sequence[int], tokens_per_chunk: int) -> Iterator[tuple[int, int, list[Group]]]:
    """Cut images, sorted by their number of tokens, in chunks of about `tokens_per_chunk` tokens.

    Yields:
        First and last + 1 image of each chunk, and its groups of images of equal length.

    Example:
        >>> [(first, last, len(groups)) for first, last, groups in chunks([1, 1, 2, 3], tokens_per_chunk=4)]
        [(0, 3, 2), (3, 4, 1)]
    """
    first = 0
    while first < len(lengths):
        last, tokens = first, 0
        groups: list[Group] = []
        while last < len(lengths) and (last == first or tokens + lengths[last] <= tokens_per_chunk):
            length = lengths[last]
            if groups and groups[-1].length == length:
                groups[-1] = Group(groups[-1].first, groups[-1].images + 1, length)
            else:
                groups.append(Group(tokens, 1, length))
            tokens += length
            last += 1
        yield first, last, groups
        first = last
