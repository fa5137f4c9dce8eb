"""Training timm networks as teachers."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torchvision.transforms.functional import to_pil_image
from transformers import AutoImageProcessor, AutoModelForImageClassification, TimmWrapperForImageClassification

from hf_visual_perceiver.data.images import load_images, normalise
from hf_visual_perceiver.inference.loading import default_dataset
from hf_visual_perceiver.modeling import Pass
from hf_visual_perceiver.training.recipe import load_recipe, recipe_from_dict
from hf_visual_perceiver.training.teacher import load_teacher
from hf_visual_perceiver.training.timm_network import TimmNetwork
from hf_visual_perceiver.training.train import train


TINY = {"output_stride": 8, "channels": [8, 8, 8, 8]}
RECIPE = {
    "architecture": "timm/resnet18",
    "config": TINY,
    "budgets": {"schedule": "fixed", "K": 1},
    "dataset": default_dataset(),
    "validation": 1000,
    "steps": 4,
    "batch_size": 16,
    "optimizer": "sgd",
    "learning_rate": 1e-1,
    "ema_decay": 0.5,
    "save_every": 2,
    "log_every": 1,
    "tracker": None,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(recipe_from_dict(RECIPE), tmp_path_factory.mktemp("runs") / "whole")


def test_transformers_loads_what_was_trained(trained):
    model = AutoModelForImageClassification.from_pretrained(trained)
    assert type(model) is TimmWrapperForImageClassification
    assert json.loads((trained / "config.json").read_text())["architectures"] == ["TimmWrapperForImageClassification"]
    assert model.config.id2label[3] == "cat"
    assert model.config.pretrained_cfg["input_size"] == [3, 32, 32]
    facts = json.loads((trained / "training.json").read_text())
    assert facts["macs_per_image"] == TimmNetwork.create("resnet18", TINY, ["a", "b"]).count_macs() + 8 * 8
    # The accuracy is that of the published weights, on images as transformers' processor of the folder makes them.
    data = load_images(default_dataset())
    choosing = data.images[-1000:]
    cfg = model.config.pretrained_cfg
    pixels = normalise(choosing, cfg["mean"], cfg["std"])
    processor = AutoImageProcessor.from_pretrained(trained)
    first = processor(to_pil_image(choosing[0]), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(first, pixels[:1], rtol=0, atol=1e-5)
    with torch.no_grad():
        right = (model.eval()(pixels).logits.argmax(-1).numpy() == data.labels[-1000:]).mean()
    assert facts["validation_accuracy"] == {"1": pytest.approx(right)}


def test_a_run_in_pieces_is_one_run(trained, tmp_path):
    recipe = recipe_from_dict(RECIPE)
    assert train(recipe, tmp_path / "run", max_minutes=1e-6) is None
    folder = train(recipe, tmp_path / "run", resume=True)
    whole, pieces = (load_file(model / "model.safetensors") for model in (trained, folder))
    assert any("running_var" in name for name in whole)
    for (
        name,
        value,
    ) in whole.items():  # not bit for bit: convolutions differ in the last bit with where weights lie in memory
        torch.testing.assert_close(pieces[name], value, rtol=0, atol=1e-5)


def test_it_teaches(trained, tmp_path):
    recipe = recipe_from_dict(
        {
            **RECIPE,
            "architecture": "visual_perceiver_nano_patch4_32",
            "config": {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_queries": 8},
            "budgets": {"schedule": "sandwich"},
            "teacher": {"model": str(trained), "distillation": "hard"},
            "steps": 1,
        }
    )
    assert train(recipe, tmp_path / "run") is not None
    labels = load_images(default_dataset()).label_names
    # Of images that the student sees otherwise normalised.
    teacher = load_teacher(str(trained), labels, (32, 32), {"mean": (0.0,) * 3, "std": (1.0,) * 3})
    plain = AutoModelForImageClassification.from_pretrained(trained).eval()
    cfg, images = plain.config.pretrained_cfg, torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), plain((images - mean) / std).logits, rtol=0, atol=1e-4)


def test_subsets_are_images(trained):
    network = TimmNetwork.create("resnet18", TINY, ["a", "b"]).eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        (odd,) = network.forward_budgets(x, [Pass(images=slice(1, None, 2))])
        torch.testing.assert_close(odd, network(x[1::2]).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "timm/resnet1"}, "`architecture` to be timm/ and the name of one of timm's models"),
        ({"budgets": {"schedule": "uniform"}}, "`budgets` to be {schedule: fixed, K: 1} for a timm network"),
        ({"budgets": {"schedule": "fixed", "K": 2}}, "`budgets` to be {schedule: fixed, K: 1}"),
        ({"evaluate_budgets": [1, 8]}, r"`evaluate_budgets` to be null or \[1\] for a timm network, got \[1, 8\]"),
        ({"attention": "eager"}, "`attention` to be null for a timm network, got 'eager'"),
        ({"initial_model": "somewhere"}, "`initial_model` to be null for a timm network"),
        ({"config": {"image_size": 0}}, "`config.image_size` to be an integer of at least 1, got 0"),
    ],
    ids=str,
)
def test_a_recipe_that_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe_from_dict({**RECIPE, **changes})


@pytest.mark.parametrize("arguments", [{"colour": "red"}, {"output_stride": 7}], ids=str)
def test_arguments_that_timm_refuses(arguments, tmp_path):
    with pytest.raises(ValueError, match="with its arguments in `config`, got timm/resnet18 with"):
        train(recipe_from_dict({**RECIPE, "config": arguments}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_recipe_of_the_repository():
    recipe = load_recipe("training/recipes/cifar10_resnet_teacher.yaml")
    network = TimmNetwork.create(recipe.timm_name, recipe.config, ["a"] * 10)
    assert network.forward_budgets(torch.zeros(2, 3, 32, 32), [Pass()])[0].shape == (2, 10)
