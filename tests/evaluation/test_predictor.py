"""The predictor of K: it learns a simple rule, and each image runs with its predicted K."""

import pytest
import torch
from support import small_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_visual_perceiver.evaluation.predictor import (
    BudgetPredictor,
    PredictedBudgets,
    choose_budgets,
    fit_predictor,
    predicted_macs,
)
from hf_visual_perceiver.modeling import Budget, VisualPerceiverForImageClassification


QUERIES = [2, 5, 12]
BUDGETS = [Budget(num_active_queries=2), Budget(num_active_queries=5), Budget()]


@pytest.fixture
def rule(model):
    torch.manual_seed(3)
    return PredictedBudgets(model, BudgetPredictor(24, 4, 3, hidden=16).eval(), BUDGETS, price=0.05)


@torch.no_grad()
def test_each_image_runs_with_its_own_budget(model, images, rule):
    torch.nn.init.normal_(rule.predictor.fc2.weight, std=3)
    output = rule(images)
    used = output.used
    assert len(set(used.tolist())) > 1
    assert set(used.tolist()) <= set(QUERIES)
    for image, K, logits in zip(images, used, output.logits, strict=True):
        torch.testing.assert_close(
            logits, model(image[None], num_active_queries=K.item()).logits[0], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("budget", [0, 1, 2])
def test_counted_macs_are_those_of_the_real_forward(budget):
    model = VisualPerceiverForImageClassification(small_config()).eval()
    predictor = BudgetPredictor(24, 4, 3, hidden=16).eval()
    torch.nn.init.constant_(predictor.fc2.bias, -20)
    predictor.fc2.bias.data[budget] = 20
    rule = PredictedBudgets(model, predictor, BUDGETS, price=0)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        used = rule(torch.randn(1, 3, 16, 16)).active_queries.sum().item()
    assert used == QUERIES[budget]
    assert counter.get_total_flops() == 2 * predicted_macs(model.config, BUDGETS, predictor)[budget]


def test_it_learns_what_the_tokens_say():
    y = torch.randn(400, 2, 8)
    correct = torch.stack([y[:, 0, 0] > 0, torch.ones(400, dtype=torch.bool)], dim=1)
    predictor = fit_predictor(y[:300], correct[:300], epochs=200)
    chosen = choose_budgets(predictor(y[300:]), [1.0, 10.0], price=0.5)
    assert (chosen == (~correct[300:, 0]).long()).float().mean() > 0.85


def test_training_is_repeatable_and_leaves_the_random_state_alone():
    y, correct = torch.randn(64, 2, 8), torch.rand(64, 2) > 0.5
    state = torch.random.get_rng_state()
    first, second = (fit_predictor(y, correct, epochs=2).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_higher_price_never_costs_more():
    odds, macs = torch.randn(100, 3), torch.tensor([1.0, 4.0, 9.0])
    costs = [macs[choose_budgets(odds, macs.tolist(), price)].mean().item() for price in (0, 0.1, 0.5, 2)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 1


def test_a_predictor_that_does_not_fit(model):
    with pytest.raises(ValueError, match="predictor of 3 budgets"):
        PredictedBudgets(model, BudgetPredictor(24, 4, 2), BUDGETS, price=0)
