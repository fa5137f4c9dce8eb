"""Block-causal trunks: the output of the first K queries does not depend on later ones, and extending repeats no work."""

import pytest
import timm
import torch
from support import small_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_visual_perceiver.inference.cascade import Cascade
from hf_visual_perceiver.modeling import Budget, Pass, VisualPerceiverForImageClassification, count_macs
from hf_visual_perceiver.modeling.spatial_init import cell, sobol_point


CAUSAL = {"trunk_attention": "block_causal"}  # of 12 queries: blocks end at 1, 2, 4, 8 and 12


@pytest.fixture
def causal() -> VisualPerceiverForImageClassification:
    return VisualPerceiverForImageClassification(small_config(**CAUSAL)).eval()


@torch.no_grad()
def test_tokens_of_the_first_queries_do_not_change_when_more_come(causal, model, images):
    base, full = causal.visual_perceiver, model.visual_perceiver
    everything = base(images).last_hidden_state
    for K in (1, 2, 4, 8):
        prefix = base(images, num_active_queries=K).last_hidden_state
        torch.testing.assert_close(prefix, everything[:, :K], rtol=1e-5, atol=1e-5)
    # The paper's trunk mixes all queries; and so does a block.
    assert not torch.allclose(
        full(images, num_active_queries=4).last_hidden_state, full(images).last_hidden_state[:, :4]
    )
    assert not torch.allclose(base(images, num_active_queries=7).last_hidden_state, everything[:, :7], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("fields", [CAUSAL, {**CAUSAL, "query_blocks": [3, 12]}, {}], ids=str)
def test_going_on_equals_one_pass(images, fields):
    model = VisualPerceiverForImageClassification(small_config(**fields)).eval()
    state = model.start(images)
    assert state.num_active_queries == 0
    for K in (1, 3, 3, 4, 10, 12):
        output, alone = state.extend(K), model(images, num_active_queries=K)
        torch.testing.assert_close(output.logits, alone.logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(output.active_queries, alone.active_queries)


@torch.no_grad()
def test_timms_model_goes_on_too(images):
    small = {"embed_dim": 24, "depth": 2, "num_queries": 12, "img_size": 16, "num_classes": 5}
    model = timm.create_model("visual_perceiver_nano_patch4_32", **small, **CAUSAL).eval()
    state = model.start(images)
    for K in (3, 12):
        torch.testing.assert_close(state.extend(K).logits, model(images, num_active_queries=K), rtol=1e-5, atol=1e-5)
    assert set(Cascade(model, [Budget(num_active_queries=2), Budget()], [1.1])(images).used.tolist()) == {12}
    model.reset_classifier(3)
    with pytest.raises(ValueError, match="the model has changed"):
        state.extend(12)
    with pytest.raises(ValueError, match=r"`img_size=\.\.\.` of `create_model`"):
        model.start(images[..., :8, :8])
    model.reset_classifier(3, global_pool="")
    with pytest.raises(ValueError, match="`global_pool` 'token', got ''"):
        model.start(images)


@torch.no_grad()
def test_some_of_the_images_go_on(causal, images):
    state = causal.start(images)
    state.extend(4)
    chosen = torch.tensor([5, 0, 3])
    torch.testing.assert_close(
        state[chosen].extend(8).logits, causal(images[chosen], num_active_queries=8).logits, rtol=1e-5, atol=1e-5
    )
    assert state.num_active_queries == 4


@torch.no_grad()
def test_going_on_refuses(causal, images):
    state = causal.start(images)
    state.extend(8)
    with pytest.raises(ValueError, match="at least the 8 queries"):
        state.extend(4)
    with pytest.raises(ValueError, match="num_active_queries"):
        state.extend(13)
    with pytest.raises(ValueError, match="one `num_active_queries` for all"):
        state.extend(torch.tensor([8] * len(images)))
    with pytest.raises(ValueError, match="images of size 16x16, got 8x8; a model loaded"):
        causal.start(images[..., :8, :8])


CHANGES = {
    "a write": lambda model: model.visual_perceiver.layers[0].mlp.fc1.weight.mul_(1.5),
    "a write to the head": lambda model: model.head.weight.mul_(1.5),
    "other data": lambda model: setattr(model.head.weight, "data", model.head.weight.data + 1),
    "a new head": lambda model: setattr(model, "head", torch.nn.Linear(24, 5)),
    "a new layer": lambda model: setattr(model.visual_perceiver.layers[0].mlp, "fc1", torch.nn.Linear(24, 48)),
    "a dtype": lambda model: model.bfloat16(),
    "batch norms that learn": lambda model: model.train()(torch.randn(4, 3, 16, 16)),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_going_on_notices_that_the_model_has_changed(images, change):
    stem = {"stem": "conv", "stem_widths": [[4], [6], [12]]}
    model = VisualPerceiverForImageClassification(small_config(**CAUSAL, **stem)).eval()
    state = model.start(images)
    state.extend(4)
    CHANGES[change](model)
    with pytest.raises(ValueError, match="the model has changed"):
        state.extend(12)


@torch.no_grad()
def test_what_going_on_costs(causal, images):
    stages = [2, 4, 12]
    budgets = [Budget(num_active_queries=K) for K in stages]
    costs = causal.config.count_stages(budgets)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        Cascade(causal, budgets, [2.0, 2.0])(images[:1])
    # The decoder projects keys and values of all K tokens anew at each stage, in both.
    assert counter.get_total_flops() / 2 == pytest.approx(costs[-1], rel=5e-3)
    # Each stage after the first costs its decoder, and less than starting again.
    full = VisualPerceiverForImageClassification(small_config())
    assert costs[-1] < full.config.count_stages(budgets)[-1]
    assert costs[0] == count_macs(causal.config, 2)


@torch.no_grad()
@pytest.mark.parametrize("knobs", [{"dqs_threshold": 0.9}, {"num_active_queries": 7, "dqs_threshold": 0.8}], ids=str)
def test_selection_in_a_packed_batch_equals_masks_and_single_images(causal, images, knobs):
    output = causal(images, **knobs)
    assert len(set(output.active_queries.sum(1).tolist())) > 1
    alone = torch.cat([causal(image[None], **knobs).logits for image in images])
    torch.testing.assert_close(output.logits, alone, rtol=1e-5, atol=1e-5)
    causal.set_ragged_backend("masked")
    torch.testing.assert_close(causal(images, **knobs).logits, output.logits, rtol=1e-5, atol=1e-5)
    eager = causal
    eager.set_attn_implementation("eager")
    torch.testing.assert_close(eager(images, **knobs).logits, output.logits, rtol=1e-5, atol=1e-5)


def test_the_kernel_without_masks_is_refused(causal, images):
    causal.visual_perceiver._ragged_backend = "varlen"
    with pytest.raises(ValueError, match="takes masks"):
        causal(images, dqs_threshold=0.5)


def test_one_pass_answers_for_all_ends_of_blocks(causal, images, monkeypatch):
    passes = []
    original = type(causal.visual_perceiver).process
    monkeypatch.setattr(
        type(causal.visual_perceiver), "process", lambda self, active: passes.append(1) or original(self, active)
    )
    subsets = [Pass(Budget(num_active_queries=K)) for K in (10, 8, 4, 1)]
    with torch.no_grad():
        answers = causal.forward_budgets(images, subsets)
        assert len(passes) == 1
        for subset, logits in zip(subsets, answers, strict=True):
            expected = causal(images, **subset.budget.kwargs).logits
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        # 3 ends no block, so it needs a pass of its own.
        passes.clear()
        causal.forward_budgets(images, [Pass(), Pass(Budget(num_active_queries=3))])
        assert len(passes) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trunk_attention": "causal"}, "'full' or 'block_causal'"),
        ({"query_blocks": [1, 13]}, "`query_blocks`"),
        ({"query_blocks": [0, 12]}, "`query_blocks`"),
        ({"query_blocks": [4, 4, 12]}, "`query_blocks`"),
        ({"query_blocks": []}, "`query_blocks`"),
        ({"query_init": "grid"}, "`query_init`"),
    ],
    ids=str,
)
def test_what_does_not_fit(fields, message):
    with pytest.raises(Exception, match=message):
        small_config(**fields)


class TestSpatialQueries:
    def test_the_first_queries_lie_in_different_cells(self):
        for m in (2, 4, 6):
            side = 2 ** (m // 2)
            cells = {tuple(int(c * side) for c in sobol_point(i)) for i in range(2**m)}
            assert len(cells) == 2**m

    def test_regions_get_smaller_and_stay_inside(self):
        cells = [cell(i) for i in range(64)]
        assert all(0 < x < 1 and 0 < y < 1 for x, y, _ in cells)
        spreads = [spread for _, _, spread in cells]
        assert spreads == sorted(spreads, reverse=True)

    @torch.no_grad()
    def test_a_fresh_query_reads_its_region(self):
        config = small_config(
            image_size=32, num_queries=64, hidden_size=96, query_init="spatial", initializer_range=0.02
        )
        model = VisualPerceiverForImageClassification(config).eval()
        read = model(torch.randn(2, 3, 32, 32), output_attentions=True).cross_attentions[0].mean((0, 1))  # (64, 64)
        rows, columns = torch.meshgrid(torch.arange(8) + 0.5, torch.arange(8) + 0.5, indexing="ij")
        places = torch.stack([rows, columns], -1).flatten(0, 1) / 8
        centres = torch.tensor([cell(i)[:2] for i in range(64)])
        assert (read @ places - centres)[1:].abs().max() < 0.2
        assert read[0].max() < 0.1  # all of the image
        assert read[40].max() > 0.3
        # 1/64 each if random.
        random = VisualPerceiverForImageClassification(small_config(image_size=32, num_queries=64, hidden_size=96))
        assert random.config.query_init == "random"
