"""Calibration: the chosen budget, the intervals, the written config, and errors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from support import papers_form, small_config
from transformers import AutoConfig
from typer.testing import CliRunner

from hf_visual_perceiver import bundled_checkpoint
from hf_visual_perceiver.cli.main import app
from hf_visual_perceiver.data.images import load_images, normalise
from hf_visual_perceiver.evaluation.calibration import (
    Target,
    calibrate,
    candidate_budgets,
    choose_budget,
    meets,
    paired_interval,
    reference_row,
    write_budget,
)
from hf_visual_perceiver.evaluation.evaluate import Row
from hf_visual_perceiver.inference.loading import load_model
from hf_visual_perceiver.modeling import Budget, count_macs


def row(K, accuracy, macs, t=None, ms=None):
    budget = Budget(num_active_queries=K if K < 64 else None, dqs_threshold=t)
    return Row(budget, K, 0.0, K, K, macs, accuracy, 0.01, macs if ms is None else ms, 1.0)


ROWS = [
    row(1, 0.3, 10),
    row(8, 0.70, 20),
    row(16, 0.80, 30),
    row(32, 0.79, 60),
    row(64, 0.805, 100),
    row(64, 0.81, 50, 0.9, 80),
]


@pytest.mark.parametrize(
    ("target", "K", "t"),
    [
        (Target("macs", 0.25), 8, None),
        (Target("macs", 0.3), 16, None),
        (Target("macs", 0.49), 16, None),
        (Target("macs", 0.5), 64, 0.9),
        (Target("macs", 1), 64, 0.9),
        (Target("ms", 60), 16, None),
        (Target("ms", 80), 64, 0.9),
        (Target("accuracy_drop", 0.0), 64, 0.9),  # cheaper than all queries and no worse
        (Target("accuracy_drop", 0.5), 16, None),
        (Target("accuracy_drop", 20), 8, None),
        (Target("accuracy_drop", 100), 1, None),
    ],
)
def test_the_best_row_that_meets_the_target(target, K, t):
    for rows in (ROWS, ROWS[::-1]):
        assert choose_budget(rows, target).budget == row(K, 0, 0, t).budget


def test_ties_go_to_the_cheaper():
    rows = [row(64, 0.8, 100), row(16, 0.8, 30), row(8, 0.8, 20)]
    assert choose_budget(rows, Target("macs", 1)).budget == Budget(num_active_queries=8)


def test_a_target_that_cannot_be_met_says_what_can():
    with pytest.raises(ValueError, match=r"at most 0.05 of the MACs.*K=1 comes nearest with 0.1"):
        choose_budget(ROWS, Target("macs", 0.05), small_config().knobs)
    with pytest.raises(ValueError, match=r"at most 5 ms.*K=1 comes nearest with 10"):
        choose_budget(ROWS, Target("ms", 5), small_config().knobs)


def test_bad_targets():
    with pytest.raises(ValueError, match=r"exactly one.*got macs 0.5, ms 2"):
        Target.from_options(target_macs=0.5, target_ms=2.0)
    with pytest.raises(ValueError, match=r"exactly one.*got none"):
        Target.from_options()
    assert Target.from_options(max_accuracy_drop=0.0) == Target("accuracy_drop", 0.0)
    for kind, values in {
        "macs": (0, 1.5, float("nan")),
        "ms": (0, -1, float("inf")),
        "accuracy_drop": (-0.1, 101),
    }.items():
        for value in values:
            with pytest.raises(ValueError, match="Expected a"):
                Target(kind, value)
    with pytest.raises(ValueError, match="kind"):
        Target("seconds", 1)
    with pytest.raises(ValueError, match=r"Expected knobs among K, t, .*, got best"):
        candidate_budgets(small_config(), ["best"])


def test_candidates():
    config = small_config(num_queries=64)
    for search in ([], ["K"], ["t"], ["K", "dqs_threshold"]):
        points = candidate_budgets(config, search)
        assert Budget() in points
        assert len(points) == len(set(points))
        for point in points:
            config.resolve(**point.kwargs)
    target = Target("macs", 0.37)
    fitting = [K for K in range(1, 65) if count_macs(config, K) <= 0.37 * count_macs(config, 64)]
    assert Budget(num_active_queries=max(fitting)) in candidate_budgets(config, ["K"], target)


def test_paired_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).multinomial(300, [0.06, 0.03, 0.91], 2000)
    covered = [low <= 3.0 <= high for low, high in (paired_interval(int(b), int(c), 300) for b, c, _ in draws)]
    assert 0.93 < np.mean(covered) < 0.975
    low, high = paired_interval(30, 10, 1000)
    assert paired_interval(10, 30, 1000) == pytest.approx((-high, -low))


def test_impossible_counts():
    with pytest.raises(ValueError, match="lost \\+ won <= images"):
        paired_interval(2, 2, 3)


@pytest.fixture(scope="module")
def data(cifar10):
    return load_images(cifar10, "test").subset(slice(0, 120))


@pytest.mark.parametrize("target", [Target("macs", 0.3), Target("accuracy_drop", 3)], ids=str)
def test_thresholds_of_early_exits_are_searched_one_by_one(data, target):
    model = load_model(bundled_checkpoint("dvt_nano_cifar10"))
    result = calibrate(model, data, target, batch_size=60, progress=False, search=["p"])
    # One threshold for all exits is tried too, and is no better.
    same = [row for row in result.curve if len(set(row.budget.kwargs.get("exit_thresholds", [0]))) == 1]
    alone = [row for row in same if row.budget == Budget() or meets(row, reference_row(result.curve), target)]
    if target.kind == "macs":
        assert result.chosen_on.accuracy > max((row.accuracy for row in alone if row.budget != Budget()), default=0)
        assert result.chosen_on.macs <= 0.3 * result.full.macs
    else:
        assert result.chosen_on.macs < min(row.macs for row in alone)
    assert len(set(result.budget.kwargs["exit_thresholds"])) == 2
    assert not any("max_exit" in row.budget.kwargs for row in result.curve)
    # Without the thresholds' knob, exits are tried alone.
    exits = calibrate(model, data, Target("macs", 0.5), batch_size=60, progress=False)
    assert exits.budget == Budget(max_exit=2)


def test_it_chooses_on_one_half_and_reports_on_the_other(trained, data):
    result = calibrate(
        trained,
        data,
        Target("macs", 0.3),
        [Budget(num_active_queries=4), Budget(num_active_queries=16)],
        30,
        progress=False,
    )
    assert result.budget in (Budget(num_active_queries=4), Budget(num_active_queries=16))
    K = result.budget.kwargs["num_active_queries"]
    chosen, other = data.subset(slice(0, None, 2)), data.subset(slice(1, None, 2))
    for half, found in ((chosen, result.chosen_on), (other, result.achieved)):
        cfg = trained.config.timm_pretrained_cfg
        pixels = normalise(half.images, cfg["mean"], cfg["std"])
        with torch.no_grad():
            right = trained(pixels, num_active_queries=K).logits.argmax(-1).numpy() == half.labels
        assert found.accuracy == pytest.approx(right.mean())
    assert result.drop == pytest.approx(100 * (result.full.accuracy - result.achieved.accuracy))
    assert result.drop_interval[0] < result.drop < result.drop_interval[1]
    assert result.accuracy_interval[0] < result.achieved.accuracy < result.accuracy_interval[1]
    assert result.achieved.macs <= 0.3 * result.full.macs
    assert result.met


def test_one_image_is_too_few(trained, data):
    with pytest.raises(ValueError, match="at least 2 images"):
        calibrate(trained, data.subset(slice(0, 1)), Target("macs", 0.5), progress=False)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(papers_form(), tmp_path / "model")


def test_the_operating_point_is_written_and_loaded_by_both_libraries(folder):
    before = json.loads((folder / "config.json").read_text())
    write_budget(folder, Budget(num_active_queries=32, dqs_threshold=0.8))
    config = AutoConfig.from_pretrained(folder)
    assert (config.num_active_queries, config.dqs_threshold) == (32, 0.8)
    network = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert network.config.operating_point() == (32, 0.8)
    after = json.loads((folder / "config.json").read_text())
    write_budget(folder, Budget())
    assert json.loads((folder / "config.json").read_text()) == before
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"num_active_queries", "dqs_threshold", "model_args"}


def test_a_failed_write_leaves_the_old_file(folder, monkeypatch):
    before = (folder / "config.json").read_text()
    for bad in (Budget(num_active_queries=65), Budget(dqs_threshold=-2.0)):
        with pytest.raises(ValueError, match="Expected"):
            write_budget(folder, bad)

    def fail(self, text):
        with self.open("w") as file:
            file.write(text[:40])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="no space"):
        write_budget(folder, Budget(num_active_queries=8))
    assert (folder / "config.json").read_text() == before
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_folders_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        write_budget(tmp_path, Budget(num_active_queries=8))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="valid file"):
        write_budget(tmp_path, Budget(num_active_queries=8))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="visual_perceiver"):
        write_budget(tmp_path, Budget(num_active_queries=8))


def command(*arguments):
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


def test_the_command(folder, tmp_path):
    arguments = ["--model", folder, "--max-images", 100, "--budget", "K=4", "--budget", "K=8"]
    result = command("--target-macs", 0.2, "--write", "--json", tmp_path / "c.json", *arguments)
    assert result.exit_code == 0, result.exception
    assert "fewer than 500" in result.stderr
    values = json.loads((tmp_path / "c.json").read_text())
    assert values["budget"]["num_active_queries"] in (4, 8)
    low, high = values["accuracy_interval"]
    assert f"{100 * values['achieved']['accuracy']:.2f} ({100 * low:.2f} to {100 * high:.2f})" in result.stdout
    assert values["conditions"]["images"] == 100
    assert AutoConfig.from_pretrained(folder).num_active_queries == values["budget"]["num_active_queries"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target-macs", 0.5, "--target-ms", 2), "exactly one"),
        (("--target-ms", 2, "--max-accuracy-drop", 1), "exactly one"),
        ((), "exactly one"),
        (("--target-macs", 0.0001, "--max-images", 20, "--budget", "K=1"), "K=1 comes nearest"),
        (("--target-macs", 0.5, "--write", "--model", "nobody/nothing"), "model folder for --write"),
    ],
)
def test_the_command_refuses(arguments, message):
    result = command(*arguments)
    assert isinstance(result.exception, ValueError)  # which `main` prints in one line
    assert message in str(result.exception)


def test_a_set_without_labels_is_refused(tmp_path, data):
    data.image(0).save(tmp_path / "a.png")
    data.image(1).save(tmp_path / "b.png")
    result = command("--dataset", tmp_path, "--split", "train", "--target-macs", 0.5)
    assert isinstance(result.exception, ValueError)
    assert "one for each class" in str(result.exception)
