"""The search for a cascade's thresholds."""

import numpy as np
import pytest
import torch

from hf_visual_perceiver.evaluation.cascade import search_thresholds, stopping_stages
from hf_visual_perceiver.inference.cascade import Cascade, top_probability
from hf_visual_perceiver.modeling import Budget


QUERIES = [2, 5, 12]
STAGES = [Budget(num_active_queries=2), Budget(num_active_queries=5), Budget()]


@pytest.fixture
def answers():
    """Simulated confidence and correctness of 400 images at three stages; later stages are more accurate and more confident."""
    generator = np.random.default_rng(0)
    confidence = generator.beta(2, 2, (400, 3)) + np.array([0.0, 0.1, 0.2])
    correct = generator.random((400, 3)) < confidence.clip(0, 1)
    return confidence.astype(np.float32), correct


@pytest.mark.parametrize("budget", [1.0, 1.3, 2.0, 4.5, 12.0])
def test_the_search_stays_within_its_budget(answers, budget):
    confidence, correct = answers
    macs = np.array([1.0, 3.0, 9.0])
    choice = search_thresholds(confidence, correct, macs, budget)
    stage = stopping_stages(confidence, choice.thresholds)
    assert macs[stage].mean() == choice.macs <= budget
    assert correct[np.arange(400), stage].mean() == choice.accuracy
    # Never worse than stopping all at one stage that the budget allows.
    assert choice.accuracy >= max(correct[:, s].mean() for s in range(3) if macs[s] <= budget)


def test_more_budget_is_never_worse(answers):
    accuracies = [search_thresholds(*answers, [1, 3, 9], budget).accuracy for budget in (1, 1.5, 2, 3, 5, 9)]
    assert accuracies == sorted(accuracies)
    assert accuracies[-1] > accuracies[0]


def test_the_search_and_the_cascade_stop_alike(model, images):
    with torch.no_grad():
        logits = [model(images, num_active_queries=K).logits for K in QUERIES]
    confidence = torch.stack([top_probability(x) for x in logits], dim=1).numpy()
    correct = np.ones_like(confidence, dtype=bool)
    correct[:4, 0] = False
    macs = model.config.count_stages(STAGES)
    choice = search_thresholds(confidence, correct, macs, np.mean(macs[:2]))
    used = Cascade(model, STAGES, choice.thresholds)(images).used.numpy()
    assert np.array_equal(used, np.array(QUERIES)[stopping_stages(confidence, choice.thresholds)])


def test_bad_searches(answers):
    confidence, correct = answers
    with pytest.raises(ValueError, match="first stage's 1"):
        search_thresholds(confidence, correct, [1, 3, 9], 0.5)
    with pytest.raises(ValueError, match="S costs"):
        search_thresholds(confidence, correct, [1, 3], 5)
