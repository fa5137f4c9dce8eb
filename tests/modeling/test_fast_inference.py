"""The optimised form gives the model's numbers, at every budget and however the batch is cut."""

import copy
import pickle
import sys

import pytest
import timm
import torch
from support import run, small_config
from torch import nn

from hf_visual_perceiver import VisualPerceiverForImageClassification
from hf_visual_perceiver.modeling import fast_inference
from hf_visual_perceiver.modeling.attention_groups import GroupCost
from hf_visual_perceiver.modeling.fast_inference import EqualLengths, FusedLinear, MixedLengths, chunks, onednn_linears


close = {"rtol": 0, "atol": 1e-5}
SETTINGS = [
    *({"num_active_queries": K} for K in (1, 2, 7, 12)),
    *({"dqs_threshold": t} for t in (-1, 0.0, 0.3, 0.6, 0.9, 1)),
    {"num_active_queries": 9, "dqs_threshold": 0.5},
]


def random_model(**fields):
    """Every parameter random: with fresh biases and norms, folding them wrongly would change nothing."""
    torch.manual_seed(0)
    model = VisualPerceiverForImageClassification(small_config(**fields)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def images():
    return torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def same(model, fast, images, settings=SETTINGS, **tolerance):
    for arguments in settings:
        expected, given = model(images, **arguments), fast(images, **arguments)
        assert torch.equal(given.active_queries, expected.active_queries), arguments
        torch.testing.assert_close(given.logits, expected.logits, **(tolerance or close))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dqs_reference": "kept"},
        {"num_cross_attention_heads": 2},
        {"qkv_bias": False},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"hidden_act": "relu"},
        {"hidden_act": "silu"},
        {"num_attention_heads": 1},
        {"num_labels": 0},
        {"image_size": (16, 24)},
    ],
    ids=str,
)
def test_equals_the_model(fields):
    model = random_model(**fields)
    images = torch.randn(9, 3, *model.config.image_height_width)
    same(model, model.optimize_for_inference(), images)


def test_the_test_images_keep_different_numbers_of_queries(model, images):
    with torch.no_grad():
        counts = model(images, dqs_threshold=0.9).active_queries.sum(1)
    assert len(counts.unique()) >= 3


@pytest.mark.parametrize("tokens_per_chunk", [1, 5, 12, 13, 40, 10_000])
def test_chunks_change_nothing(model, images, tokens_per_chunk):
    same(model, model.optimize_for_inference(tokens_per_chunk=tokens_per_chunk), images)


def test_the_trained_network(trained):
    images = torch.randn(64, 3, 32, 32)
    fast = trained.optimize_for_inference()
    same(trained, fast, images, [{"num_active_queries": 3}, {"dqs_threshold": 0.7}, {"dqs_threshold": 0.95}, {}])


def test_one_image(model, images):
    same(model, model.optimize_for_inference(), images[:1])


def test_without_onednn(model, images, monkeypatch):
    monkeypatch.setattr(fast_inference, "onednn_linears", lambda device, dtype: False)
    fast = model.optimize_for_inference()
    assert not fast.engine.blocks[0].qkv.fused
    same(model, fast, images)


@pytest.mark.skipif(not onednn_linears(torch.device("cpu"), torch.float32), reason="torch without oneDNN")
def test_onednn_is_used(model):
    assert model.optimize_for_inference().engine.blocks[0].mlp.fc1.fused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(model, images, dtype):
    fast = model.optimize_for_inference(dtype)
    with torch.no_grad():
        logits, expected = fast(images, num_active_queries=7).logits, model(images, num_active_queries=7).logits
    assert fast.dtype == dtype
    assert logits.dtype == torch.float32
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    assert (logits - expected).abs().max() < tolerance * expected.abs().max()


def test_a_cpu_without_avx512(tmp_path):
    """In a process that is told to compute as such a CPU does."""
    environment = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    checked = run(sys.executable, "-c", AS_AVX2, env=environment)
    assert checked.returncode == 0, checked.stderr


