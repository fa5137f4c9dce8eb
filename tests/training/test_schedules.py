"""Query schedules: the drawn K, and that they depend only on seed and step."""

import numpy as np
import pytest

from hf_visual_perceiver.modeling import Budget, Pass, VisualPerceiverConfig, count_macs
from hf_visual_perceiver.training import schedules
from hf_visual_perceiver.training.schedules import SCHEDULES, describe, step_macs


TAIL = {"fraction": 0.25, "share": 0.5, "thresholds": [0.6, 0.9]}
ENDS = [1, 2, 4, 8, 16, 32, 64]
EXAMPLES = {
    "fixed": {"schedule": "fixed", "K": 5},
    "uniform": {"schedule": "uniform"},
    "stratified": {"schedule": "stratified", "groups": 4},
    "sandwich": {"schedule": "sandwich", "students": 3},
    "nested": {"schedule": "nested", "largest": {16: 2, 64: 1}},
    "small_first": {"schedule": "stratified", "small_first": {"start": 2, "fraction": 0.5}},
    "dqs_tail": {"schedule": "sandwich", "students": 2, "dqs_tail": TAIL},
}


def ladder(Q):
    return VisualPerceiverConfig(num_queries=Q).ladder()


def budgets(passes, Q=64):
    """The K of passes; the last budget of a ladder, and a budget with a threshold, use all queries."""
    return [p.budget.kwargs.get("num_active_queries", Q) for p in passes]


def create_schedule(queries, num_queries=64, *args, **more):
    return schedules.create_schedule(queries, ladder(num_queries), *args, **more)


def test_every_schedule_is_an_example():
    assert set(SCHEDULES) <= set(EXAMPLES)


@pytest.mark.parametrize("queries", EXAMPLES.values(), ids=EXAMPLES)
def test_follow_from_seed_and_step(queries):
    a, b, c = (create_schedule(queries, 64, seed, steps=60, block_ends=ENDS) for seed in (0, 0, 1))
    one = [a(step) for step in range(60)]
    assert one == [b(step) for step in reversed(range(60))][::-1]
    assert all(1 <= K <= 64 for subsets in one for K in budgets(subsets))
    if queries["schedule"] != "fixed":
        assert one != [c(step) for step in range(60)]


def test_fixed():
    assert create_schedule({"schedule": "fixed", "K": 5}, 8, 0)(123) == [Pass(Budget(num_active_queries=5))]


def test_uniform_covers_every_budget_alike():
    schedule = create_schedule({"schedule": "uniform"}, num_queries=8, seed=3)
    counts = np.bincount([budgets(schedule(step), 8)[0] for step in range(4000)], minlength=9)
    assert counts[0] == 0
    assert all(400 < count < 600 for count in counts[1:])


def test_nested_takes_all_ends_of_blocks_up_to_the_largest():
    schedule = create_schedule(EXAMPLES["nested"], 64, seed=0, block_ends=ENDS)
    drawn = [budgets(schedule(step)) for step in range(3000)]
    assert {tuple(Ks) for Ks in drawn} == {(16, 8, 4, 2, 1), (64, 32, 16, 8, 4, 2, 1)}
    assert 0.63 < np.mean([Ks[0] == 16 for Ks in drawn]) < 0.70
    always = create_schedule({"schedule": "nested"}, 64, seed=0, block_ends=ENDS)
    assert budgets(always(5)) == ENDS[::-1]


def test_the_cost_of_a_nested_step_is_one_trunk_and_its_decoders():
    config = VisualPerceiverConfig(num_labels=10, trunk_attention="block_causal")
    schedule = create_schedule({"schedule": "nested"}, 64, seed=0, block_ends=ENDS)
    D = config.hidden_size
    decoders = sum(2 * K * D**2 + 2 * K * D + 10 * D**2 + 10 * D for K in ENDS[:-1])
    assert step_macs(config, schedule, 0) == count_macs(config, 64) + decoders


