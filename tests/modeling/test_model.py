"""Properties of the network: the meaning of K and t, and equal logits on every execution path."""

import copy

import numpy as np
import pytest
import torch
from support import aligned, small_config
from torch._dynamo.testing import CompileCounter

from hf_visual_perceiver import VisualPerceiverConfig, VisualPerceiverForImageClassification, VisualPerceiverModel
from hf_visual_perceiver.modeling import Budget, Pass
from hf_visual_perceiver.modeling.visual_perceiver_network import DenseTokens


THRESHOLDS = (-1, -0.3, 0.0, 0.3, 0.6, 0.9, 1)
close = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(params=["fresh", "trained"])
def any_model(request):
    """A network with random weights, and the bundled one, each with images of its size."""
    generator = torch.Generator().manual_seed(2)
    if request.param == "trained":
        model = request.getfixturevalue("trained")
    else:
        model = VisualPerceiverForImageClassification(small_config()).eval()
    return model, torch.randn(64, 3, *model.config.image_height_width, generator=generator)


@torch.no_grad()
def one_by_one(model, images, **arguments):
    outputs = [model(image[None], **arguments) for image in images]
    return torch.cat([o.logits for o in outputs]), torch.cat([o.active_queries for o in outputs])


class TestLabelNames:
    """Label names are in the order of the logits, for any form of the keys of `id2label`."""

    @pytest.mark.parametrize("key", [str, int])
    def test_keys_are_numbers_in_any_order(self, key):
        names = [f"c{i}" for i in range(12)]
        id2label = {key(i): names[i] for i in reversed(range(12))}
        config = VisualPerceiverConfig(id2label=id2label)
        assert config.label_names == names
        config.id2label = id2label  # as scripts do
        assert config.label_names == config.timm_pretrained_cfg["label_names"] == names

    @pytest.mark.parametrize("id2label", [{"a": "x", "b": "y"}, {0: "x", 2: "y"}, {"1": "x", "2": "y"}])
    def test_other_keys_are_refused(self, id2label):
        config = VisualPerceiverConfig()
        config.id2label = id2label
        with pytest.raises(ValueError, match=r"Expected the keys of `id2label` to be 0 to 1, got"):
            config.label_names  # noqa: B018


class TestNumActiveQueries:
    def test_none_is_all(self, model, images):
        assert torch.equal(model(images).logits, model(images, num_active_queries=12).logits)

    def test_the_first_k_outputs_do_not_depend_on_k(self, model, images):
        network = model.visual_perceiver
        everything = network.read(images, 12)
        for K in (1, 5, 12):
            torch.testing.assert_close(network.read(images, K), everything[:, :K], **close)

    def test_shapes_and_mask(self, model, images):
        output = model.visual_perceiver(images, num_active_queries=5)
        assert output.last_hidden_state.shape == (8, 5, 24)
        assert output.pooler_output.shape == (8, 24)
        assert output.active_queries.tolist() == [[True] * 5 + [False] * 7] * 8

    def test_equals_a_network_that_has_only_k_queries(self, model, images):
        smaller = VisualPerceiverForImageClassification(small_config(num_queries=5)).eval()
        weights = model.state_dict()
        name = "visual_perceiver.cross_attention.queries"
        smaller.load_state_dict({**weights, name: weights[name][:5]})
        torch.testing.assert_close(smaller(images).logits, model(images, num_active_queries=5).logits, **close)

    def test_the_config_holds_the_default(self, model, images):
        expected = model(images, num_active_queries=4, dqs_threshold=0.5)
        model.config.num_active_queries, model.config.dqs_threshold = 4, 0.5
        assert torch.equal(model(images).logits, expected.logits)

    def test_numbers_of_other_libraries_are_numbers(self, model, images):
        assert model(images, num_active_queries=np.int64(3)).active_queries.sum() == 24
        assert model(images, num_active_queries=torch.tensor(3)).active_queries.sum() == 24
        assert model(images, num_active_queries=np.array([3])).active_queries.sum() == 24
        expected = model(images, dqs_threshold=0.5).active_queries
        assert not expected.all()
        for t in (np.float32(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5).bfloat16()):
            assert torch.equal(model(images, dqs_threshold=t).active_queries, expected)

    def test_numbers_of_other_libraries_in_a_config(self, tmp_path):
        config = small_config(num_active_queries=np.int64(3), dqs_threshold=torch.tensor(0.5))
        assert (type(config.num_active_queries), type(config.dqs_threshold)) == (int, float)
        config.save_pretrained(tmp_path)
        assert VisualPerceiverConfig.from_pretrained(tmp_path).operating_point() == (3, 0.5)

    @pytest.mark.parametrize("K", [0, 13, -1, 2.5, 3.0, True, "3", float("nan"), torch.tensor(2.5), torch.tensor(True)])
    def test_bad_values(self, model, images, K):
        with pytest.raises(ValueError, match=r"`num_active_queries` to be an integer in \[1, 12\], got"):
            model(images, num_active_queries=K)


