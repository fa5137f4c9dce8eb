"""Checkpoints of transformers' own Perceiver become checkpoints of this package, or are refused with nothing written."""

import re
import shutil

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import papers_form, unwrapped, with_biases, with_statistics
from transformers import PerceiverConfig
from typer.testing import CliRunner

from hf_visual_perceiver import IterativePerceiverForImageClassification
from hf_visual_perceiver.cli.main import app
from hf_visual_perceiver.inference.loading import load_model


def saved(folder, kind: str, **fields):
    """A small network of transformers with random weights, and its folder."""
    config = PerceiverConfig(
        num_latents=4,
        d_latents=16,
        d_model=16,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=fields.pop("num_cross_attention_heads", 1),
        id2label={0: "cat", 1: "dog", 2: "frog"},
        initializer_range=0.2,
        image_size=16,
        **fields,
    )
    model = with_biases(with_statistics(getattr(transformers, f"PerceiverFor{kind}")(config)))
    model.save_pretrained(folder)
    return model


def convert(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Fourier", "Learned", "ConvProcessing"])
def test_logits_are_those_of_transformers(kind, tmp_path):
    source, output = tmp_path / "theirs", tmp_path / "new" / "ours"
    theirs = saved(source, f"ImageClassification{kind}")
    done = convert(source, output)
    assert done.exit_code == 0, done.exception
    assert re.search(r"Largest difference of a logit from transformers': \d\.\de-0[5-9]", unwrapped(done.output))
    ours = load_model(str(output))
    side = ours.config.image_size
    images = torch.randn(2, 3, side, side)
    expected = theirs(inputs=images).logits
    torch.testing.assert_close(ours(images).logits, expected, rtol=1e-5, atol=1e-5)
    in_timm = timm.create_model(f"local-dir:{output}", pretrained=True).eval()
    torch.testing.assert_close(in_timm(images), expected, rtol=1e-5, atol=1e-5)
    assert ours.config.label_names == ["cat", "dog", "frog"]
    assert ours(images, num_active_queries=2).used.tolist() == [2, 2]


def other_family(folder):
    shutil.copytree(papers_form(), folder)


def other_task(folder):
    saved(folder, "MaskedLM", max_position_embeddings=8)


def other_weights(folder):
    """The config of one kind with the weights of another."""
    saved(folder, "ImageClassificationLearned")
    saved(folder.with_name("other"), "ImageClassificationFourier")
    (folder / "model.safetensors").write_bytes((folder.with_name("other") / "model.safetensors").read_bytes())


def other_sizes(folder):
    saved(folder, "ImageClassificationLearned")
    weights = load_file(folder / "model.safetensors")
    weights["perceiver.embeddings.latents"] = torch.zeros(5, 16)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def pickled(folder):
    torch.save(saved(folder, "ImageClassificationLearned").state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def other_settings(folder):
    saved(folder, "ImageClassificationLearned", num_cross_attention_heads=2)


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda folder: None, "Expected a folder or Hub id of a checkpoint, got"),
        (other_family, "Expected a model of type perceiver in .*, got 'visual_perceiver'"),
        (other_task, "Expected the weights of PerceiverForImageClassification.*, got PerceiverForMaskedLM"),
        (other_weights, "Expected .*perceiver.encoder.cross_attention.*, got|Expected the weights of its config.json"),
        (other_sizes, r"Expected perceiver.embeddings.latents of shape \(4, 16\) .*, got \(5, 16\)"),
        (pickled, "Cannot read the weights of .*model.safetensors"),
        (other_settings, "Expected a Perceiver with `num_cross_attention_heads` 1, got 2"),
    ],
)
def test_others_are_refused_with_nothing_written(create, message, tmp_path):
    source, output = tmp_path / "source", tmp_path / "new" / "output"
    create(source)
    refused = convert(source, output)
    assert isinstance(refused.exception, ValueError)
    assert re.search(message, str(refused.exception))
    assert not output.parent.exists()


def test_a_folder_in_use_stays_as_it_is(tmp_path):
    saved(tmp_path / "source", "ImageClassificationLearned")
    before = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "source", tmp_path / "file"):
        refused = convert(tmp_path / "source", output)
        assert isinstance(refused.exception, ValueError)
        assert "Expected a new or empty folder" in str(refused.exception)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    assert (tmp_path / "file").read_text() == "mine"


def test_other_logits_are_not_written(tmp_path, monkeypatch):
    saved(tmp_path / "source", "ImageClassificationLearned")
    converted = IterativePerceiverForImageClassification.from_transformers

    def wrong(model):
        network = converted(model)
        torch.nn.init.ones_(network.head.bias)
        return network

    monkeypatch.setattr(IterativePerceiverForImageClassification, "from_transformers", wrong)
    refused = convert(tmp_path / "source", tmp_path / "output")
    assert "Expected logits equal to those of" in str(refused.exception)
    assert not (tmp_path / "output").exists()
