"""A run's curves: one line for each K, also for a short log."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from hf_visual_perceiver.training.curves import plot_curves, smoothed


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