AS_AVX2 = """
import torch
from hf_visual_perceiver import VisualPerceiverConfig, VisualPerceiverForImageClassification
from hf_visual_perceiver.training.conditions import cpu_computes_in_bf16
assert not cpu_computes_in_bf16()
config = VisualPerceiverConfig(image_size=16, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_queries=12)
model, images = VisualPerceiverForImageClassification(config).eval(), torch.randn(9, 3, 16, 16)
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
    fast = model.optimize_for_inference(dtype)
    assert fast.engine.blocks[0].qkv.fused == (dtype == torch.float32)
    for knobs in ({}, {"num_active_queries": 7}, {"dqs_threshold": 0.9}):
        expected = model(images, **knobs).logits
        assert (fast(images, **knobs).logits - expected).abs().max() < tolerance * expected.abs().max()
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"trunk_attention": "block_causal"}], ids=["fast", "plain"])
def test_autocast_changes_nothing(images, fields, dtype):
    # The form has a dtype of its own.
    fast = random_model(**fields).optimize_for_inference(dtype)
    for arguments in ({}, {"dqs_threshold": 0.3}):
        expected = fast(images, **arguments)
        with torch.autocast("cpu", torch.bfloat16):
            given = fast(images, **arguments)
        assert torch.equal(given.logits, expected.logits)
        assert torch.equal(given.active_queries, expected.active_queries)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda fast: pickle.loads(pickle.dumps(fast))])
@pytest.mark.parametrize("form", ["fast", "bfloat16", "plain", "timm"])
def test_copies(model, images, form, copied):
    if form == "timm":
        original = timm.create_model("visual_perceiver_nano_patch4_32").eval()
        images = torch.randn(2, 3, 32, 32)
    else:
        original = random_model(trunk_attention="block_causal") if form == "plain" else model
    fast = original.optimize_for_inference(torch.bfloat16 if form == "bfloat16" else None)
    for arguments in ({}, {"dqs_threshold": 0.3}):
        given, expected = copied(fast)(images, **arguments), fast(images, **arguments)
        if form != "timm":
            given, expected = given.logits, expected.logits
        assert torch.equal(given, expected)


def test_the_configs_operating_point_is_the_default(images):
    model = random_model(num_active_queries=3)
    assert model.optimize_for_inference()(images).active_queries.sum(1).tolist() == [3] * 9


def test_timm(model, images):
    network = timm.create_model("visual_perceiver_nano_patch4_32", num_classes=5).eval()
    x = torch.randn(5, 3, 32, 32)
    fast = network.optimize_for_inference()
    with torch.no_grad():
        for arguments in ({}, {"num_active_queries": 4}, {"dqs_threshold": 0.9}):
            torch.testing.assert_close(fast(x, **arguments), network(x, **arguments), **close)
    network.reset_classifier(5, "")
    with pytest.raises(ValueError, match="Expected a model with `global_pool` 'token', got ''"):
        network.optimize_for_inference()


def test_a_snapshot(images):
    model = random_model()
    fast = model.optimize_for_inference()
    before = fast(images).logits
    assert not before.requires_grad
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert torch.equal(fast(images).logits, before)
    with pytest.raises(RuntimeError, match="move or convert the model"):
        fast.to(torch.float64)


def test_bad_input(model, images):
    with pytest.raises(ValueError, match="Expected `tokens_per_chunk` to be at least 1, got 0"):
        model.optimize_for_inference(tokens_per_chunk=0)
    fast = model.optimize_for_inference()
    with pytest.raises(ValueError, match=r"Expected images of size 16x16, got 8x8; load a model with `image_size=...`"):
        fast(images[..., :8, :8])
    with pytest.raises(ValueError, match="num_active_queries"):
        fast(images, num_active_queries=13)


def test_a_linear_with_a_norm_folded_in():
    linear, norm, x = nn.Linear(8, 6), nn.LayerNorm(8), torch.randn(5, 8)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    with torch.no_grad():
        fused = FusedLinear.of(linear, torch.float32, norm)
        torch.testing.assert_close(fused(nn.functional.layer_norm(x, (8,))), linear(norm(x)), **close)
        torch.testing.assert_close(fused.plus(x, torch.ones(5, 6)), fused(x) + 1, **close)


def test_chunks():
    lengths = [1, 1, 2, 2, 2, 5, 9, 9]
    assert list(chunks(lengths, tokens_per_chunk=6)) == [(0, 4), (4, 5), (5, 6), (6, 7), (7, 8)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_attention_of_equal_lengths(dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for images, length in ((5, 1), (5, 7), (1, 130), (40, 4)):
            qkv = torch.randn(images * length, 3 * 12, dtype=dtype)
            expected = by_images(qkv, [length] * images, heads=3)
            given = EqualLengths(images, length).attend(qkv, heads=3)
            torch.testing.assert_close(given.double(), expected, **tolerance(dtype))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("call", [0, 3, 1000], ids=["each length alone", "some together", "all together"])
def test_attention_of_mixed_lengths(dtype, call):
    known = [1, 1, 2, 4, 4, 4, 5, 9]
    layout = MixedLengths(torch.tensor(known), known, rows=40, heads=3, cost=GroupCost(call, call, 1))
    assert len(layout.groups) == {0: 5, 3: 3, 1000: 1}[call]
    qkv = torch.randn(40, 3 * 12, dtype=dtype)
    qkv[30:] = torch.nan  # no image's
    given = layout.attend(qkv, heads=3)
    torch.testing.assert_close(given[:30].double(), by_images(qkv, known, heads=3), **tolerance(dtype))
    assert given.isfinite().all()

    x, images = torch.randn(40, 12), []
    for dense, mask in layout.dense(x):
        held = torch.ones(dense.shape[:2], dtype=torch.bool) if mask is None else mask[:, 0, 0]
        images += [tokens[row] for tokens, row in zip(dense, held, strict=True)]
    assert [len(image) for image in images] == known
    assert torch.equal(torch.cat(images), x[:30])


def by_images(qkv, lengths, heads):
    """Attention one image and head at a time, in float64."""
    outputs = []
    for tokens in qkv[: sum(lengths)].double().split(lengths):
        parts = tokens.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)  # (3, H, L, d)
        outputs.append((parts[0] @ parts[1].mT).softmax(-1) @ parts[2])
    return torch.cat([y.transpose(0, 1).flatten(1) for y in outputs])


def tolerance(dtype):
    return {"rtol": 0, "atol": 3e-2 if dtype == torch.bfloat16 else 1e-5}
