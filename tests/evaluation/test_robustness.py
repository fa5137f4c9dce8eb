"""Robustness: the results equal those of plain loops, and the report contains them."""

import json
import re

import numpy as np
import pytest
import torch
from support import run, small_config
from typer.testing import CliRunner

from hf_visual_perceiver.cli.main import app
from hf_visual_perceiver.data.images import ImageDataset, load_images, normalise
from hf_visual_perceiver.evaluation.corruptions import corrupt
from hf_visual_perceiver.evaluation.difficulty import correlate, measure_difficulty
from hf_visual_perceiver.evaluation.evaluate import evaluate
from hf_visual_perceiver.evaluation.robustness import (
    Robustness,
    measure_robustness,
    read_robustness,
    robustness_budgets,
)
from hf_visual_perceiver.evaluation.robustness_report import robustness_section
from hf_visual_perceiver.hub.card import write_card
from hf_visual_perceiver.modeling import Budget
from hf_visual_perceiver.training.folder import save_folder
from hf_visual_perceiver.utils.files import write_json


CHOSEN = ["contrast", "gaussian_noise"]


@pytest.fixture(scope="module")
def data(cifar10):
    return load_images(cifar10, "test").subset(slice(0, 100))


@pytest.fixture(scope="module")
def result(trained, data):
    conditions = {"model": "m", "dataset": "d", "split": "test", "command": "visual-perceiver robustness --seed 3"}
    points = [
        *(Budget(num_active_queries=K) for K in (8, 16, 32)),
        Budget(),
        *(Budget(dqs_threshold=t) for t in (0.8, 0.9)),
    ]
    return measure_robustness(
        trained, data, points, CHOSEN, (5, 1), 48, 3, batch_size=20, progress=False, conditions=conditions
    )


@torch.no_grad()
def test_cells_equal_plain_loops(trained, data, result):
    assert result.names == ["K=8", "K=16", "K=32", "full", "t=0.8", "t=0.9"]
    assert (result.full, result.adaptive) == (Budget(), [4, 5])
    assert (result.corruptions, result.severities) == (CHOSEN, [1, 5])
    places = np.arange(48) * 100 // 48  # from the first to the last of the 100
    cfg, labels = trained.config.timm_pretrained_cfg, data.labels[places]
    scores = {}
    for name in CHOSEN:
        for severity in (1, 5):
            images = corrupt(data.images[places], name, severity, 3, places)
            pixels = normalise(images, cfg["mean"], cfg["std"])
            for outcome in result.cell(name, severity):
                output = trained(pixels, **outcome.budget.kwargs)
                right = (output.logits.argmax(-1).numpy() == labels).astype(float)
                scores[name, severity, outcome.budget] = right
                assert outcome.accuracy == pytest.approx(right.mean())
                assert outcome.used_mean == pytest.approx(output.active_queries.sum(1).float().mean().item())
    for number, point in enumerate(result.budgets):
        for name, severity, members in (
            ("contrast", None, [("contrast", 1), ("contrast", 5)]),
            ("all", 5, [("contrast", 5), ("gaussian_noise", 5)]),
            ("all", None, [(n, s) for n in CHOSEN for s in (1, 5)]),
        ):
            per_image = np.mean([scores[(*member, point)] for member in members], axis=0)
            outcome = result.cell(name, severity)[number]
            assert outcome.accuracy == pytest.approx(per_image.mean())
            assert outcome.standard_error == pytest.approx(per_image.std() / np.sqrt(48))


def test_clean_is_the_evaluation(trained, data, result):
    places = np.arange(48) * 100 // 48
    plain = evaluate(trained, data.subset(places), result.budgets, progress=False)
    for outcome, row in zip(result.cell("clean", 0), plain.rows, strict=True):
        assert outcome.accuracy == pytest.approx(row.accuracy)
        assert outcome.standard_error == pytest.approx(row.standard_error)
        assert outcome.used_mean == pytest.approx(row.used_mean)
        assert outcome.budget == row.budget


def test_default_budgets():
    config = small_config(num_queries=12)
    names = [budget.short(config.knobs) for budget in robustness_budgets(config)]
    assert names == ["K=2", "K=4", "K=8", "full", "t=0.7", "t=0.8", "t=0.9"]


