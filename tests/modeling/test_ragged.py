"""Every ragged backend equals the masked form and one image at a time, including gradients."""

import copy
import warnings

import pytest
import torch
from slow_varlen import opaque_varlen, simulate_varlen, slow_varlen
from support import small_config
from torch._dynamo.testing import CompileCounter

from hf_visual_perceiver import VisualPerceiverForImageClassification
from hf_visual_perceiver.modeling import Budget, Pass, ragged
from hf_visual_perceiver.modeling.ragged import PackedLayout, resolve_backend


close = {"rtol": 0, "atol": 1e-5}
CPU = torch.device("cpu")
# Where each backend runs. A CPU has no variable-length attention, so its bookkeeping runs with a slow stand-in.
PLACES = ["cpu grouped", "cpu varlen"]
if torch.cuda.is_available():
    PLACES += ["cuda grouped", "cuda varlen"]
# Only the first query, some, nearly all and all, of all or of the first.
POINTS = [(12, -1), (12, 0.3), (12, 0.9), (12, 1), (7, 0.5), (1, 0.5)]


@pytest.fixture
def simulated_varlen(monkeypatch):
    """Simulate variable-length attention on a CPU, slowly."""
    simulate_varlen(monkeypatch)


@pytest.fixture(params=PLACES)
def place(request, monkeypatch):
    """A device and a backend."""
    device, backend = request.param.split()
    if request.param == "cpu varlen":
        request.getfixturevalue("simulated_varlen")
    return device, backend


def model_on(device, backend, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    model = VisualPerceiverForImageClassification(small_config(**fields)).to(device, dtype)
    model.set_ragged_backend(backend)
    return model


def half(device, backend):
    """The dtype of the comparison; the real variable-length kernel does not support float32."""
    return torch.bfloat16 if (device, backend) == ("cuda", "varlen") else torch.float32


def assert_as_good(given, reference, exact, name=""):
    """Assert equality with the reference in float32; in half precision, about the same error as the reference."""
    if given.dtype == torch.float32:
        scale = exact.abs().max().clamp(min=1)
        assert (given - exact).abs().max() <= 1e-5 * scale, name
        return
    error, usual = ((x.float() - exact).norm() for x in (given, reference))
    assert error <= 2 * usual + 1e-3 * exact.norm(), name


def logits_and_gradients(model, images, **arguments):
    model.zero_grad()
    labels = torch.arange(len(images), device=images.device) % 5
    output = model(images, labels=labels, **arguments)
    output.loss.backward()
    return output.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("K", "t"), POINTS)
def test_equals_the_masked_form_with_gradients(place, images, K, t):
    device, backend = place
    images, dtype = images.to(device), half(device, backend)
    arguments = {"num_active_queries": K, "dqs_threshold": t}
    exact = logits_and_gradients(model_on(device, "masked"), images, **arguments)
    masked = logits_and_gradients(model_on(device, "masked", dtype), images.to(dtype), **arguments)
    given = logits_and_gradients(model_on(device, backend, dtype), images.to(dtype), **arguments)
    assert_as_good(given[0], masked[0], exact[0])
    for name, gradient in given[1].items():
        assert_as_good(gradient, masked[1][name], exact[1][name], name)


@pytest.mark.parametrize("t", [0.3, 0.9])
@torch.no_grad()
def test_equals_one_image_at_a_time(place, images, t):
    device, backend = place
    dtype = half(device, backend)
    images, model = images.to(device, dtype), model_on(device, backend, dtype).eval()
    output = model(images, dqs_threshold=t)
    assert len(output.active_queries.sum(1).unique()) > 2
    alone = torch.cat([model(image[None], dqs_threshold=t).logits for image in images])
    atol = 1e-5 if dtype == torch.float32 else 0.03 * alone.abs().max().item()
    torch.testing.assert_close(output.logits, alone, rtol=0, atol=atol)


def test_subsets_share_a_batch(place, images):
    # The training sandwich: prefixes and selections, of the same images and of others, in one pass through the trunk.
    device, backend = place
    images, dtype = images.to(device), half(device, backend)
    subsets = [
        Pass(Budget(num_active_queries=12)),
        Pass(Budget(num_active_queries=1)),
        Pass(Budget(num_active_queries=7)),
        Pass(Budget(dqs_threshold=0.3)),
        Pass(Budget(num_active_queries=5), slice(3)),
    ]

    def run(model, dtype, together):
        model.zero_grad()
        model.packs_passes = together
        results = model.forward_budgets(images.to(dtype), subsets)
        sum((i + 1) * logits.square().sum() for i, logits in enumerate(results)).backward()
        return [logits.detach() for logits in results], {n: p.grad.clone() for n, p in model.named_parameters()}

    exact = run(model_on(device, "masked"), torch.float32, False)
    masked = run(model_on(device, "masked", dtype), dtype, False)
    given = run(model_on(device, backend, dtype), dtype, True)
    for results in zip(given[0], masked[0], exact[0], strict=True):
        assert_as_good(*results)
    for name, gradient in given[1].items():
        assert_as_good(gradient, masked[1][name], exact[1][name], name)


