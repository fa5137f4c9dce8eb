"""Cascades: the output equals the model's at the stage where an image stops, and the cost equals the counted MACs."""

import numpy as np
import pytest
import timm
import torch
from support import small_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_visual_perceiver.inference.cascade import Cascade, top_probability
from hf_visual_perceiver.modeling import Budget, VisualPerceiverForImageClassification, count_macs


QUERIES = [2, 5, 12]
STAGES = [Budget(num_active_queries=2), Budget(num_active_queries=5), Budget()]


@pytest.fixture
def thresholds(model, images):
    """Thresholds at which some of the eight images stop at each stage; halfway between two values, so that rounding moves none."""
    with torch.no_grad():
        sure = [top_probability(model(images, num_active_queries=K).logits) for K in QUERIES]
    first = sure[0].quantile(0.5)  # of an even number: between two
    return [first.item(), sure[1][sure[0] < first].quantile(0.5).item()]


@torch.no_grad()
def test_each_image_gets_the_answer_of_the_stage_where_it_stops(model, images, thresholds):
    output = Cascade(model, STAGES, thresholds)(images)
    used = output.used
    assert set(used.tolist()) == set(QUERIES)
    assert torch.equal(torch.tensor(QUERIES)[output.stage], used)
    for image, K, logits in zip(images, used, output.logits, strict=True):
        alone = model(image[None], num_active_queries=K.item())
        torch.testing.assert_close(logits, alone.logits[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("threshold", "K"), [(1.5, 12), (0.0, 2)])
def test_thresholds_at_the_ends_are_the_last_and_the_first_stage(model, images, threshold, K):
    output = Cascade(model, STAGES, [threshold] * 2)(images)
    assert (output.used == K).all()
    # New queries read in a call of their own, which may round otherwise in the last bit.
    torch.testing.assert_close(output.logits, model(images, num_active_queries=K).logits, atol=1e-6, rtol=1e-6)


def test_numbers_of_other_libraries(model, tmp_path):
    stages = [Budget(num_active_queries=K) for K in np.array([2, 4])]
    Cascade(model, stages, torch.tensor([0.5])).save(tmp_path / "cascade.json")
    cascade = Cascade.load(model, tmp_path / "cascade.json")
    assert (cascade.stages, cascade.thresholds) == (stages, [0.5])


@torch.no_grad()
def test_unsure_images_are_mirrored(model, images):
    """Images below the last threshold answer with both views; they alone are run again."""
    rows = []
    model.visual_perceiver.layers[0].register_forward_hook(lambda m, args, out: rows.append(tuple(out.shape[:2])))
    few, full = (model(images, num_active_queries=K) for K in (2, 12))
    first, last = (top_probability(output.logits).median().item() for output in (few, full))
    rows.clear()
    output = Cascade(model, [Budget(num_active_queries=2), Budget()], [first, last], mirror=True)(images)
    mirrored = top_probability(full.logits) < last
    mirrored &= top_probability(few.logits) < first
    assert 0 < mirrored.sum() < 4
    expected = torch.where((output.stage == 0)[:, None], few.logits, full.logits)
    both = (full.logits + model(images.flip(-1), num_active_queries=12).logits) / 2
    torch.testing.assert_close(output.logits, torch.where(mirrored[:, None], both, expected), atol=1e-5, rtol=1e-5)
    assert torch.equal(output.stage == 2, mirrored)
    assert torch.equal(output.used == 12, output.stage > 0)
    assert rows[:3] == [(8, 2), ((output.stage > 0).sum().item(), 12), (mirrored.sum().item(), 12)]


def test_one_stage_is_the_model_bit_for_bit(model, images):
    output = Cascade(model, [Budget(num_active_queries=7)], [])(images)
    with torch.no_grad():
        assert torch.equal(output.logits, model(images, num_active_queries=7).logits)


def test_the_models_own_operating_point_plays_no_part(images):
    model = VisualPerceiverForImageClassification(small_config()).eval()
    expected = Cascade(model, STAGES, [0.3, 0.4])(images)
    model.config.num_active_queries, model.config.dqs_threshold = 3, 0.1
    output = Cascade(model, STAGES, [0.3, 0.4])(images)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.used, expected.used)


def test_batch_equals_one_by_one(model, images, thresholds):
    cascade = Cascade(model, STAGES, thresholds)
    together = cascade(images)
    for i, image in enumerate(images):
        alone = cascade(image[None])
        torch.testing.assert_close(alone.logits[0], together.logits[i], atol=1e-5, rtol=1e-5)
        assert torch.equal(alone.used[0], together.used[i])


def test_permuting_the_batch_permutes_the_answers(model, images, thresholds):
    cascade, order = Cascade(model, STAGES, thresholds), torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    straight, permuted = cascade(images), cascade(images[order])
    torch.testing.assert_close(permuted.logits, straight.logits[order], atol=1e-5, rtol=1e-5)
    assert torch.equal(permuted.used, straight.used[order])


def counted(function) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_counted_macs_are_those_of_the_real_forward(stop):
    config = small_config(num_cross_attention_heads=2)
    model = VisualPerceiverForImageClassification(config).eval()
    cascade = Cascade(model, STAGES, [2.0 if stage < stop else 0.0 for stage in range(2)])
    image = torch.randn(1, 3, 16, 16)
    assert counted(lambda: cascade(image)) == 2 * config.count_stages(STAGES)[stop] == 2 * cascade.count_macs()[stop]
    twice = Cascade(model, STAGES[: stop + 1], [2.0] * (stop + 1), mirror=True)
    assert counted(lambda: twice(image)) == 2 * twice.count_macs()[-1]


