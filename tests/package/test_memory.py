"""A batch that does not fit in memory: the message names a size that does."""

import sys

import pytest
import torch
from support import REPOSITORY

from hf_visual_perceiver import cli, memory
from hf_visual_perceiver.evaluation import OperatingPoint, forward_at
from hf_visual_perceiver.memory import batch_size_that_fits, fitting, is_out_of_memory
from hf_visual_perceiver.modeling import VisualPerceiverForImageClassification


class Machine:
    """Has memory for so many images."""

    def __init__(self, room, bytes_per_image=100):
        self.room, self.bytes_per_image, self.tried = room, bytes_per_image, []

    def __call__(self, pixels):
        self.tried.append(len(pixels))
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return torch.zeros(len(pixels), self.bytes_per_image, dtype=torch.uint8)


@pytest.mark.parametrize(("room", "expected"), [(63, 63), (40, 40), (39, 32), (32, 32), (3, 3), (1, 1), (0, 0)])
def test_the_size_has_been_tried(monkeypatch, room, expected):
    machine = Machine(room)
    # What is free suggests 40 of 64 images; where the machine has room for 63, it says so too.
    free = 100 * (200 if room == 63 else 40 if room in (39, 40) else room)
    monkeypatch.setattr(memory, "USABLE", 1)
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    assert batch_size_that_fits(machine, torch.zeros(64, 1)) == expected
    assert expected == 0 or expected in machine.tried


def test_where_the_system_does_not_say_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    assert batch_size_that_fits(Machine(50), torch.zeros(64, 1)) == 32


def test_messages(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    for room, message in ((5, "4 would"), (0, "not even one image would")):
        machine, pixels = Machine(room), torch.zeros(8, 1)
        expected = f"a batch of 8 images to fit in the memory of cpu, which it does not; {message}"
        with pytest.raises(ValueError, match=expected), fitting(machine, pixels):
            machine(pixels)


def test_other_errors_stay_what_they_are():
    def broken(pixels):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"), fitting(broken, torch.zeros(2, 1)):
        broken(torch.zeros(2, 1))
    assert not is_out_of_memory(ValueError("not enough memory"))


def test_free_memory_of_this_machine():
    assert memory.free_memory(torch.device("cpu")) > 1e6


def full_beyond(monkeypatch, room):
    forward = VisualPerceiverForImageClassification.forward

    def limited(self, pixel_values, **arguments):
        if len(pixel_values) > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, pixel_values, **arguments)

    monkeypatch.setattr(VisualPerceiverForImageClassification, "forward", limited)
    monkeypatch.setattr(memory, "free_memory", lambda device: None)


def test_at_an_operating_point(model, images, monkeypatch):
    full_beyond(monkeypatch, 3)
    with pytest.raises(ValueError, match="which it does not; 2 would"):
        forward_at(model, images, OperatingPoint(4))
    assert model.config.dqs_threshold is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "--batch-size", "8"],
        ["predict", str(REPOSITORY / "checkpoints/visual_perceiver_nano_cifar10/examples"), "--batch-size", "8"],
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
    assert "images to fit in the memory of cpu, which it does not" in message
    assert " would." in message
