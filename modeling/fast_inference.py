"""The network as fewer, larger operations, for inference on CPUs; the numbers stay those of the modules it is made from.

What is done, and why (docs/cpu.md says more):

- Chunks. A batch goes through the trunk a few thousand tokens at a time, so that activations stay in the cache and the
  allocator hands out the same memory again, instead of fresh pages for each large tensor.
- Attention as plain batched products, and images of nearly equal length padded to share them.
- oneDNN's linears, with what follows a linear (GELU, the residual sum) done while its output is still in registers.
- Folding. What does not depend on the image is computed once: the projected queries; the affine part of a norm, which
  goes into the next linear. A query q scores a token x by q . (W_k x) = (W_k^T q) . x and reads
  sum a (W_v x) = W_v (sum a x), so where queries are few, keys and values need not be computed for every token:
  of 2 N D^2 multiply-accumulates of the reading none are left, K D^2 come instead. The decoder, with its one query, likewise.

Shapes: B images, N patches, K active queries, Q learned queries, D width, H heads, d = D / H, T tokens of a packed batch.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .attention_groups import AttentionGroup, GroupCost, attention_groups
from .query_selection import select_queries


# Large enough for a matrix product to be efficient, small enough that no tensor of a chunk makes glibc return its memory to
# the system, as it does with what is freed beyond some megabytes; the next one would have to be paged in anew.
TOKENS_PER_CHUNK = 1024
# As many chunks, with all queries kept, have their cross-attention outputs in memory at once: enough images to find some of
# each length, so that memory does not grow with the batch.
WINDOW = 16

# Images that all have more tokens than this are left to torch's fused attention, which does not write their weights to memory.
LONGEST_PLAIN = 128
# In bf16 oneDNN's products take longer to begin; so many rows make that good.
FEWEST_PLAIN = 128
# What attention of images of different lengths costs, where everything is gathered anyway: about what
# `python benchmarks/attention_groups.py --form optimized` prints for two threads.
GROUP_COST = GroupCost(call=40, padded_call=50, padded_token=1)

# Of the activations in ACT2FN, those that oneDNN applies to a linear's output, with its name for their variant.
ONEDNN_ACTIVATIONS = {"gelu": ("gelu", "none"), "gelu_pytorch_tanh": ("gelu", "tanh"), "relu": ("relu", "")}


def onednn_linears(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN's fused linears, and this CPU what they need in this dtype."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    names = ["_linear_pointwise", "_reorder_linear_weight"]
    if dtype == torch.bfloat16:
        names.append("_is_mkldnn_bf16_supported")
    if not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


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
        self.reorder()

    def reorder(self) -> None:
        """Bring the weights into the order in which oneDNN reads them, if it does here."""
        self.fused = onednn_linears(self.weight.device, self.weight.dtype)
        if self.fused:
            # 64 rows: other numbers of rows use the same order.
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, 64)

    def __getstate__(self) -> dict[str, Any]:
        # What oneDNN has reordered cannot be copied, and another machine may have another order.
        return {**self.__dict__, "weight": self.weight.to_dense() if self.fused else self.weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.reorder()

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


def plain_products_are_faster(qkv: torch.Tensor, length: int) -> bool:
    """Whether two batched products and a softmax beat torch's fused attention, for images of so many tokens each.

    The fused one, whose products MKL gives to one thread each, gains little from a second thread in float32.
    """
    if qkv.device.type != "cpu" or length > LONGEST_PLAIN:
        return False
    return torch.get_num_threads() > 1 if qkv.dtype == torch.float32 else qkv.shape[0] >= FEWEST_PLAIN


def normalised(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer norm over the last dimension without its affine part."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    recurring: bool = True,
) -> torch.Tensor:
    """softmax(scale q k^T) v, by what is fastest: (n, H, L_q, d), (n, H, L, d) x 2 -> (n, H, L_q, d).

    `mask`, (n, 1, 1, L) bool, says which keys there are; `recurring`, that the next batch will have these shapes again.
    """
    # torch's fused attention on CPUs is slower in bf16 than three plain operations, for whose products oneDNN however
    # compiles code for each new shape.
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and recurring and mask is None:
        return (query @ key.transpose(-2, -1)).mul_(scale).softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


class EqualLengths:
    """The images of a packed batch with the same number of tokens in all, the same again in the next batch.

    Args:
        images: n.
        length: L; the batch has n L rows.
    """

    recurring = True

    def __init__(self, images: int, length: int):
        self.images, self.length = images, length

    def attend(self, qkv: torch.Tensor, heads: int) -> torch.Tensor:
        """Attention within each image, from scaled queries, keys and values: (n L, 3 D) -> (n L, D)."""
        n, L = self.images, self.length
        parts = qkv.view(n, L, 3, heads, -1).permute(2, 0, 3, 1, 4)  # (3, n, H, L, d)
        if L == 1:  # a token alone reads itself
            y = parts[2]
        elif plain_products_are_faster(qkv, L):
            query, key, value = parts.reshape(3, n * heads, L, -1).unbind()
            y = torch.bmm(torch.bmm(query, key.transpose(1, 2)).softmax(-1), value).view(n, heads, L, -1)
        else:
            query, key, value = parts.unbind()
            y = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return y.transpose(1, 2).reshape(n * L, -1)

    def dense(self, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, None]]:
        """Images that are read together: (n L, D) -> (n, L, D), and no mask."""
        yield x.view(self.images, self.length, -1), None


class MixedLengths:
    """The images of a packed batch, shortest first, that have different numbers of tokens.

    Near lengths attend together, padded to the longest. One gathering copy brings queries, keys and values of all heads to
    where plain products take them, and is the same for all blocks.

    Args:
        lengths: (n,) tokens of each image, ascending.
        known: The same, as integers.
        rows: Of the packed batch; those after the last image's belong to none.
        heads: H.
        cost: By which lengths are put together; None is `GROUP_COST`.
    """

    recurring = False

    def __init__(
        self, lengths: torch.Tensor, known: Sequence[int], rows: int, heads: int, cost: GroupCost | None = None
    ):
        self.groups, self.device = attention_groups(lengths, known, cost or GROUP_COST), lengths.device
        head = torch.arange(heads, device=self.device)
        sources, targets, self.runs = [], [], []
        start = 0
        for group in self.groups:
            n, L = group.images, group.length
            # Row t of the packed batch holds query, key and value, of H heads each: its pieces 3 H t to 3 H t + 3 H - 1.
            sources.append((self.rows_of(group).view(n, 1, L) * 3 * heads + head[:, None]).flatten())  # n, H, L
            places = torch.arange(group.tokens, device=self.device) if group.places is None else group.places
            targets.append((start + places // L * heads * L + places % L)[:, None] + L * head)  # (tokens, H)
            mask = None
            if group.mask is not None:
                mask = torch.zeros(group.mask.shape, device=self.device).masked_fill(~group.mask, -torch.inf)
            self.runs.append((slice(start, start + n * heads * L), (n, heads, L), mask))
            start += n * heads * L
        self.source = (torch.cat(sources) + heads * torch.arange(3, device=self.device)[:, None]).flatten()
        tokens = torch.cat(targets)
        # Rows that belong to no image get numbers too, or they could slow the arithmetic down.
        self.target = F.pad(tokens, (0, 0, 0, rows - len(tokens))).flatten()

    def rows_of(self, group: AttentionGroup) -> torch.Tensor:
        """(n L,) the row at each place of a group."""
        if group.rows is not None:
            return group.rows
        return torch.arange(group.first, group.first + group.tokens, device=self.device)

    def attend(self, qkv: torch.Tensor, heads: int) -> torch.Tensor:
        """Attention within each image, from scaled queries, keys and values: (T, 3 D) -> (T, D)."""
        T, dtype = qkv.shape[0], qkv.dtype
        parts = qkv.view(T * 3 * heads, -1).index_select(0, self.source)
        if dtype == torch.bfloat16:  # oneDNN would compile code for each new shape of a product, MKL does not
            parts = parts.float()
        query, key, value = parts.view(3, -1, parts.shape[-1]).unbind()
        y = torch.empty_like(query)
        for run, (n, H, L), mask in self.runs:
            q, k, v, out = (x[run].view(n * H, L, -1) for x in (query, key, value, y))
            scores = torch.bmm(q, k.transpose(1, 2))
            if mask is not None:
                scores.view(n, H, L, L).add_(mask)
            torch.bmm(scores.softmax(-1), v, out=out)
        return y.to(dtype).index_select(0, self.target).view(T, -1)

    def dense(self, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Images that are read together: (T, D) -> (n, L, D), and a mask (n, 1, 1, L) or None, of each group."""
        for group in self.groups:
            yield x[self.rows_of(group)].view(group.images, group.length, -1), group.mask