def test_images_that_stop_leave_the_batch(model, images, thresholds):
    rows = []
    model.visual_perceiver.layers[0].register_forward_hook(lambda m, args, out: rows.append(tuple(out.shape[:2])))
    used = Cascade(model, STAGES, thresholds)(images).used
    assert rows == [((used >= K).sum().item(), K) for K in QUERIES]
    rows.clear()
    Cascade(model, STAGES, [0.0, 0.0])(images)
    assert rows == [(8, 2)]


def test_macs_of_a_cascade_pay_the_trunk_again(config):
    macs = config.count_stages(STAGES)
    assert macs[0] == count_macs(config, 2)
    # More than the last stage alone, less than all stages separately.
    assert count_macs(config, 12) < macs[2] < sum(count_macs(config, K) for K in QUERIES)


@pytest.mark.parametrize("mirror", [False, True])
def test_saved_beside_the_checkpoint(model, images, thresholds, tmp_path, mirror):
    cascade = Cascade(model, STAGES, [*thresholds, 2.0] if mirror else thresholds, mirror)
    cascade.save(tmp_path / "cascade.json")
    again = Cascade.load(model, tmp_path / "cascade.json")
    assert (again.stages, again.thresholds, again.mirror) == (cascade.stages, cascade.thresholds, mirror)
    assert torch.equal(again(images).logits, cascade(images).logits)
    (tmp_path / "cascade.json").write_text('{"stages": [1]}')
    with pytest.raises(ValueError, match="stages and thresholds"):
        Cascade.load(model, tmp_path / "cascade.json")


@pytest.mark.parametrize(
    ("stages", "thresholds", "message"),
    [
        ([], [], "ascending"),
        ([8, 8], [0.5], "ascending"),
        ([8, 4], [0.5], "ascending"),
        ([4, 13], [0.5], "integer in"),
        ([4, 8], [], "1 thresholds for 2 stages"),
        ([4, 8], [-0.1], "at least 0"),
        ([4, 8], [float("nan")], "at least 0"),
    ],
)
def test_bad_cascades(model, stages, thresholds, message):
    with pytest.raises(ValueError, match=message):
        Cascade(model, [Budget(num_active_queries=K) for K in stages], thresholds)


def test_a_mirror_has_a_threshold(model):
    with pytest.raises(ValueError, match="Expected 2 thresholds for 2 stages and a mirrored view, got 1"):
        Cascade(model, [Budget(num_active_queries=4), Budget()], [0.5], mirror=True)


@pytest.mark.parametrize(
    ("text", "queries", "mirror"),
    [
        ("cascade at 0.9", [2, 5, 12], False),
        ("cascade to K=5 at 0.9", [2, 5], False),
        ("cascade to K=7 + mirror at 0.9", [2, 5, 7], True),
        ("full+mirror at .9", [12], True),
    ],
)
def test_names(model, monkeypatch, text, queries, mirror):
    monkeypatch.setattr(type(model.config), "budgets", lambda self: STAGES)
    cascade = Cascade.parse(model, text)
    assert [budget.kwargs.get("num_active_queries", 12) for budget in cascade.stages] == queries
    assert cascade.thresholds == [0.9] * (len(queries) - 1 + mirror)
    assert cascade.mirror == mirror


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("K=4", "such as \"cascade to K=16 [+] mirror at 0.99\", got 'K=4'"),
        ("cascade to K=99 at 0.5", "integer in"),
        ("t=0.8 + mirror at 0.5", "'t=0.8 [+] mirror at 0.5' is not a cascade of this model: Expected stages at which"),
        ("K=4 + mirror at 1.2.3", "is not a cascade of this model: could not convert"),
        ("K=4 at 0.9", "several stages or \"[+] mirror\", without which no threshold counts, got 'K=4 at 0.9'"),
    ],
)
def test_bad_names(model, text, message):
    with pytest.raises(ValueError, match=message):
        Cascade.parse(model, text)


def test_stages_are_not_adaptive(model):
    with pytest.raises(ValueError, match=r"same cost, got t=0.8"):
        Cascade(model, [Budget(dqs_threshold=0.8)], [])


def test_a_model_that_cannot_go_on_runs_anew(model, images, thresholds):
    class Anew:
        config = model.config

        def __call__(self, *args, **knobs):
            return model(*args, **knobs)

    expected, given = Cascade(model, STAGES, thresholds)(images), Cascade(Anew(), STAGES, thresholds)(images)
    torch.testing.assert_close(given.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(given.stage, expected.stage)


def test_bad_images(model):
    with pytest.raises(ValueError, match="shape"):
        Cascade(model, STAGES, [0.5, 0.5])(torch.zeros(3, 16, 16))


def test_a_timm_model_that_cannot_go_on():
    lookup = timm.create_model("lookupvit_nano_patch4_32").eval()
    cascade = Cascade(lookup, [Budget(compressed_size=3), Budget()], [0.5])
    with pytest.raises(ValueError, match="a transformers classifier, or a model that has `start`, got LookupViT"):
        cascade(torch.zeros(2, 3, 32, 32))