class TestDynamicQuerySelection:
    @pytest.mark.parametrize("threshold", THRESHOLDS)
    def test_equals_one_image_at_a_time(self, any_model, threshold):
        model, images = any_model
        images = images[:16] if model.config.num_queries == 64 and threshold not in (0.6, 0.9) else images
        for K in (3, model.config.num_queries):
            arguments = {"num_active_queries": K, "dqs_threshold": threshold}
            logits, active = one_by_one(model, images, **arguments)
            for batch in (2, 7, len(images)):
                with torch.no_grad():
                    output = model(images[:batch], **arguments)
                assert torch.equal(output.active_queries, active[:batch])
                torch.testing.assert_close(output.logits, logits[:batch], **close)

    @pytest.mark.parametrize("reference", ["all", "kept"])
    def test_removed_queries_are_really_gone(self, model, images, reference):
        # One image at a time, a network that holds only the kept queries gives the same answer.
        model.config.dqs_reference = reference
        name = "visual_perceiver.cross_attention.queries"
        weights = model.state_dict()
        output = model(images, dqs_threshold=0.3)
        assert 1 < output.active_queries.sum(1).float().mean() < 11
        for image, keep, logits in zip(images, output.active_queries, output.logits, strict=True):
            only = VisualPerceiverForImageClassification(small_config(num_queries=int(keep.sum()))).eval()
            only.load_state_dict({**weights, name: weights[name][keep]})
            torch.testing.assert_close(only(image[None]).logits[0], logits, **close)

    def test_packed_equals_masked_with_gradients(self, images):
        config = small_config()
        packed = VisualPerceiverForImageClassification(config)
        masked = copy.deepcopy(packed)
        masked.set_ragged_backend("masked")
        labels = torch.arange(8) % 5
        for model in (packed, masked):
            model(images, labels=labels, dqs_threshold=0.3).loss.backward()
        for (name, p), q in zip(packed.named_parameters(), masked.parameters(), strict=True):
            assert p.grad is not None, name
            torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}", **close)

    def test_the_first_query_stays_and_one_keeps_all(self, any_model):
        model, images = any_model
        assert model(images[:8], dqs_threshold=-1).active_queries[:, 0].all()
        output = model(images[:8], dqs_threshold=1)
        assert output.active_queries.all()
        torch.testing.assert_close(output.logits, model(images[:8]).logits, **close)

    def test_permuting_a_batch_permutes_its_outputs(self, any_model):
        model, images = any_model
        images = images[:24]
        order = torch.randperm(24)
        a, b = model(images, dqs_threshold=0.7), model(images[order], dqs_threshold=0.7)
        assert torch.equal(a.active_queries[order], b.active_queries)
        torch.testing.assert_close(a.logits[order], b.logits, **close)

    def test_rows_of_removed_queries_are_zero(self, model, images):
        for backend in ("grouped", "masked"):
            model.set_ragged_backend(backend)
            output = model.visual_perceiver(images, num_active_queries=10, dqs_threshold=0.3)
            used = output.last_hidden_state.ne(0).any(-1)
            assert torch.equal(used, output.active_queries[:, :10])
            assert not output.active_queries[:, 10:].any()

    def test_packed_tokens_are_fewer(self, model, images):
        rows = []
        model.visual_perceiver.layers[0].mlp.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
        kept = model(images, dqs_threshold=0.3).active_queries.sum().item()
        assert rows == [kept]
        assert kept < 8 * 12

    def test_an_infinite_threshold_is_no_selection_whatever_the_config_says(self, model, images):
        expected = model(images)
        model.config.dqs_threshold = 0.3
        assert not model(images).active_queries.all()
        assert torch.equal(model(images, dqs_threshold=float("inf")).logits, expected.logits)
        full, half = model.forward_budgets(
            images, [Pass(Budget(dqs_threshold=float("inf"))), Pass(Budget(num_active_queries=6))]
        )
        torch.testing.assert_close(full, expected.logits, **close)
        torch.testing.assert_close(
            half, model(images, num_active_queries=6, dqs_threshold=float("inf")).logits, **close
        )

    def test_images_without_data(self, model):
        model, images = model.to("meta"), torch.empty(2, 3, 16, 16, device="meta")
        assert model(images, num_active_queries=3).logits.shape == (2, 5)
        with pytest.raises(ValueError, match=r"Expected tokens with values, .*got meta tensors"):
            model(images, dqs_threshold=0.3)
        with pytest.raises(ValueError, match=r"Expected weights in memory, got meta tensors such as"):
            model.optimize_for_inference()
        model.set_ragged_backend("masked")
        model.set_attn_implementation("eager")
        assert model(images, dqs_threshold=0.3).active_queries.shape == (2, 12)

    def test_the_optimised_form_has_no_gradients_and_a_dtype_of_its_own(self, model, images):
        fast = model.optimize_for_inference(backend="torch")
        expected = fast(images).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = fast(images.requires_grad_()).logits
        assert not logits.requires_grad
        assert torch.equal(logits, expected)

    @pytest.mark.parametrize("t", [float("nan"), -float("inf"), -2, True, "0.5", torch.tensor([0.5, 0.5])])
    def test_bad_values(self, model, images, t):
        with pytest.raises(ValueError, match="`dqs_threshold` to be a finite number of at least -1, got"):
            model(images, dqs_threshold=t)


