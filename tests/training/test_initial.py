"""Runs with initial weights: the weights, errors, and that the folder is read once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support import papers_form, small_config
from transformers import ViTConfig, ViTForImageClassification

from hf_visual_perceiver.hub.card import training_lines
from hf_visual_perceiver.inference.loading import default_dataset, load_model
from hf_visual_perceiver.modeling import VisualPerceiverForImageClassification
from hf_visual_perceiver.training.initial import load_initial_weights
from hf_visual_perceiver.training.recipe import recipe_from_dict
from hf_visual_perceiver.training.train import train


STAGE = {
    "architecture": "visual_perceiver_nano_patch4_32",
    "config": {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_queries": 8},
    "validation": 1000,
    "steps": 4,
    "batch_size": 16,
    "log_every": 1,
    "tracker": None,
}


def stage(**changes):
    return recipe_from_dict({**STAGE, "dataset": default_dataset(), **changes})


def assert_equal_weights(a, b, fresh=()):
    other = b.state_dict()
    for name, value in a.state_dict().items():
        assert torch.equal(value, other[name]) != (name in fresh), name


class TestWeights:
    def test_all_of_them_with_the_same_labels(self, trained):
        model = VisualPerceiverForImageClassification(trained.config)
        assert load_initial_weights(model, papers_form()) == []
        assert_equal_weights(model, trained)

    @pytest.mark.parametrize("labels", [{i: f"thing {i}" for i in range(10)}, {0: "cat", 1: "dog"}])
    def test_a_fresh_head_for_other_labels(self, trained, labels):
        config = type(trained.config).from_pretrained(papers_form(), id2label=labels)
        model = VisualPerceiverForImageClassification(config)
        model.head.bias.data.normal_()
        before = model.head.weight.clone()
        assert load_initial_weights(model, papers_form()) == ["head.weight", "head.bias"]
        assert torch.equal(model.head.weight, before)
        assert_equal_weights(model.visual_perceiver, trained.visual_perceiver)

    def test_mistakes_are_named_and_change_nothing(self, tmp_path):
        model = VisualPerceiverForImageClassification(small_config())
        before = {name: value.clone() for name, value in model.state_dict().items()}
        ViTForImageClassification(
            ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        ).save_pretrained(tmp_path / "vit")
        (tmp_path / "damaged").mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copy(f"{papers_form()}/{file}", tmp_path / "damaged")
        (tmp_path / "damaged" / "model.safetensors").write_bytes(b"no weights")
        for source, message in (
            (tmp_path / "absent", "`initial_model` to be a folder or Hub id of .*, got '.*absent'"),
            (tmp_path / "vit", "got '.*vit': it is a model of type vit"),
            (tmp_path / "damaged", "got '.*damaged': "),
            (papers_form(), r"sizes of the recipe's `architecture` and `config`, got .* of shape \[.*\] for "),
        ):
            with pytest.raises(ValueError, match=message):
                load_initial_weights(model, str(source))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_second_stage(tmp_path):
    """A second stage starts from the first stage's weights, resumes without the folder, and is described on the card."""
    first = train(stage(), tmp_path / "first", recipe_name="first.yaml")
    recipe = stage(initial_model=str(first), learning_rate=1e-12, min_learning_rate=0, warmup_learning_rate=0, seed=1)
    assert train(recipe, tmp_path / "second", max_minutes=1e-5) is None
    shutil.move(first, tmp_path / "elsewhere")
    second = train(recipe, tmp_path / "second", resume=True)
    before, after = load_model(str(tmp_path / "elsewhere")), load_model(str(second))
    for name, value in before.state_dict().items():  # a learning rate of next to nothing
        torch.testing.assert_close(after.state_dict()[name], value, rtol=0, atol=1e-9, msg=name)
    facts = json.loads((second / "training.json").read_text())
    assert facts["earlier_training"]["recipe_name"] == "first.yaml"
    line = next(line for line in training_lines(facts) if line.startswith("Initial weights"))
    assert "first, trained by first.yaml: 4 steps of 16 images, schedule uniform, seed 0" in line


def test_a_hub_id_has_no_earlier_training():
    facts = json.loads(Path(papers_form(), "training.json").read_text())
    facts["recipe"]["initial_model"] = "somebody/network"
    facts.pop("earlier_training", None)
    assert "Initial weights: network." in training_lines(facts)


def test_nothing_is_written_if_it_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="`initial_model` to have the sizes"):
        train(stage(initial_model=papers_form()), tmp_path / "run")
    assert not (tmp_path / "run").exists()
