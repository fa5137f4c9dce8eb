"""The form for GPUs gives the model's numbers, and compiles and records no more than it must. Here it runs on a CPU."""

import copy
import pickle
from functools import partial

import pytest
import torch
from slow_varlen import opaque_varlen, simulate_varlen
from support import small_config
from torch._dynamo.testing import CompileCounter

from hf_visual_perceiver import VisualPerceiverForImageClassification
from hf_visual_perceiver.modeling.compiled_inference import OWN_LIMIT, CompiledPerceiver


close = {"rtol": 0, "atol": 1e-5}
SETTINGS = [(12, None), (5, None), (12, 0.3), (12, 0.9), (7, 0.5), (12, -1), (12, 1)]


@pytest.fixture(params=["varlen", "grouped"])
def model(request, monkeypatch):
    if request.param == "varlen":
        simulate_varlen(monkeypatch, opaque_varlen)
    model = VisualPerceiverForImageClassification(small_config()).eval().visual_perceiver
    model.set_ragged_backend(request.param)
    return model


def expected_of(model, images, K, t):
    output = model(images, num_active_queries=K, dqs_threshold=t)
    return output.pooler_output, output.active_queries


@pytest.mark.parametrize("tokens_per_chunk", [None, 30])
@torch.no_grad()
def test_equals_the_model(model, images, tokens_per_chunk):
    fast = CompiledPerceiver(model, tokens_per_chunk=tokens_per_chunk, compiler=lambda function: function)
    for K, t in SETTINGS:
        pooled, active = fast(images, K, t)
        expected, expected_active = expected_of(model, images, K, t)
        assert torch.equal(active, expected_active)
        torch.testing.assert_close(pooled, expected, **close)


@torch.no_grad()
def test_copies_and_autocast(model, images):
    fast = CompiledPerceiver(model, compiler=partial)
    expected = fast(images, 7)[0]
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(again(images, 7)[0], expected)


@torch.no_grad()
def test_a_snapshot(model, images):
    fast = CompiledPerceiver(model, torch.float64, compiler=lambda function: function)
    before = fast(images, 5)[0]
    assert before.dtype == torch.float64
    model.cross_attention.queries.mul_(2)
    assert torch.equal(fast(images, 5)[0], before)
    with pytest.raises(ValueError, match="`tokens_per_chunk` to be at least 1, got 0"):
        CompiledPerceiver(model, tokens_per_chunk=0)


@torch.no_grad()
def test_compiles_once_and_few_sizes_are_recorded(monkeypatch):
    simulate_varlen(monkeypatch, opaque_varlen)
    torch._dynamo.reset()
    model = VisualPerceiverForImageClassification(small_config(num_hidden_layers=1)).eval().visual_perceiver
    counter, rows = CompileCounter(), set()
    compiler = partial(torch.compile, dynamic=True, fullgraph=True, backend=counter, **OWN_LIMIT)
    fast = CompiledPerceiver(model, compiler=compiler)
    finish = fast.finish
    fast.finish = lambda y, layout: rows.add(layout.num_tokens) or finish(y, layout)
    for seed, (K, t) in enumerate([(12, None), (5, None), (7, None), (12, 0.4), (12, 0.45), (12, 0.5), (11, 0.4)]):
        images = torch.randn(13 + seed % 3, 3, 16, 16)  # not 12, which the compiler would take for K
        pooled, active = fast(images, K, t)
        expected, expected_active = expected_of(model, images, K, t)
        assert torch.equal(active, expected_active)
        torch.testing.assert_close(pooled, expected, **close)
    assert counter.frame_count == 3  # a fixed K; what comes before, and after, T is known
    assert all(T % 8 == 0 for T in rows)


if torch.cuda.is_available():

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
    @torch.no_grad()
    def test_on_a_gpu(images, dtype, tolerance):
        model = VisualPerceiverForImageClassification(small_config()).eval().to("cuda", dtype)
        images, fast = images.to("cuda", dtype), model.optimize_for_inference()
        assert isinstance(fast.engine, CompiledPerceiver)
        for _ in range(3):  # compiled, recorded, replayed
            for K, t in SETTINGS:
                given = fast(images, num_active_queries=K, dqs_threshold=t)
                expected = model(images, num_active_queries=K, dqs_threshold=t)
                if dtype == torch.float32 or t in (None, -1, 1):  # else rounding may tip a similarity
                    assert torch.equal(given.active_queries, expected.active_queries)
                    error = (given.logits - expected.logits).abs().max()
                    assert error <= tolerance * expected.logits.abs().max()
                assert given.logits.isfinite().all()
