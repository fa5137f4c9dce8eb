"""Out of memory: the message names a batch size that fits."""

import sys

import pytest
import torch

from hf_visual_perceiver.cli import main as cli
from hf_visual_perceiver.evaluation.evaluate import output_at
from hf_visual_perceiver.modeling import Budget, VisualPerceiverForImageClassification
from hf_visual_perceiver.utils.memory import fitting


class Machine:
    """A device with memory for a given number of images."""

    def __init__(self, room):
        self.room = room

    def __call__(self, pixels):
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize(("room", "advice"), [(5, "4 fit"), (4, "4 fit"), (1, "1 fit"), (0, "not even one image fits")])
def test_the_size_has_been_tried(room, advice):
    machine, pixels = Machine(room), torch.zeros(8, 1)
    expected = f"a batch of 8 images to fit in the memory of cpu; {advice}"
    with pytest.raises(ValueError, match=expected), fitting(machine, pixels):
        machine(pixels)


def test_other_errors_stay_what_they_are():
    def broken(pixels):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"), fitting(broken, torch.zeros(2, 1)):
        broken(torch.zeros(2, 1))


def full_beyond(monkeypatch, room):
    forward = VisualPerceiverForImageClassification.forward

    def limited(self, pixel_values, **arguments):
        if len(pixel_values) > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, pixel_values, **arguments)

    monkeypatch.setattr(VisualPerceiverForImageClassification, "forward", limited)


def test_at_a_budget(model, images, monkeypatch):
    full_beyond(monkeypatch, 3)
    with pytest.raises(ValueError, match="memory of cpu; 3 fit"):
        output_at(model, images, Budget(num_active_queries=4))
    assert model.config.dqs_threshold is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "--batch-size", "8"],
        ["benchmark", "--batch-size", "8", "--form", "eager", "--dtype", "float32", "--repetitions", "1"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands(arguments, monkeypatch, capsys):
    full_beyond(monkeypatch, 2)
    monkeypatch.setattr(sys, "argv", ["visual-perceiver", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert "images to fit in the memory of cpu; " in message
    assert " fit." in message