def test_json_round_trip(result, tmp_path):
    assert Robustness.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False))) == result
    write_json(tmp_path / "r.json", result.to_dict())
    assert read_robustness(tmp_path / "r.json") == result
    for damaged in ("{", "{}", '{"cells": [1], "difficulty": [], "conditions": {}}'):
        (tmp_path / "r.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"r\.json to be a valid file"):
            read_robustness(tmp_path / "r.json")


def test_bad_input(trained, data, result):
    def measure(**arguments):
        measure_robustness(trained, data, progress=False, **arguments)

    with pytest.raises(ValueError, match=r"corruptions among gaussian_noise, .*, got frost"):
        measure(corruptions=["contrast", "frost"])
    with pytest.raises(ValueError, match="got none"):
        measure(corruptions=[])
    with pytest.raises(ValueError, match="severities from 1 to 5, got 0, 1"):
        measure(severities=[1, 0])
    with pytest.raises(ValueError, match="at least 1 image, got 0"):
        measure(max_images=0)
    with pytest.raises(ValueError, match="batch size of at least 1, got 0"):
        measure(batch_size=0)
    with pytest.raises(ValueError, match="the full network among the budgets, got K=8"):
        measure(budgets=[Budget(num_active_queries=8)])
    with pytest.raises(ValueError, match=r"in \[1, 64\], got 65"):
        measure(budgets=[Budget(num_active_queries=65), Budget()])
    with pytest.raises(ValueError, match="Expected classes among airplane"):
        measure_robustness(trained, ImageDataset(data.images, data.labels, ["zebra"] * 10), progress=False)
    with pytest.raises(ValueError, match="got 'snow' at 1"):
        result.cell("snow", 1)


def test_spearman_on_known_data():
    a = np.array([3.0, 1, 4, 1, 5])
    assert correlate(a, 10 * a**3).value == pytest.approx(1)
    assert correlate(a, -a).value == pytest.approx(-1)
    # Ranks less their mean: 0, -1.5, 1, -1.5, 2 and -1, -1, -1, 1.5, 1.5.
    assert correlate(a, np.array([0, 0, 0, 1, 1])).value == pytest.approx(1.25 / np.sqrt(9.5 * 7.5))
    assert correlate(a, np.ones(5)).value is None
    assert str(correlate(a, np.ones(5))) == "not defined"


def test_correlation_finds_what_was_put_in():
    rng = np.random.default_rng(0)
    x = rng.normal(size=2000)
    y = 0.6 * x + 0.8 * rng.normal(size=2000)
    found = correlate(x, y)
    # Of normal variables: 6 / pi * arcsin(r / 2).
    assert found.low < 6 / np.pi * np.arcsin(0.3) < found.high
    assert found.standard_error == pytest.approx(0.015, abs=0.005)
    unrelated = correlate(x, rng.normal(size=2000))
    assert unrelated.low < 0 < unrelated.high


def test_bins_hold_every_image():
    rng = np.random.default_rng(0)
    queries, confidence, right = rng.integers(5, 60, 500), rng.random(500), rng.random(500) > 0.3
    measured = measure_difficulty(Budget(dqs_threshold=0.9), queries, confidence, right)
    assert len(measured.bins) == 5
    assert sum(b.images for b in measured.bins) == 500
    assert all(60 <= b.images <= 140 for b in measured.bins)
    assert sum(b.images * b.accuracy for b in measured.bins) == pytest.approx(right.sum())
    assert sum(b.images * b.confidence for b in measured.bins) == pytest.approx(confidence.sum())
    assert all(a.used_max < b.used_min for a, b in zip(measured.bins, measured.bins[1:], strict=False))
    assert measured.used_wrong == pytest.approx(queries[~right].mean())
    (one,) = measure_difficulty(Budget(dqs_threshold=0.9), np.full(9, 3), confidence[:9], np.ones(9, dtype=bool)).bins
    assert (one.used_min, one.used_max, one.images) == (3, 3, 9)
    with pytest.raises(ValueError, match="of the same images, got 500, 500 and 9"):
        measure_difficulty(Budget(dqs_threshold=0.9), queries, confidence, right[:9])
    with pytest.raises(ValueError, match="got 0, 0 and 0"):
        measure_difficulty(Budget(dqs_threshold=0.9), queries[:0], confidence[:0], right[:0])


def test_section(result, tmp_path):
    text = robustness_section(result, tmp_path / "new")
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert len(pictures) == 4
    assert sorted(pictures) == sorted(p.name for p in (tmp_path / "new").iterdir())
    for picture in pictures:
        assert (tmp_path / "new" / picture).read_bytes().startswith(b"\x89PNG")
    for name, severity in (("clean", 0), ("contrast", None), ("gaussian_noise", None), ("all", 5), ("all", None)):
        for outcome in result.cell(name, severity):
            assert f"{100 * outcome.accuracy:.2f} ± {100 * outcome.standard_error:.2f}" in text
    for difficulty in result.difficulty:
        assert f"{difficulty.with_error} | {difficulty.used_right:.2f} | {difficulty.used_wrong:.2f} |" in text
    assert "Measured by\n\n    visual-perceiver robustness --seed 3\n" in text


def test_section_without_selection(trained, data, tmp_path):
    plain = measure_robustness(trained, data.subset(slice(0, 4)), [Budget()], ["contrast"], [2], progress=False)
    text = robustness_section(plain, tmp_path)
    assert "harder images" not in text
    assert "robustness_difficulty.png" not in {p.name for p in tmp_path.iterdir()}


def test_published_corruptions_are_read(trained, data, tmp_path):
    few = data.subset(slice(0, 10))
    np.save(tmp_path / "labels.npy", np.tile(few.labels, 5))
    contrast = [corrupt(few.images, "contrast", severity) for severity in (1, 2, 3, 4, 5)]
    np.save(tmp_path / "low_contrast.npy", np.concatenate(contrast))
    point = [Budget()]
    ours = measure_robustness(trained, few, point, ["contrast"], [1, 5], 6, batch_size=4, progress=False)
    read = measure_robustness(trained, few, point, None, [1, 5], 6, batch_size=4, progress=False, cifar10_c=tmp_path)
    assert [cell.outcomes for cell in read.cells] == [cell.outcomes for cell in ours.cells]
    assert read.corruptions == ["low_contrast"]
    assert (read.conditions["corrupted_by"], ours.conditions["corrupted_by"]) == ("CIFAR-10-C", "this package")
    assert "robustness_corrupted.png" not in robustness_section(read, tmp_path / "report")
    with pytest.raises(ValueError, match="corruptions among low_contrast, got contrast"):
        measure_robustness(trained, few, point, ["contrast"], [1], progress=False, cifar10_c=tmp_path)


def test_card_has_a_sentence_of_it(trained, data, result, tmp_path):
    folder = save_folder(trained, tmp_path / "m")
    conditions = {"model": "m", "dataset": "d", "split": "test"}
    measured = evaluate(trained, data.subset(slice(0, 8)), result.budgets, progress=False, conditions=conditions)
    assert (
        "Robustness to corrupted or shifted images was not measured."
        in write_card(folder, trained, measured).read_text()
    )
    write_json(folder / "robustness.json", result.to_dict())
    card = write_card(folder, trained, measured).read_text()
    assert "was not measured." not in card
    accuracy = 100 * result.cell("all", None)[3].accuracy
    assert f"Under 2 corruptions (robustness.json) the mean accuracy at full is {accuracy:.2f} %" in card
    (folder / "robustness.json").write_text("{}")
    with pytest.raises(ValueError, match="valid file"):
        write_card(folder, trained, measured)


def test_the_optimised_form_measures_the_same(trained, data):
    few = {"corruptions": ["contrast"], "severities": [5], "max_images": 32, "progress": False}
    plain, fast = (
        measure_robustness(trained, data, **few),
        measure_robustness(trained.optimize_for_inference(), data, **few),
    )
    assert plain.cells == fast.cells
    assert (plain.conditions.get("form"), fast.conditions.get("form")) == (None, "optimized")


def test_command(tmp_path):
    few = ["--corruption", "contrast", "--severity", 5, "--max-images", 20, "--budget", "t=0.8", "--fast"]
    written = ["--json", tmp_path / "r.json", "--output-dir", tmp_path / "report"]
    done = run("visual-perceiver", "robustness", *few, *written, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    result = read_robustness(tmp_path / "r.json")
    assert result.conditions["images"] == 20
    assert f"{100 * result.cell('contrast', 5)[0].accuracy:.2f}" in done.stdout
    assert (tmp_path / "report" / "robustness.json").read_text() == (tmp_path / "r.json").read_text()
    text = (tmp_path / "report" / "robustness.md").read_text()
    assert "visual-perceiver robustness --corruption contrast --severity 5 --max-images 20" in text
    for arguments, error in (
        (["--corruption", "frost"], "got frost"),
        (["--json", str(tmp_path / "missing" / "r.json")], "a file name in an existing folder"),
    ):
        refused = CliRunner().invoke(app, ["robustness", *arguments])
        assert isinstance(refused.exception, ValueError)
        assert error in str(refused.exception)