class TestTransformersIdiom:
    @pytest.mark.parametrize("arguments", [{}, {"num_active_queries": 5}, {"dqs_threshold": 0.3}])
    def test_eager_equals_sdpa(self, model, images, arguments):
        expected = model(images, **arguments).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(images, **arguments).logits, expected, **close)

    @pytest.mark.parametrize("arguments", [{}, {"num_active_queries": 5}, {"dqs_threshold": 0.3}])
    def test_gradient_checkpointing_changes_nothing(self, images, arguments):
        model = VisualPerceiverForImageClassification(small_config()).train()
        labels, gradients = torch.arange(8) % 5, []
        for enable in (False, True):
            if enable:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            model(images, labels=labels, **arguments).loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, **close)

    def test_gradient_checkpointing_under_autocast(self, images):
        losses, gradients = [], []
        for checkpointed in (False, True):
            torch.manual_seed(3)
            model = VisualPerceiverForImageClassification(small_config(drop_path_rate=0.5)).train()
            if checkpointed:
                model.gradient_checkpointing_enable()
            torch.manual_seed(4)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(images, labels=torch.arange(8) % 5, dqs_threshold=0.3).loss
            loss.backward()
            losses.append(loss)
            gradients.append({name: p.grad for name, p in model.named_parameters()})
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*gradients)

    def test_every_parameter_gets_a_gradient(self, images):
        model = VisualPerceiverForImageClassification(small_config()).train()
        for arguments in ({}, {"num_active_queries": 1}, {"dqs_threshold": 0.3}):
            model.zero_grad()
            model(images, labels=torch.arange(8) % 5, **arguments).loss.backward()
            assert [name for name, p in model.named_parameters() if p.grad is None] == []

    @pytest.mark.parametrize("arguments", [{"num_active_queries": 5}, {"num_active_queries": 5, "dqs_threshold": 0.3}])
    def test_recorded_outputs(self, model, images, arguments):
        expected = model(images, **arguments).logits
        output = model(images, output_hidden_states=True, output_attentions=True, **arguments)
        torch.testing.assert_close(output.logits, expected, **close)
        assert [h.shape for h in output.hidden_states] == [(8, 5, 24)] * 3
        assert [a.shape for a in output.attentions] == [(8, 3, 5, 5)] * 2
        assert [a.shape for a in output.cross_attentions] == [(8, 1, 5, 16)]
        torch.testing.assert_close(output.cross_attentions[0].sum(-1), torch.ones(8, 1, 5), **close)

    def test_tuples(self, model, images):
        assert torch.equal(model(images, return_dict=False)[0], model(images).logits)

    def test_compiles_as_one_graph_at_fixed_k(self, model, images):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            expected = model(images, num_active_queries=6).logits
            torch.testing.assert_close(compiled(images, num_active_queries=6).logits, expected, **close)

    def test_other_image_sizes(self, model, images):
        same = model(images, interpolate_pos_encoding=True).logits
        assert torch.equal(same, model(images).logits)
        larger = model(torch.randn(2, 3, 24, 32), interpolate_pos_encoding=True, num_active_queries=3)
        assert larger.logits.shape == (2, 5)
        with pytest.raises(ValueError, match="multiple of the patch size 4, got 18x16"):
            model(torch.randn(2, 3, 18, 16), interpolate_pos_encoding=True)

    def test_save_and_load(self, model, images, tmp_path):
        model.save_pretrained(tmp_path)
        again, report = VisualPerceiverForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        again, model = aligned(again.eval()), aligned(model)
        assert torch.equal(again(images).logits, model(images).logits)
        base = aligned(VisualPerceiverModel.from_pretrained(tmp_path).eval())
        assert torch.equal(base(images).pooler_output, model.visual_perceiver(images).pooler_output)

    def test_flash_attention_is_asked_only_for_what_it_can_do(self, images):
        from transformers import AttentionInterface

        asked = []

        def fake_flash(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
            asked.append(query.shape[-1])
            assert attention_mask is None
            assert query.shape[-1] <= 256
            output = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling)
            return output.transpose(1, 2), None

        AttentionInterface.register("fake_flash", fake_flash)
        # One cross-attention head of width 384, as in the small architecture.
        fields = {"hidden_size": 384, "intermediate_size": 384, "num_attention_heads": 6}
        model = VisualPerceiverForImageClassification(small_config(**fields, initializer_range=0.1)).eval()
        for backend in ("grouped", "masked"):
            model.set_ragged_backend(backend)
            for arguments in ({}, {"dqs_threshold": 0.5}):
                model.set_attn_implementation("sdpa")
                expected = model(images, **arguments).logits
                model.config._attn_implementation = "fake_flash"  # not by its setter, which asks for the package
                torch.testing.assert_close(model(images, **arguments).logits, expected, **close)
        assert set(asked) == {64}

    def test_half_precision(self, model, images):
        model.to(torch.bfloat16)
        for arguments in ({}, {"dqs_threshold": 0.3}):
            output = model(images.bfloat16(), **arguments)
            assert output.logits.dtype == torch.bfloat16
            assert output.logits.isfinite().all()

    @pytest.mark.parametrize("packed", [False, True])
    def test_stochastic_depth_drops_whole_images(self, packed):
        model = VisualPerceiverModel(small_config(num_hidden_layers=3, drop_path_rate=0.5)).train()
        active = DenseTokens(torch.randn(400, 12, 24))
        active = active.packed("grouped") if packed else active
        first, second, last = model.draw_paths(active)
        assert (first == 1).all()  # the rate grows from 0
        assert second.unique().tolist() == pytest.approx([0, 4 / 3])
        x = model.layers[2](active.tokens, layout=active.layout, path_scales=last)
        unchanged = (x == active.tokens).reshape(400, -1).all(1)
        assert 0.15 < unchanged.float().mean() < 0.35  # both branches dropped: a quarter
        assert torch.equal(unchanged, (last == 0).all(0).reshape(400, -1).all(1))
        assert model.eval().draw_paths(active) == [None] * 3

    def test_problem_types(self, images):
        regression = VisualPerceiverForImageClassification(small_config(num_labels=1))
        assert regression(images, labels=torch.randn(8)).loss.isfinite()
        multi = VisualPerceiverForImageClassification(small_config(problem_type="multi_label_classification"))
        assert multi(images, labels=torch.ones(8, 5)).loss.isfinite()