def test_small_first_grows_by_equal_factors():
    schedule = create_schedule(EXAMPLES["small_first"], 64, seed=0, steps=1000)
    largest = [max(budgets(schedule(step))) for step in (0, 100, 200, 300, 400, 500, 999)]
    assert largest == [2, 4, 8, 16, 32, 64, 64]
    nested = {"schedule": "nested", "small_first": {"start": 1, "fraction": 1.0}}
    schedule = create_schedule(nested, 64, seed=0, steps=6, block_ends=ENDS)
    assert [budgets(schedule(step)) for step in (0, 2, 5)] == [[1], [4, 2, 1], [32, 16, 8, 4, 2, 1]]


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ({"schedule": "nested", "largest": {5: 1}}, "ends of blocks"),
        ({"schedule": "nested", "largest": {4: 0}}, "greater than 0 for `largest.4`, got 0"),
        ({"schedule": "nested", "largest": {}}, "at least 1 item"),
        (
            {"schedule": "uniform", "small_first": {"start": 65}},
            "`budgets.small_first`: Expected `start` to be at most 64, got 65",
        ),
        (
            {"schedule": "uniform", "small_first": {"fraction": 0}},
            "`budgets.small_first`: .*greater than 0 for `fraction`, got 0",
        ),
        ({"schedule": "uniform", "small_first": 3}, "`budgets.small_first` to be a group"),
    ],
    ids=str,
)
def test_nested_and_small_first_that_do_not_fit(queries, message):
    with pytest.raises(ValueError, match=message):
        create_schedule(queries, 64, seed=0, steps=10, block_ends=ENDS)
    with pytest.raises(ValueError, match="'block_causal', or exits\\) for the schedule `nested`"):
        create_schedule({"schedule": "nested"}, 64, seed=0)


def log_uniform_shares(largest):
    weights = 1 / np.arange(1, largest + 1)
    return weights / weights.sum()


def test_stratified_gives_each_image_one_budget_and_one_group_all():
    schedule = create_schedule({"schedule": "stratified", "groups": 4}, num_queries=8, seed=0)
    assert not schedule.distils
    drawn = []
    for step in range(2000):
        subsets = schedule(step)
        taken = [i for subset in subsets for i in range(16)[subset.images]]
        assert sorted(taken) == list(range(16))
        assert budgets(subsets, 8)[0] == 8
        drawn += budgets(subsets, 8)[1:]
    shares = np.bincount(drawn, minlength=9)[1:] / len(drawn)
    np.testing.assert_allclose(shares, log_uniform_shares(8), atol=0.02)


def test_sandwich_has_the_full_network_and_log_uniform_students():
    schedule = create_schedule({"schedule": "sandwich", "students": 2}, num_queries=8, seed=0)
    assert schedule.distils
    steps = [budgets(schedule(step), 8) for step in range(3000)]
    assert all(len(K) == 3 and K[0] == 8 for K in steps)
    shares = np.bincount([K for step in steps for K in step[1:]], minlength=9)[1:] / 6000
    np.testing.assert_allclose(shares[:7], log_uniform_shares(7), atol=0.02)
    assert shares[7] == 0  # the teacher is no student
    smallest = create_schedule({"schedule": "sandwich", "students": 2, "smallest": True}, 8, 0)
    assert all(budgets(smallest(step), 8)[:2] == [8, 1] and len(smallest(step)) == 3 for step in range(100))


def threshold(a_pass):
    return a_pass.budget.kwargs.get("dqs_threshold")


