"""The plan for many GPUs: its arithmetic by hand, and the page that prints it."""

import numpy as np
import pytest
from support import REPOSITORY

from hf_visual_perceiver.modeling import QuerySubset, VisualPerceiverConfig, count_macs
from hf_visual_perceiver.modeling.macs import count_trunk_macs
from hf_visual_perceiver.training.scaling import PLANS, Assumptions, Plan, scaling_table, student_macs
from hf_visual_perceiver.training.schedules import create_schedule


# Numbers that are easy to compute with.
ROUND = Assumptions(
    peak_tflops=100,
    utilisation=0.1,
    dollars_per_gpu_hour=2,
    images_per_gpu=100,
    largest_batch=1000,
    epochs=10,
    students=1,
    kilobytes_per_image=100,
    decodes_per_core=100,
)


def test_a_plan_computed_by_hand():
    plan = Plan("visual_perceiver_tiny_patch16_224", 16, ROUND)
    # 196 patches of 768 numbers to 192; keys and values; 196 queries: own projection, scores and sums over 196 patches,
    # output projection, MLP; 12 blocks; the decoder and its MLP; 1,000 labels.
    patches, keys_values, mlp = 196 * 768 * 192, 196 * 2 * 192**2, 2 * 192 * 768
    reading = 196 * (192**2 + 2 * 196 * 192 + 192**2 + mlp)
    trunk = 12 * (196 * (4 * 192**2 + mlp) + 2 * 196**2 * 192)
    decoder = 196 * 2 * 192**2 + 2 * 192**2 + 2 * 196 * 192 + mlp + 192 * 1000
    macs = patches + keys_values + reading + trunk + decoder
    assert round(macs / 1e6, 1) == 1362.9
    assert count_macs(plan.config) == macs
    # A student adds its own blocks and decoder.
    macs += student_macs(plan.config)
    assert plan.macs_per_image == macs
    # 1,600 images would be too many; 1,000 of them on 16 GPUs at 10^13 operations per second each.
    assert plan.batch_size == 1000
    assert plan.steps == 10 * 1281
    assert plan.step_seconds == pytest.approx(6 * macs * 1000 / 16 / 1e13)
    assert plan.learning_rates == pytest.approx((5e-4 * 1000 / 512, 5e-4 * (1000 / 512) ** 0.5))
    # Each GPU sends 15/16 of the float32 gradients twice, within two thirds of the step.
    assert plan.bytes_sent == pytest.approx(2 * 15 / 16 * 4 * plan.parameters)
    assert plan.bandwidth == pytest.approx(plan.bytes_sent * 1.5 / plan.step_seconds)
    # Half of the images are those of a node, one of two.
    assert plan.images_per_second == pytest.approx(500 / plan.step_seconds)
    assert plan.hours == pytest.approx(12810 * plan.step_seconds / 3600)
    cells = plan.cells()
    # 62.5 images of 9.347e9 operations at 10^13 per second; 6.65 M parameters of 16 bytes.
    assert cells["step (ms)"] == "58.4"
    assert cells["images/s per node"] == "8,559"
    assert cells["storage per node (MB/s)"] == "856"
    assert cells["decode cores per node"] == "86"
    assert cells["parameters (M)"] == "6.65"
    assert cells["checkpoint (MB)"] == "106"
    assert cells["hours"] == "0.21"
    assert cells["dollars"] == "7"


def test_parameters_are_those_of_the_architectures():
    small = Plan("visual_perceiver_small_patch16_224", 8, ROUND)
    assert small.cells()["parameters (M)"] == "25.68"
    assert small.cells()["forward MACs at all queries (G)"] == "5.010"


def test_students_cost_what_the_schedule_draws():
    config = VisualPerceiverConfig(num_labels=10)
    schedule = create_schedule({"schedule": "sandwich", "students": 16}, num_queries=64, seed=0)
    full, *_ = schedule(0)
    assert full == QuerySubset(64)
    drawn = [count_trunk_macs(config, s.num_active_queries) for step in range(1000) for s in schedule(step)[1:]]
    assert student_macs(config) == pytest.approx(np.mean(drawn), rel=0.02)


def test_a_step_costs_the_full_network_and_each_students_trunk():
    assumptions = Assumptions(students=3)
    plan = Plan("visual_perceiver_tiny_patch16_224", 8, assumptions)
    assert plan.macs_per_image == pytest.approx(count_macs(plan.config) + 3 * student_macs(plan.config))
    assert plan.macs_per_image < count_macs(plan.config) * 1.5


def test_the_page_has_the_table_that_the_command_prints():
    page = (REPOSITORY / "training" / "accelerate" / "README.md").read_text()
    assert scaling_table(Assumptions()) in page


def test_the_table_has_a_column_for_every_plan():
    header, rule, *rows = scaling_table(Assumptions()).splitlines()[2:]
    assert {line.count("|") for line in (header, rule, *rows)} == {len(PLANS) + 2}


@pytest.mark.parametrize(("name", "value"), [("utilisation", 0.0), ("utilisation", 1.5), ("decodes_per_core", -1.0)])
def test_assumptions_that_cannot_be(name, value):
    with pytest.raises(ValueError, match=f"`{name}` to be .*, got {value}"):
        Assumptions(**{name: value})