class TestBadInput:
    @pytest.mark.parametrize(
        ("pixel_values", "message"),
        [
            (torch.zeros(2, 3, 18, 16), "images of size 16x16, got 18x16; `interpolate_pos_encoding=True` takes"),
            (torch.zeros(2, 1, 16, 16), "images of 3 channels, got 1"),
            (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "floating-point dtype, got torch.uint8"),
            (torch.zeros(0, 3, 16, 16), "at least one image, got an empty batch"),
            (torch.zeros(3, 16, 16), r"shape \(B, C, H, W\), got \(3, 16, 16\)"),
            (None, r"shape \(B, C, H, W\), got None"),
        ],
    )
    def test_images(self, model, pixel_values, message):
        with pytest.raises(ValueError, match=message):
            model(pixel_values)

    @pytest.mark.parametrize("label", [-1, 5])
    def test_labels(self, model, images, label):
        with pytest.raises(ValueError, match=rf"labels in \[0, 5\), got values from .*{label}"):
            model(images, labels=torch.tensor([0, 1, 2, 3, 4, 0, 1, label]))

    def test_a_label_of_minus_100_is_ignored(self, model, images):
        labels = torch.tensor([0, 1, 2, 3, -100, -100, -100, -100])
        torch.testing.assert_close(model(images, labels=labels).loss, model(images[:4], labels=labels[:4]).loss)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"image_size": 30}, "`image_size` to be a positive multiple of `patch_size`, got 30 and 4"),
            ({"image_size": [32, 32, 32]}, r"an int or \(height, width\)"),
            ({"num_attention_heads": 5}, "`hidden_size` to be a multiple of `num_attention_heads`, got 192 and 5"),
            ({"num_queries": 0}, "`num_queries` to be at least 1, got 0"),
            ({"num_active_queries": 65}, r"integer in \[1, 64\], got 65"),
            ({"dqs_threshold": float("nan")}, "dqs_threshold"),
            ({"dqs_threshold": float("inf")}, "dqs_threshold"),
            ({"dqs_reference": "some"}, "'all' or 'kept', got 'some'"),
            ({"drop_path_rate": 1.0}, r"in \[0, 1\), got 1.0"),
        ],
    )
    def test_config(self, fields, message):
        with pytest.raises(ValueError, match=message):
            VisualPerceiverConfig(**fields)

    def test_unknown_architecture(self):
        with pytest.raises(ValueError, match=r"visual_perceiver_tiny_patch4_32.*got 'visual_perceiver_huge'"):
            VisualPerceiverConfig.from_architecture("visual_perceiver_huge")


