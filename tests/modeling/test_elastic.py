"""Budgets: printing, parsing, comparison, and their meaning for the Visual Perceiver."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from support import small_config

from hf_visual_perceiver.modeling import VisualPerceiverForImageClassification, count_macs
from hf_visual_perceiver.modeling.elastic import Budget, Pass


NAMES = {"K": "num_active_queries", "t": "dqs_threshold"}


@pytest.mark.parametrize(
    "budget",
    [
        Budget(),
        Budget(num_active_queries=16),
        Budget(dqs_threshold=0.8, num_active_queries=3),
        Budget(exit_thresholds=[0.5, 0.25], max_exit=2),
    ],
    ids=str,
)
def test_a_budget_is_read_as_it_is_printed(budget):
    assert Budget.parse(str(budget)) == budget
    assert eval(repr(budget)) == budget
    assert pickle.loads(pickle.dumps(budget)) == budget == copy.deepcopy(budget)
    assert Budget.parse("" if budget == Budget() else budget.short(NAMES), NAMES) == budget


def test_budgets_compare_by_what_they_say():
    first, second = Budget(a=1, b=2.0), Budget(b=2.0, a=1)
    assert first == second
    assert len({first, second, Budget(a=1)}) == 2
    assert Budget(a=None) == Budget()
    assert Budget(a=torch.tensor(3), b=np.float64(0.5)).kwargs == {"a": 3, "b": 0.5}
    with pytest.raises(AttributeError):
        first.a = 3


@pytest.mark.parametrize("text", ["K", "K=", "K=1 2", "3", "K=1)(", "K=1, num_active_queries=2", "K=x"])
def test_texts_that_are_no_budget(text):
    with pytest.raises(ValueError, match=r"budget"):
        Budget.parse(text, NAMES)


def test_left_out_knobs_are_everything_whatever_the_config_stores():
    config = small_config(num_active_queries=4, dqs_threshold=0.5)
    assert config.default_budget == Budget(num_active_queries=4, dqs_threshold=0.5)
    assert config.resolve() == {"num_active_queries": 12, "dqs_threshold": math.inf}
    assert config.parse_budget("t=0.9") == Budget(dqs_threshold=0.9)
    assert config.parse_budget("full") == Budget()
    for text in ("K=13", "t=-2", "layers=3"):
        with pytest.raises(ValueError, match="Expected"):
            config.parse_budget(text)


def test_budgets_ascend_to_the_full_network():
    config = small_config()
    macs = [config.count_macs(budget) for budget in config.budgets()]
    assert macs == sorted(set(macs))
    assert config.budgets()[-1] == Budget()
    assert macs[-1] == count_macs(config, 12)
    for share in (1.0, 0.5, 0.25):
        assert config.count_macs(config.budget_for(macs=share)) <= share * macs[-1]
    assert config.budget_for(macs=1e-9) == config.budgets()[0]
    for share in (0, 1.5, True, "half"):
        with pytest.raises(ValueError, match="share"):
            config.budget_for(macs=share)


@torch.no_grad()
def test_passes_of_a_training_step(model, images):
    passes = [Pass(), Pass(Budget(num_active_queries=3), slice(0, 2)), Pass(Budget(dqs_threshold=0.8))]
    for answered, p in zip(model.forward_budgets(images, passes), passes, strict=True):
        expected = model(images[p.images], **model.config.resolve(**p.budget.kwargs)).logits
        torch.testing.assert_close(answered, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "K", [torch.tensor([1, 2]), [0] * 8, [13] * 8, torch.ones(8), torch.ones(8, 1).long()], ids=str
)
def test_numbers_of_queries_that_do_not_fit_the_images(K):
    model = VisualPerceiverForImageClassification(small_config()).eval()
    with pytest.raises(ValueError, match="num_active_queries"):
        model(torch.zeros(8, 3, 16, 16), num_active_queries=K)