class FusedBlock:
    """One self-attention block on packed tokens: (T, D) -> (T, D)."""

    def __init__(self, layer: Any, activation: str, dtype: torch.dtype):
        attention, norm = layer.attention, layer.norm1
        self.eps, self.heads = norm.eps, attention.num_heads
        # The queries come out scaled.
        scales = torch.ones(3, 1, device=norm.weight.device, dtype=norm.weight.dtype)
        scales[0] = attention.scaling
        scales = scales.expand(-1, len(norm.weight)).flatten()  # (3 D,)
        bias = attention.qkv.bias
        self.qkv = FusedLinear(
            attention.qkv.weight * scales[:, None],
            None if bias is None else bias * scales,
            dtype,
            norm.weight,
            norm.bias,
        )
        self.proj = FusedLinear.of(attention.proj, dtype)
        self.mlp = FusedMLP(layer.norm2, layer.mlp, activation, dtype)

    def __call__(self, x: torch.Tensor, layout: EqualLengths | MixedLengths) -> torch.Tensor:
        y = layout.attend(self.qkv(normalised(x, self.eps)), self.heads)
        return self.mlp(self.proj.plus(y, x))


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

    def read(
        self, tokens: torch.Tensor, K: int, mask: torch.Tensor | None = None, recurring: bool = True
    ) -> torch.Tensor:
        """Weighted means of the normalised tokens: (n, N, D) -> (H, n, K, D); `mask` and `recurring` as for `attention`."""
        z = normalised(tokens, self.eps)[:, None].expand(-1, self.heads, -1, -1)  # (n, H, N, D)
        query = self.scorers[None, :, :K].expand(z.shape[0], -1, -1, -1)  # (n, H, K, D)
        return attention(query, z, z, 1.0, mask, recurring).transpose(0, 1)

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
                reads.append(self.process(part, self.queries[:K].repeat(n, 1), EqualLengths(n, K)))
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
        known, reads = lengths.tolist(), []
        for first, last in chunks(known, self.tokens_per_chunk):
            chosen = order[first:last]
            mask = keep[chosen]
            rows, query = row[chosen][mask], mask.nonzero()[:, 1]
            # oneDNN compiles code for each new number of rows, which takes longer than to compute some in vain.
            T = rounded_up(len(rows), self.tokens_per_chunk)
            spare = (0, T - len(rows))
            layout = MixedLengths(lengths[first:last], known[first:last], T, self.blocks[0].heads)
            reads.append(self.process(y[F.pad(rows, spare)], self.queries[F.pad(query, spare)], layout))
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

    def process(self, y: torch.Tensor, queries: torch.Tensor, layout: EqualLengths | MixedLengths) -> torch.Tensor:
        """What the decoder's query reads, (H, n, 1, D), from cross-attention outputs of a packed batch, (T, D)."""
        x = self.reading_mlp(self.reading_proj.plus(y, queries))
        for block in self.blocks:
            x = block(x, layout)
        reads = [self.decoding.read(tokens, 1, mask, layout.recurring) for tokens, mask in layout.dense(x)]
        return torch.cat(reads, dim=1)

    def decode(self, read: torch.Tensor) -> torch.Tensor:
        """The rest of the decoder and the norm: (H, B, 1, D) -> (B, D)."""
        pooled = self.decoding.values(read).squeeze(1)  # (B, D)
        pooled = self.decoding_proj.plus(pooled, self.output_query.expand_as(pooled).contiguous())
        weight, bias, eps = self.norm
        return F.layer_norm(self.decoding_mlp(pooled), weight.shape, weight, bias, eps)


def rounded_up(tokens: int, tokens_per_chunk: int) -> int:
    """A number of rows of which there are few: the next multiple of a 64th of a chunk.

    Example:
        >>> rounded_up(1000, 1024), rounded_up(70, 1024)
        (1008, 80)
    """
    step = max(1, tokens_per_chunk // 64)
    return -(-tokens // step) * step


def chunks(lengths: Sequence[int], tokens_per_chunk: int) -> Iterator[tuple[int, int]]:
    """Cut images, sorted by their number of tokens, in chunks of about `tokens_per_chunk` tokens.

    Yields:
        First and last + 1 image of each chunk.

    Example:
        >>> list(chunks([1, 1, 2, 3], tokens_per_chunk=4))
        [(0, 3), (3, 4)]
    """
    first = 0
    while first < len(lengths):
        last, tokens = first, 0
        while last < len(lengths) and (last == first or tokens + lengths[last] <= tokens_per_chunk):
            tokens += lengths[last]
            last += 1
        yield first, last
        first = last