def together_or_not(model, together):
    model.packs_passes = together
    return model


class TestSubsets:
    """Several subsets of the queries in one pass."""

    SUBSETS = [
        Pass(Budget(num_active_queries=12)),
        Pass(Budget(num_active_queries=1)),
        Pass(Budget(num_active_queries=7)),
        Pass(Budget(num_active_queries=7)),
        Pass(Budget(dqs_threshold=0.3)),
        Pass(Budget(num_active_queries=9, dqs_threshold=0.5)),
    ]
    GROUPS = [Pass(Budget(num_active_queries=12), slice(0, None, 3)), Pass(Budget(num_active_queries=5), slice(1, None, 3)),
              Pass(Budget(num_active_queries=9, dqs_threshold=0.4), slice(2, None, 3))]  # fmt: skip

    @pytest.mark.parametrize("together", [True, False])
    @pytest.mark.parametrize("subsets", [SUBSETS, GROUPS], ids=["shared", "disjoint"])
    def test_equal_separate_forwards(self, model, images, subsets, together):
        for subset, logits in zip(
            subsets, together_or_not(model, together).forward_budgets(images, subsets), strict=True
        ):
            expected = model(images[subset.images], **subset.budget.kwargs).logits
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("together", [True, False])
    @pytest.mark.parametrize("subsets", [SUBSETS, GROUPS], ids=["shared", "disjoint"])
    def test_gradients_equal_those_of_separate_forwards(self, config, images, subsets, together):
        model = VisualPerceiverForImageClassification(config).train()

        def gradients(all_logits):
            model.zero_grad()
            sum((i + 1) * logits.square().sum() for i, logits in enumerate(all_logits)).backward()
            return {name: p.grad.clone() for name, p in model.named_parameters()}

        joint = gradients(together_or_not(model, together).forward_budgets(images, subsets))
        separate = gradients(model(images[s.images], **s.budget.kwargs).logits for s in subsets)
        for name, expected in separate.items():
            scale = expected.abs().max().clamp(min=1)
            assert (joint[name] - expected).abs().max() <= 1e-5 * scale, name
        assert min(g.abs().max() for g in joint.values()) > 0

    def test_read_the_image_once(self, model, images, monkeypatch):
        calls = []
        for name in ("embeddings", "cross_attention"):
            module = getattr(model.visual_perceiver, name)
            module.register_forward_hook(
                lambda _, args, given, out, name=name: calls.append(given.get("part", name)), with_kwargs=True
            )
        model.visual_perceiver.layers[0].register_forward_hook(lambda *_: calls.append("trunk"))
        together_or_not(model, True).forward_budgets(images, self.SUBSETS)
        assert calls == ["embeddings", "cross_attention", *["finish"] * len(self.SUBSETS), "trunk"]

    def test_drop_paths_are_drawn_for_each_image_of_each_subset(self, images):
        torch.manual_seed(0)
        model = VisualPerceiverForImageClassification(small_config(drop_path_rate=0.5)).train()
        first, second = model.forward_budgets(
            images, [Pass(Budget(num_active_queries=12)), Pass(Budget(num_active_queries=12))]
        )
        assert not torch.allclose(first, second)

    @pytest.mark.parametrize("together", [True, False])
    def test_compiled_blocks_are_not_compiled_anew_for_each_k(self, images, together):
        model = VisualPerceiverForImageClassification(small_config(num_hidden_layers=4, drop_path_rate=0.1)).train()
        compiled, counter = copy.deepcopy(model), CompileCounter()
        for layer in compiled.visual_perceiver.layers:
            layer.compile(dynamic=True, backend=counter)
        for i, K in enumerate([(12, 3, 5), (12, 4, 7), (12, 1, 6), (12, 11, 1), (12, 8, 8), (12, 9, 2), (12, 2, 10)]):
            subsets = [Pass(Budget(num_active_queries=k)) for k in K]
            torch.manual_seed(i)
            expected = torch.stack(together_or_not(model, together).forward_budgets(images, subsets))
            torch.manual_seed(i)
            logits = torch.stack(together_or_not(compiled, together).forward_budgets(images, subsets))
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
            logits.sum().backward()
        # Neither for each K nor for each block: once for any length, and where a K is 1, which the compiler treats apart.
        assert counter.frame_count <= 5

    def test_mistakes_are_named(self, model, images):
        with pytest.raises(ValueError, match=r"in \[1, 12\], got 13"):
            model.forward_budgets(images, [Pass(Budget(num_active_queries=12)), Pass(Budget(num_active_queries=13))])
