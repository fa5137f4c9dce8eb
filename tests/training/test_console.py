"""What commands say on stderr."""

import pytest
from rich.console import Console

from hf_visual_perceiver.calibration import Target, calibrate
from hf_visual_perceiver.evaluation import OperatingPoint, evaluate
from hf_visual_perceiver.retrieval import measure_retrieval
from hf_visual_perceiver.robustness import measure_robustness
from hf_visual_perceiver.training import console
from hf_visual_perceiver.training.console import print_error, tracked
from hf_visual_perceiver.training.data import load_images


@pytest.fixture
def clock(monkeypatch):
    """A clock on which 20 seconds pass whenever it is looked at."""
    now = [0.0]

    def monotonic():
        now[0] += 20
        return now[0]

    monkeypatch.setattr(console.time, "monotonic", monotonic)


def test_a_line_now_and_then_where_there_is_no_terminal(clock, capsys):
    assert list(tracked("abcdef", "reading")) == list("abcdef")
    assert capsys.readouterr().err.splitlines() == ["reading: 1 of 6", "reading: 3 of 6", "reading: 5 of 6"]
    assert list(tracked("abcdef", None)) == list("abcdef")
    assert capsys.readouterr() == ("", "")


def test_nothing_is_said_of_what_is_quick(capsys):
    assert list(tracked(range(3), "reading")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(console, "Console", lambda stderr: Console(stderr=stderr, force_terminal=True, width=80))
    assert list(tracked(range(3), "reading")) == [0, 1, 2]
    assert "100%" in capsys.readouterr().err


def test_an_evaluation_says_how_far_it_is(clock, capsys, trained, cifar10):
    data = load_images(cifar10, "test").subset(slice(0, 4))
    evaluate(trained, data, [OperatingPoint(1)], batch_size=1)
    output = capsys.readouterr()
    assert "evaluating: 1 of 4" in output.err
    assert not output.out
    evaluate(trained, data, [OperatingPoint(1)], batch_size=1, progress=False)
    assert capsys.readouterr() == ("", "")


def test_other_long_measurements_say_how_far_they_are(monkeypatch, capsys, trained, cifar10):
    monkeypatch.setattr(console, "SECONDS", 0.0)
    data = load_images(cifar10, "test").subset(slice(0, 4))
    measure_robustness(trained, data, [OperatingPoint(64)], ["fog"], [1])
    assert "corrupting: 1 of 2" in capsys.readouterr().err
    measure_retrieval(trained.visual_perceiver, data, data, [OperatingPoint(1)], neighbours=1, batch_size=2)
    assert "gallery: 1 of 2" in capsys.readouterr().err
    calibrate(trained, data, Target("macs", 0.5), [OperatingPoint(1)], batch_size=1)
    assert "evaluating: 1 of 2" in capsys.readouterr().err


def test_an_error_is_one_line(capsys):
    print_error("a [bold]file[/bold]\nof two")
    assert capsys.readouterr().err == "error: a [bold]file[/bold] of two\n"
