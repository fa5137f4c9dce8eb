"""Counted MACs equal the paper's table and torch's FLOP counter."""

import pytest
import torch
from support import small_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_visual_perceiver import VisualPerceiverConfig, VisualPerceiverForImageClassification, count_macs
from hf_visual_perceiver.modeling import FAMILIES, Budget


PAPER = {1: 11.46, 2: 17.25, 4: 28.86, 8: 52.18, 16: 99.27, 32: 195.22, 48: 293.53, 64: 394.20}


@pytest.mark.parametrize(("K", "millions"), PAPER.items())
def test_the_papers_table(K, millions):
    assert count_macs(VisualPerceiverConfig(num_labels=10), K) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("K", [1, 5, 12])
def test_half_of_the_flop_of_the_real_forward(K, implementation):
    config = small_config(num_cross_attention_heads=2, image_size=[16, 8])
    model = VisualPerceiverForImageClassification(config).eval()
    model.set_attn_implementation(implementation)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 16, 8), num_active_queries=K)
    assert counter.get_total_flops() == 2 * count_macs(config, K)


def test_selection_counts_what_it_computes():
    config = small_config()
    model = VisualPerceiverForImageClassification(config).eval()
    image = torch.randn(1, 3, 16, 16)
    for threshold in (0.1, 0.4, 0.8):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            kept = model(image, dqs_threshold=threshold).active_queries.sum().item()
        assert counter.get_total_flops() == 2 * count_macs(config, kept, num_candidates=12)


def test_the_queries_are_projected_once_for_the_batch():
    config = small_config()
    model = VisualPerceiverForImageClassification(config).eval()
    rows = []
    model.visual_perceiver.cross_attention.query.register_forward_hook(lambda m, args, out: rows.append(out.shape))
    model(torch.zeros(8, 3, 16, 16), num_active_queries=7)
    assert rows == [(7, 24)]


def test_bad_numbers():
    config = small_config()
    for K in (0, 13, 2.5, True):
        with pytest.raises(ValueError, match=r"integer in \[1, 12\]"):
            count_macs(config, K)
    with pytest.raises(ValueError, match="at least"):
        count_macs(config, 8, num_candidates=4)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    config = FAMILIES[name].config(num_labels=10)
    assert count_macs(config) == config.count_macs(Budget())
    for budget in (*config.budgets(), *config.adaptive_budgets()):
        assert count_macs(config, **budget.kwargs) == config.count_macs(budget)
    with pytest.raises(ValueError, match=r"Expected .*knobs.*, got nonsense"):
        count_macs(config, nonsense=3)


def test_a_missing_knob_is_the_configs():
    config = FAMILIES["dynamic_vision_transformer"].config(num_labels=10, max_exit=1)
    assert count_macs(config) == config.count_macs() < count_macs(config, max_exit=2)
    assert count_macs(config, exit_thresholds=0.5) == config.count_macs()
    config = small_config(num_active_queries=3)
    assert count_macs(config, dqs_threshold=0.8) == count_macs(config, 3, 3)


def test_numbers_of_queries_of_a_family_without_them():
    config = FAMILIES["lookupvit"].config()
    for given in ({"num_active_queries": 3}, {"num_candidates": 3}):
        with pytest.raises(ValueError, match=f"among compressed_size, got {next(iter(given))}"):
            count_macs(config, **given)
