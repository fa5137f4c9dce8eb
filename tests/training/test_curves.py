"""A run's curves: one line for each budget, also for a short log; and the names of budgets in a run's log."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from hf_visual_perceiver.evaluation.comparison import compare_runs
from hf_visual_perceiver.hub.card import training_lines
from hf_visual_perceiver.inference.loading import default_dataset
from hf_visual_perceiver.training.curves import plot_curves, recipe_step_names, smoothed
from hf_visual_perceiver.training.recipe import recipe_from_dict
from hf_visual_perceiver.training.train import train


def log(budgets, steps=range(10, 210, 10), every=100):
    budgets = list(budgets)
    entries = []
    for step in steps:
        entries.append({"step": step, "loss": 2 + 10 / step, "K": 7, "learning_rate": 1e-3, "images_per_second": 9.0})
        if step % every == 0:
            entries += [{"step": step, "validation_accuracy": 0.4 + K / 1e4, "K": K} for K in budgets]
    return entries


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Plot a log and return the saved figure."""
    figures = []
    savefig = Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        savefig(figure, *args, **kwargs)

    def draw(entries):
        monkeypatch.setattr(Figure, "savefig", keep)
        plot_curves(entries, tmp_path / "curves.png")
        assert Image.open(tmp_path / "curves.png").width > 1000
        assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
        return figures[-1]

    return draw


def labels(axes):
    legend = axes.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def test_every_budget_has_a_line(drawn):
    budgets = [1, 2, 4, 8, 16, 32, 48, 64]
    _, right = drawn(log(reversed(budgets))).axes
    assert labels(right) == [f"K = {K}" for K in budgets]
    for line, K in zip(right.lines, budgets, strict=True):
        assert line.get_xydata().tolist() == pytest.approx(np.array([[100, 40 + K / 100], [200, 40 + K / 100]]))


def test_budgets_that_have_names(drawn):
    # The first lines are of an earlier version, which logged K alone; the run was resumed by this one.
    entries = [{"step": 1, "validation_accuracy": 0.1, "K": K} for K in (1, 2, 3)]
    names = {1: "exit=1", 3: "full"}
    entries += [{"step": 2, "validation_accuracy": 0.2, "K": K, "budget": name} for K, name in names.items()]
    _, right = drawn(entries).axes
    assert labels(right) == ["exit = 1", "K = 2", "the full network"]


@pytest.mark.parametrize(
    ("architecture", "config", "names"),
    [
        ("visual_perceiver_nano_patch4_32", {"num_queries": 3}, ["K=1", "K=2", "K=3"]),
        ("visual_perceiver_nano_patch4_32", {"num_queries": 1}, ["K=1"]),
        ("dvt_nano_2exits_32", {}, ["exit=1", "full"]),
        ("perceiver_nano_32", {"num_queries": 4}, ["i=1", "K=1", "i=2", "K=2", "full"]),
        ("qna_vit_nano_32", {}, ["full"]),
        ("timm/resnet18", {"channels": [8, 8, 8, 8]}, ["full"]),
    ],
)
def test_names_of_a_recipes_budgets(architecture, config, names):
    found = recipe_step_names({"architecture": architecture, "config": config})
    assert list(found) == list(range(1, len(names) + 1))
    assert sorted(found.values()) == sorted(names)
    assert list(found.values())[-1] == names[-1]


def test_a_run_of_another_family_names_its_budgets(tmp_path, capsys):
    values = {
        "architecture": "dvt_nano_32",
        "config": {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16},
        "budgets": {"schedule": "nested"},
        "dataset": default_dataset(),
        "validation": 40,
        "steps": 1,
        "batch_size": 8,
        "tracker": None,
        "evaluate_budgets": [1, 3],
    }
    model = train(recipe_from_dict(values), tmp_path / "run")
    facts = json.loads((model / "training.json").read_text())
    first, full = facts["validation_accuracy"]["1"], facts["validation_accuracy"]["3"]
    said = f"validation accuracy (%) {100 * first:.2f} with exit = 1, {100 * full:.2f} with the full network"
    assert said in capsys.readouterr().err
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {e["K"]: e["budget"] for e in entries if "validation_accuracy" in e} == {1: "exit=1", 3: "full"}
    assert training_lines(facts)[-1].endswith(f" {100 * first:.2f} % (exit=1), {100 * full:.2f} % (full).")
    assert compare_runs([tmp_path / "run"]).table()[0][-2:] == ["exit = 1", "full"]


def test_raw_and_smoothed_loss(drawn):
    entries = log([1])
    left, _ = drawn(entries).axes
    raw, smooth = left.lines
    assert list(raw.get_ydata()) == [entry["loss"] for entry in entries if "loss" in entry]
    assert raw.get_alpha() < 0.5
    assert list(smooth.get_ydata()) == pytest.approx(smoothed(raw.get_ydata()))


def test_the_losses_of_a_sandwich_are_named(drawn):
    entries = [
        {"step": step, "loss": 2.0, "full_loss": 1.5, "student_loss": 0.5, "K": [64, 7, 21]} for step in range(1, 9)
    ]
    left, _ = drawn(entries).axes
    assert labels(left) == ["loss", "full", "students"]


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        ([], [[], []]),
        ([{"step": 1, "loss": 2.0, "K": 3}], [["loss"], []]),
        ([{"step": 1, "validation_accuracy": 0.1, "K": 3}], [[], ["K = 3"]]),
        ([{"step": 1, "loss": float("nan"), "K": 3}], [[], []]),
    ],
)
def test_logs_that_have_hardly_begun(drawn, entries, names):
    assert [labels(axes) for axes in drawn(entries).axes] == names


def test_one_wrong_step_does_not_flatten_the_others(drawn):
    entries = log([], steps=range(1, 1001))
    entries[500]["loss"] = 1e6
    left, _ = drawn(entries).axes
    low, high = left.get_ylim()
    assert low < 2
    assert 3 < high < 30


def test_a_failed_plot_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_text("old")

    def fail(figure, target, **kwargs):
        target.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_curves([], path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


def test_smoothed():
    assert smoothed([3.0] * 100) == pytest.approx([3.0] * 100)
    random = np.random.default_rng(0).normal(size=4000)
    assert np.std(smoothed(random)[1000:]) < 0.2
    assert abs(smoothed([0.0] * 500 + [1.0] * 500)[-1] - 1) < 1e-3