def test_autocast_in_training(place, images):
    device, backend = place
    images, labels = images.to(device), torch.arange(8, device=device) % 5
    losses = []
    for name in (backend, "masked"):
        model = model_on(device, name)
        with torch.autocast(device, torch.bfloat16):
            assert model.ragged_backend == name
            loss = model(images, labels=labels, dqs_threshold=0.3).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        losses.append(loss)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.05)


def test_every_image_of_a_batch_of_another_order(place, images):
    device, backend = place
    model = model_on(device, backend, half(device, backend)).eval()
    images, order = images.to(device, half(device, backend)), torch.tensor([3, 1, 0, 7, 6, 2, 5, 4])
    with torch.no_grad():
        a, b = (model(x, dqs_threshold=0.3) for x in (images, images[order]))
        tokens = model.visual_perceiver(images, dqs_threshold=0.3)
    assert torch.equal(a.active_queries[order], b.active_queries)
    torch.testing.assert_close(a.logits[order], b.logits, rtol=0, atol=1e-5 if a.logits.dtype == torch.float32 else 0.1)
    assert torch.equal(tokens.last_hidden_state.ne(0).any(-1), tokens.active_queries)


if torch.cuda.is_available():

    @pytest.mark.parametrize("backend", ["grouped", "varlen"])
    def test_the_host_hardly_waits(backend, images):
        model, images = model_on("cuda", backend, torch.bfloat16).eval(), images.to("cuda", torch.bfloat16)
        with torch.inference_mode(), warnings.catch_warnings(record=True) as caught:
            model(images, dqs_threshold=0.3)
            caught.clear()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                model(images, dqs_threshold=0.3)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [str(w.message) for w in caught if "called a synchronizing" in str(w.message)]
        # One for the lengths; on an H200 with torch 2.11 there is another, whose cause is not known.
        assert 1 <= len(waits) <= 2, waits


