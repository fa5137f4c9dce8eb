"""Messages of commands on stderr."""

import pytest

from hf_visual_perceiver.data.images import load_images
from hf_visual_perceiver.evaluation.calibration import Target, calibrate
from hf_visual_perceiver.evaluation.evaluate import evaluate
from hf_visual_perceiver.evaluation.retrieval import measure_retrieval
from hf_visual_perceiver.evaluation.robustness import measure_robustness
from hf_visual_perceiver.modeling import Budget
from hf_visual_perceiver.utils import console
from hf_visual_perceiver.utils.console import print_error, tracked


@pytest.fixture
def slow(monkeypatch):
    """Simulate a long time for each item."""
    monkeypatch.setattr(console, "SECONDS", 1e-9)


def test_a_line_now_and_then_where_there_is_no_terminal(slow, capsys):
    assert list(tracked("abcdef", "reading")) == list("abcdef")
    assert "reading:" in capsys.readouterr().err
    assert list(tracked("abcdef", None)) == list("abcdef")
    assert capsys.readouterr() == ("", "")


def test_nothing_is_said_of_what_is_quick(capsys):
    assert list(tracked(range(3), "reading")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(console.sys.stderr, "isatty", lambda: True)
    assert list(tracked(range(3), "reading")) == [0, 1, 2]
    assert "100%" in capsys.readouterr().err


def test_an_evaluation_says_how_far_it_is(slow, capsys, trained, cifar10):
    data = load_images(cifar10, "test").subset(slice(0, 4))
    evaluate(trained, data, [Budget(num_active_queries=1)], batch_size=1)
    output = capsys.readouterr()
    assert "evaluating:" in output.err
    assert not output.out
    evaluate(trained, data, [Budget(num_active_queries=1)], batch_size=1, progress=False)
    assert capsys.readouterr() == ("", "")


def test_other_long_measurements_say_how_far_they_are(slow, capsys, trained, cifar10):
    data = load_images(cifar10, "test").subset(slice(0, 4))
    measure_robustness(trained, data, [Budget()], ["contrast"], [1])
    assert "corrupting:" in capsys.readouterr().err
    measure_retrieval(trained.visual_perceiver, data, data, [Budget(num_active_queries=1)], neighbours=1, batch_size=2)
    assert "gallery:" in capsys.readouterr().err
    calibrate(trained, data, Target("macs", 0.5), [Budget(num_active_queries=1)], batch_size=1)
    assert "evaluating:" in capsys.readouterr().err


def test_an_error_is_one_line(capsys):
    print_error("a [bold]file[/bold]\nof two")
    assert capsys.readouterr().err == "error: a [bold]file[/bold] of two\n"
