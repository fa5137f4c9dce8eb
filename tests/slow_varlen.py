"""Variable-length attention for tests on machines without it."""

import torch

from hf_visual_perceiver.modeling import ragged, visual_perceiver_layers


def slow_varlen(query, key, value, query_offsets, key_offsets, max_queries, max_keys):
    """torch's `varlen_attn` written out, with its requirements."""
    assert query_offsets.dtype == key_offsets.dtype == torch.int32
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    assert query_offsets[-1] == len(query)
    assert key_offsets[-1] <= len(key) == len(value)
    outputs = []
    for i in range(len(query_offsets) - 1):
        q = query[query_offsets[i] : query_offsets[i + 1]]
        k, v = (x[key_offsets[i] : key_offsets[i + 1]] for x in (key, value))
        assert len(q) <= max_queries
        assert len(k) <= max_keys
        assert len(k) or not len(q)
        weights = torch.einsum("qhd,khd->hqk", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


@torch.library.custom_op("visual_perceiver_tests::slow_varlen", mutates_args=())
def opaque_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_offsets: torch.Tensor,
    key_offsets: torch.Tensor,
    max_queries: int,
    max_keys: int,
) -> torch.Tensor:
    """`slow_varlen` as a custom operation, which the compiler treats like the real one."""
    return slow_varlen(query, key, value, query_offsets, key_offsets, max_queries, max_keys)


@opaque_varlen.register_fake
def _(query, *_):
    return query.new_empty(query.shape)


def simulate_varlen(monkeypatch, function=slow_varlen):
    """Make the model use `function` in place of torch's CUDA kernel, on this device and in this dtype."""
    monkeypatch.setattr(ragged, "varlen_needs", lambda *_: "")
    monkeypatch.setattr(visual_perceiver_layers, "torch_varlen_attention", lambda: function)