class TestChoice:
    """Choice of the backend, and the error if none is available."""

    def test_it_is_visible(self, model):
        assert model.ragged_backend == model.visual_perceiver.ragged_backend == "grouped"
        model.set_ragged_backend("masked")
        assert copy.deepcopy(model).ragged_backend == "masked"
        model.set_ragged_backend()
        assert model.ragged_backend == "grouped"

    def test_auto_takes_variable_lengths_where_they_are(self, model, simulated_varlen):
        assert model.ragged_backend == "varlen"

    def test_of_a_device_without_it(self, model):
        with pytest.raises(ValueError, match=r"available on cpu, grouped or masked, got 'varlen', which needs a CUDA"):
            model.set_ragged_backend("varlen")

    @pytest.mark.parametrize(
        ("setting", "needs"),
        [
            ({}, ""),
            ({"dtype": torch.float32}, "float16 or bfloat16"),
            ({"head_dim": 384}, "at most 256"),
            ({"head_dim": 20}, "a multiple of 8"),
            ({"dropout": 0.1}, "no dropout"),
            ({"dropout": 0.1, "implementation": "flash_attention_2"}, ""),
            ({"implementation": "eager"}, "'sdpa' or a flash attention"),
        ],
    )
    def test_of_a_gpu_by_what_is_computed(self, monkeypatch, setting, needs):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(ragged, "torch_varlen_attention", lambda: print)  # the least torch has none
        gpu = torch.device("cuda")
        setting = {"dtype": torch.bfloat16, **setting}
        assert resolve_backend("auto", gpu, **setting) == ("grouped" if needs else "varlen")
        if needs:
            with pytest.raises(ValueError, match=f"available on cuda, .* needs .*{needs}"):
                resolve_backend("varlen", gpu, **setting)

    def test_of_an_old_gpu_and_an_old_torch(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        with pytest.raises(ValueError, match=r"compute capability 8\.0"):
            resolve_backend("varlen", torch.device("cuda"), torch.float16)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(ragged, "torch_varlen_attention", lambda: None)
        with pytest.raises(ValueError, match=r"torch\.nn\.attention\.varlen"):
            resolve_backend("varlen", torch.device("cuda"), torch.float16)

    def test_of_an_unknown_name(self, model):
        with pytest.raises(ValueError, match="among auto, varlen, grouped, masked, got 'packed'"):
            model.set_ragged_backend("packed")

    def test_the_torch_that_is_here_has_the_function_as_it_is_called(self):
        function = ragged.torch_varlen_attention()
        x, offsets = torch.zeros(2, 1, 8, dtype=torch.bfloat16, device="meta"), torch.zeros(2, dtype=torch.int32)
        if function is not None:  # None is of older versions
            assert function(x, x, x, offsets.to("meta"), offsets.to("meta"), 2, 2).shape == (2, 1, 8)

    def test_a_flash_attention_package_takes_the_offsets(self, images, monkeypatch):
        from transformers import AttentionInterface

        def fake_flash(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
            assert attention_mask is None
            if "cu_seq_lens_q" not in kwargs:
                output = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling)
                return output.transpose(1, 2), None
            asked.append(kwargs["max_length_q"])
            offsets = [kwargs[f"{name}_{x}"] for name in ("cu_seq_lens", "max_length") for x in "qk"]
            return slow_varlen(*(x[0].transpose(0, 1) for x in (query, key, value)), *offsets)[None], None

        asked = []
        AttentionInterface.register("fake_flash_varlen", fake_flash)
        monkeypatch.setattr(ragged, "varlen_needs", lambda *_: "")
        model = model_on("cpu", "masked").eval()
        expected = model(images, dqs_threshold=0.3).logits
        model.config._attn_implementation = "fake_flash_varlen"  # not by its setter, which asks for the package
        model.set_ragged_backend("varlen")
        torch.testing.assert_close(model(images, dqs_threshold=0.3).logits, expected, **close)
        assert asked == [12, 12, 1]  # two blocks, then the decoder with its one query


class TestLayout:
    def test_an_image_that_keeps_nothing(self):
        for backend in ("grouped", "varlen"):
            with pytest.raises(ValueError, match="at least one query, got an image that keeps none"):
                PackedLayout.from_mask(torch.tensor([[True, False], [False, False]]), backend)

    @pytest.mark.parametrize("backend", ["grouped", "varlen"])
    def test_unpacking_restores_what_was_packed(self, backend):
        keep = torch.rand(9, 7) < 0.5
        keep[:, 0] = True
        layout, x = PackedLayout.from_mask(keep, backend), torch.randn(9, 7, 3)
        assert layout.num_tokens == keep.sum()
        torch.testing.assert_close(layout.unpack(layout.pack(x)), x * keep[..., None], rtol=0, atol=0)
        assert torch.equal(layout.unsort(x[layout.positions]), x)

    @pytest.mark.parametrize("round_to", [1, 2, 7, 16, 40])
    def test_rows_in_excess_belong_to_images_that_are_not_there(self, round_to):
        keep = torch.rand(9, 7) < 0.5
        keep[:, 0] = True
        exact, rounded = PackedLayout.from_mask(keep, "varlen"), PackedLayout.from_mask(keep, "varlen", round_to)
        T = exact.num_tokens
        assert rounded.num_tokens % round_to == 0
        assert 0 <= rounded.num_tokens - T < round_to
        assert rounded.offsets.dtype == torch.int32
        assert torch.equal(rounded.offsets[:10], exact.offsets)
        assert rounded.offsets[-1] == rounded.num_tokens
        assert rounded.offsets.diff().max() <= 7
        assert torch.equal(rounded.image[:T], exact.image)
        assert torch.equal(rounded.query[:T], exact.query)

    def test_joined_offsets(self):
        a = PackedLayout.from_mask(torch.tensor([[True, True], [True, False]]), "varlen")
        joined = PackedLayout.join([a, PackedLayout.prefix(2, 3, backend="varlen")])
        assert joined.offsets.tolist() == [0, 2, 3, 6, 9]
        assert joined.shape == (4, 3)
        assert joined.image.tolist() == [0, 0, 1, 2, 2, 2, 3, 3, 3]


class TestCompiled:
    """Lengths that change between batches are tensors for the compiler, not constants."""

    @pytest.fixture(autouse=True)
    def one_operation(self, place, monkeypatch):
        torch._dynamo.reset()
        if place == ("cpu", "varlen"):
            simulate_varlen(monkeypatch, opaque_varlen)

    def test_blocks_are_not_compiled_anew_for_each_batch(self, place):
        device, backend = place
        dtype = half(device, backend)
        model = model_on(device, backend, dtype).eval()
        compiled, counter = copy.deepcopy(model), CompileCounter()
        for layer in compiled.visual_perceiver.layers:
            layer.compile(dynamic=True, backend=counter, fullgraph=backend == "varlen")
        counts, lengths = [], set()
        for seed, t in enumerate((0.3, 0.5, 0.7, 0.2, 0.6)):
            images = torch.randn(6 + seed, 3, 16, 16, device=device, dtype=dtype)
            with torch.no_grad():
                output, expected = compiled(images, dqs_threshold=t), model(images, dqs_threshold=t)
            atol = 1e-5 if dtype == torch.float32 else 0.1
            torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=atol)
            counts.append(counter.frame_count)
            lengths.add(tuple(output.active_queries.sum(1).tolist()))
        assert len(lengths) == 5
        assert counts[0] == counts[-1], counts
        if backend == "varlen":  # a block is one graph, for all blocks and batches
            assert counts[-1] == 1


def test_the_model_is_not_compiled_anew_for_each_k():
    torch._dynamo.reset()
    model, counter = model_on("cpu", "auto", num_hidden_layers=1).eval(), CompileCounter()
    compiled, images = torch.compile(model, backend=counter, dynamic=True, fullgraph=True), torch.randn(4, 3, 16, 16)
    for K in (12, 5, 7, 3):
        with torch.no_grad():
            expected = model(images, num_active_queries=K).logits
            torch.testing.assert_close(compiled(images, num_active_queries=K).logits, expected, **close)
    assert counter.frame_count == 1