class TestDqsTail:
    def test_selects_for_a_share_of_the_students_in_the_last_steps(self):
        schedule = create_schedule(EXAMPLES["dqs_tail"], 64, 0, steps=4000)
        assert all(threshold(s) is None for step in range(3000) for s in schedule(step))
        tail = [schedule(step) for step in range(3000, 4000)]
        assert all(subsets[0] == Pass() for subsets in tail)
        thresholds = [threshold(s) for subsets in tail for s in subsets[1:]]
        selected = [t for t in thresholds if t is not None]
        assert 0.45 < len(selected) / len(thresholds) < 0.55
        assert 0.6 <= min(selected) < 0.62
        assert 0.88 < max(selected) <= 0.9
        assert all(budgets([s]) == [64] for subsets in tail for s in subsets if threshold(s) is not None)

    def test_leaves_the_other_subsets_as_they_were(self):
        with_tail, without = (
            create_schedule({"schedule": "stratified", "groups": 4, **more}, 64, 0, steps=100)
            for more in ({"dqs_tail": {**TAIL, "fraction": 1.0}}, {})
        )
        for step in range(100):
            for a, b in zip(with_tail(step), without(step), strict=True):
                assert a.images == b.images
                assert threshold(a) is not None or a == b

    def test_of_uniform_masking(self):
        schedule = create_schedule({"schedule": "uniform", "dqs_tail": {**TAIL, "share": 1.0}}, 64, 0, steps=100)
        assert [threshold(s) is not None for step in range(100) for s in schedule(step)] == [False] * 75 + [True] * 25


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ({"schedule": "uniforn"}, "one of fixed, uniform, stratified, sandwich, nested, got 'uniforn'"),
        ({}, "one of fixed, uniform, stratified, sandwich, nested, got None"),
        ({"schedule": "uniform", "K": 3}, "Unknown key `K` in `budgets` of schedule uniform"),
        ({"schedule": "fixed"}, "Missing key `K` in `budgets` of schedule fixed"),
        ({"schedule": "fixed", "K": 9}, "Expected `K` to be at most 8, got 9"),
        ({"schedule": "fixed", "K": True}, "valid integer for `K`, got True"),
        ({"schedule": "sandwich", "students": 17}, "less than or equal to 16 for `students`, got 17"),
        ({"schedule": "uniform", "seed": 3}, "Unknown key `seed`"),
        ({"schedule": "sandwich", "smallest": "yes"}, "valid boolean for `smallest`, got 'yes'"),
        ({"schedule": "sandwich", "m": 2}, "Unknown key `m` .* Allowed keys: smallest, students"),
        ({"schedule": "stratified", "groups": 1}, "greater than or equal to 2 for `groups`, got 1"),
        ({"schedule": "fixed", "K": 3, "dqs_tail": TAIL}, "a schedule of several K, got 'fixed'"),
        ({"schedule": "uniform", "dqs_tail": 0.5}, "`budgets.dqs_tail` to be a group of keys, got 0.5"),
        (
            {"schedule": "uniform", "dqs_tail": {**TAIL, "share": 2}},
            "`budgets.dqs_tail`: .*less than or equal to 1 for `share`, got 2",
        ),
        (
            {"schedule": "uniform", "dqs_tail": {**TAIL, "thresholds": [0.9, 0.6]}},
            r"`thresholds` to be \[low, high\], got \(0.9, 0.6\)",
        ),
        ({"schedule": "uniform", "dqs_tail": {**TAIL, "thresholds": 0.9}}, "valid tuple for `thresholds`, got 0.9"),
        ({"schedule": "uniform", "dqs_tail": {"share": 1}}, "Missing key `fraction` in `budgets.dqs_tail`"),
    ],
)
def test_mistakes_are_named(queries, message):
    with pytest.raises(ValueError, match=message):
        create_schedule(queries, 8, 0)


def test_macs_of_a_step():
    """Passes over the same image share the reading; the rest is counted for each pass."""
    config = VisualPerceiverConfig(num_labels=10)
    N, D = 64, 192
    for name in ("uniform", "stratified"):
        schedule = create_schedule(EXAMPLES[name], 64, 0)
        separate = np.mean([count_macs(config, K) for K in budgets(schedule(3))])
        assert step_macs(config, schedule, 3) == pytest.approx(separate)
    schedule = create_schedule(EXAMPLES["sandwich"], 64, 0)
    K = budgets(schedule(3))
    separate = sum(count_macs(config, k) for k in K)
    read = [N * 48 * D + N * 2 * D**2 + k * (D**2 + 2 * N * D) for k in K[1:]]
    assert step_macs(config, schedule, 3) == separate - sum(read)


def test_describe():
    knobs = VisualPerceiverConfig.knobs
    assert describe([Pass(Budget(num_active_queries=7))], knobs) == "K=7"
    assert describe([Pass(), Pass(Budget(num_active_queries=7))], knobs) == ["full", "K=7"]
    assert describe([Pass(Budget(dqs_threshold=0.81234))], knobs) == "t=0.812"
