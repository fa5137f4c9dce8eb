"""A run's curves: every K has its line and label, also of a log that has hardly begun."""

import itertools

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from hf_visual_perceiver.training.curves import budget_colors, plot_curves, smoothed, spread


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
    """Plot a log and return the figure as it was saved."""
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


def annotations(axes):
    return [text for text in axes.texts if text.get_text()]


def test_every_budget_has_a_line_and_a_label_at_its_end(drawn):
    budgets = [1, 2, 4, 8, 16, 32, 48, 64]
    _, right = drawn(log(reversed(budgets))).axes
    assert [text.get_text() for text in annotations(right)] == [f"K = {K}" for K in budgets]
    for line, text, K in zip(right.lines, annotations(right), budgets, strict=True):
        assert line.get_xydata().tolist() == pytest.approx(np.array([[100, 40 + K / 100], [200, 40 + K / 100]]))
        assert text.xy == pytest.approx((200, 40 + K / 100))
        assert text.get_color() == line.get_color()


def test_labels_do_not_overlap(drawn):
    figure = drawn(log([*range(1, 11), 2000]))  # ten nearly alike
    _, right = figure.axes
    figure.draw_without_rendering()
    # The box of an annotation reaches to the point it is for; that of its text alone must be free.
    boxes = [Text.get_window_extent(text) for text in annotations(right)]
    assert len(boxes) == 11
    for a, b in itertools.combinations([*boxes, right.get_window_extent()], 2):
        assert not a.overlaps(b)
    assert all(figure.bbox.containsx(box.x1) for box in boxes)


def test_raw_and_smoothed_loss(drawn):
    entries = log([1])
    left, _ = drawn(entries).axes
    raw, smooth = left.lines
    assert list(raw.get_ydata()) == [entry["loss"] for entry in entries if "loss" in entry]
    assert raw.get_alpha() < 0.5 < smooth.get_linewidth()
    assert list(smooth.get_ydata()) == pytest.approx(smoothed(raw.get_ydata()))


def test_the_losses_of_a_sandwich_are_named(drawn):
    entries = [
        {"step": step, "loss": 2.0, "full_loss": 1.5, "student_loss": 0.5, "K": [64, 7, 21]} for step in range(1, 9)
    ]
    left, _ = drawn(entries).axes
    assert [text.get_text() for text in annotations(left)] == ["loss", "full", "students"]


@pytest.mark.parametrize(
    ("entries", "messages"),
    [
        ([], ["no training steps logged yet", "not evaluated yet"]),
        ([{"step": 1, "loss": 2.0, "K": 3}], ["", "not evaluated yet"]),
        ([{"step": 1, "validation_accuracy": 0.1, "K": 3}], ["no training steps logged yet", "K = 3"]),
        ([{"step": 1, "loss": float("nan"), "K": 3}], ["no training steps logged yet", "not evaluated yet"]),
    ],
)
def test_logs_that_have_hardly_begun(drawn, entries, messages):
    shown = ["".join(text.get_text() for text in axes.texts) for axes in drawn(entries).axes]
    assert shown == messages


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


def test_spread_keeps_order_and_distance():
    random = np.random.default_rng(0)
    for _ in range(50):
        places = random.uniform(0, 10, 8).tolist()
        result = spread(places, gap=1.0)
        assert np.argsort(result).tolist() == np.argsort(places).tolist()
        assert min(b - a for a, b in itertools.pairwise(sorted(result))) >= 1 - 1e-9
    assert spread([0.0, 5.0, 2.0], gap=1.0) == [0.0, 5.0, 2.0]
    # Each block lies around the middle of where its labels belong.
    assert spread([1.0, 1.0, 1.0, 9.0], gap=2.0) == pytest.approx([-1.0, 1.0, 3.0, 9.0])
    assert spread([], gap=1.0) == []


def test_smoothed():
    assert smoothed([3.0] * 100) == pytest.approx([3.0] * 100)
    random = np.random.default_rng(0).normal(size=4000)
    assert np.std(smoothed(random)[1000:]) < 0.2
    assert abs(smoothed([0.0] * 500 + [1.0] * 500)[-1] - 1) < 1e-3


def test_colours_of_budgets_are_ordered_and_dark_enough_to_read():
    def lightness(color):
        return np.dot(matplotlib.colors.to_rgb(color), [0.2126, 0.7152, 0.0722])

    values = [lightness(color) for color in budget_colors(8)]
    assert values == sorted(values)
    assert values[-1] < 0.75
    assert len(budget_colors(1)) == 1
