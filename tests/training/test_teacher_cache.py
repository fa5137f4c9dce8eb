"""The teacher cache: it holds the teacher's logits, a run uses them, and a cache that does not match is refused."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from hf_visual_perceiver.data.images import load_images
from hf_visual_perceiver.inference.loading import default_dataset
from hf_visual_perceiver.training import run as run_module
from hf_visual_perceiver.training.augmentation import BatchAugmentation
from hf_visual_perceiver.training.recipe import Augmentation, recipe_from_dict
from hf_visual_perceiver.training.teacher import load_teacher
from hf_visual_perceiver.training.teacher_cache import cache_facts, create_cache, open_cache, view_augmentation
from hf_visual_perceiver.training.train import train
from hf_visual_perceiver.utils import console


AUGMENTATION = {"random_crop_padding": 2, "alternating_flip": True}
STUDENT = {
    "architecture": "visual_perceiver_nano_conv_32",
    "config": {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_queries": 8,
        "stem_widths": [[4], [6], [8]],
        "trunk_attention": "block_causal",
    },
    "budgets": {"schedule": "nested"},
    "dataset": default_dataset(),
    "validation": 1800,
    "steps": 14,
    "batch_size": 32,
    "ema_decay": 0.5,
    "save_every": 7,
    "log_every": 1,
    "augmentation": AUGMENTATION,
    "tracker": None,
}
TEACHER = {
    **STUDENT,
    "architecture": "timm/conv_stem_classifier_32",
    "config": {"widths": [[4], [6], [8]]},
    "budgets": {"schedule": "fixed", "K": 1},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return str(train(recipe_from_dict(TEACHER), tmp_path_factory.mktemp("teacher") / "run"))


def student(teacher, cache, **changes):
    loss = {"model": teacher, "cache": str(cache), "views": 3, "weight": 0.8}
    return recipe_from_dict({**STUDENT, "teacher": loss, **changes})


class TestAnswers:
    @pytest.fixture
    def made(self, teacher, tmp_path):
        data, _ = load_images(default_dataset()).split_off(1800)
        preprocessing = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}
        model = load_teacher(teacher, data.label_names, (32, 32), preprocessing)
        augmentation = Augmentation(**AUGMENTATION)
        facts = cache_facts(model, augmentation, preprocessing, data, views=3)
        augment = view_augmentation(augmentation, 10, preprocessing, len(data))
        create_cache(tmp_path / "cache", facts, augment, model, data, Accelerator(cpu=True), batch_size=77)
        return model, data, facts, augment, tmp_path / "cache"

    def test_are_the_teachers_on_the_very_view(self, made):
        model, data, facts, augment, folder = made
        cache = open_cache(folder, facts, augment)
        assert isinstance(cache.logits, np.memmap)
        chosen = np.array([7, 3, 150])
        images = torch.from_numpy(data.images[chosen]).permute(0, 3, 1, 2)
        seen = []
        for epoch in range(4):
            x, targets, taught = cache.batch(images, torch.from_numpy(data.labels[chosen]), chosen, epoch)
            torch.testing.assert_close(taught, model(x), rtol=2e-3, atol=2e-3)  # half precision
            assert targets.argmax(1).tolist() == data.labels[chosen].tolist()
            seen.append(x)
        assert torch.equal(seen[0], seen[3])
        assert not torch.equal(seen[0], seen[1])

    def test_flips_alternate_between_views(self, made):
        cache = open_cache(made[4], made[2], made[3])
        flips = [cache.draws(epoch).flip.copy() for epoch in range(3)]
        assert (flips[0] != flips[1]).all()
        assert (flips[0] == flips[2]).all()
        assert 50 < flips[0].sum() < 150

    def test_fewer_views_than_there_are(self, made):
        _, _, facts, augment, folder = made
        assert open_cache(folder, {**facts, "views": 2}, augment).logits.shape == (2, 200, 10)
        with pytest.raises(ValueError, match="at least 4 views"):
            open_cache(folder, {**facts, "views": 4}, augment)

    @pytest.mark.parametrize("key", ["teacher_hash", "images_hash", "augmentation", "preprocessing", "images"])
    def test_made_with_something_else(self, made, key):
        _, _, facts, augment, folder = made
        with pytest.raises(ValueError, match=f"`{key}`"):
            open_cache(folder, {**facts, key: "another"}, augment)

    def test_damaged(self, made):
        _, _, facts, augment, folder = made
        np.save(folder / "logits.npy", np.zeros((3, 5, 10), np.float16))
        with pytest.raises(ValueError, match=r"logits.npy of shape \(3, 200, 10\)"):
            open_cache(folder, facts, augment)
        for text in ("{", "[]", "[1]"):
            (folder / "cache.json").write_text(text)
            with pytest.raises(ValueError, match=r"cached answers|this run's|at least 3 views"):
                open_cache(folder, facts, augment)


class TestRuns:
    def test_make_the_cache_once_and_do_not_ask_the_teacher_again(self, teacher, tmp_path, monkeypatch):
        cache = tmp_path / "answers"
        first = train(student(teacher, cache), tmp_path / "a")
        facts = json.loads((cache / "cache.json").read_text())
        assert (facts["views"], facts["images"]) == (3, 200)
        written = (cache / "logits.npy").stat().st_mtime_ns
        asked = []
        monkeypatch.setattr(run_module.FrozenTeacher, "forward", lambda self, x: asked.append(len(x)))
        again = train(student(teacher, cache), tmp_path / "b")
        assert (cache / "logits.npy").stat().st_mtime_ns == written
        assert asked == []
        a, b = (load_file(folder / "model.safetensors") for folder in (first, again))
        for name, value in a.items():
            torch.testing.assert_close(b[name], value, rtol=0, atol=1e-5)

    def test_learn_from_the_answers(self, teacher, tmp_path):
        """With weight 1 the labels are ignored, so wrong labels change nothing."""
        losses = []
        for weight in (0.0, 1.0):
            recipe = student(teacher, tmp_path / "answers")
            loss = {"model": teacher, "cache": str(tmp_path / "answers"), "views": 3, "weight": weight}
            train(recipe_from_dict({**recipe.to_dict(), "teacher": loss}), tmp_path / str(weight))
            entries = [json.loads(line) for line in (tmp_path / str(weight) / "log.jsonl").read_text().splitlines()]
            losses.append(entries[0]["loss"])
        assert losses[0] > 1.5  # cross-entropy with labels: ln 10 at first
        assert losses[1] < 0.5  # divergence from a teacher that hardly knows more

    def test_in_pieces_are_one_run(self, teacher, tmp_path):
        recipe = student(teacher, tmp_path / "answers")
        whole = train(recipe, tmp_path / "whole")
        assert train(recipe, tmp_path / "pieces", max_minutes=1e-6) is None
        pieces = train(recipe, tmp_path / "pieces", resume=True)
        a, b = (load_file(folder / "model.safetensors") for folder in (whole, pieces))
        assert any("running_var" in name for name in a)
        for name, value in a.items():
            torch.testing.assert_close(b[name], value, rtol=0, atol=1e-5)

    def test_its_computation_says_how_far_it_is(self, teacher, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(console, "SECONDS", 1e-9)
        train(student(teacher, tmp_path / "answers", steps=1), tmp_path / "run")
        assert "the teacher's answers, batches:" in capsys.readouterr().err

    def test_another_recipe_is_refused_before_anything_is_written(self, teacher, tmp_path):
        train(student(teacher, tmp_path / "answers", steps=1), tmp_path / "a")
        other = student(teacher, tmp_path / "answers", augmentation={**AUGMENTATION, "random_crop_padding": 4})
        with pytest.raises(ValueError, match="this run's `augmentation`"):
            train(other, tmp_path / "b")
        shorter = student(teacher, tmp_path / "answers", validation=1900)
        with pytest.raises(ValueError, match="this run's `images`"):
            train(shorter, tmp_path / "b")
        assert not (tmp_path / "b").exists()

    def test_one_that_cannot_be_written_leaves_no_run_behind(self, teacher, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="file"):
            train(student(teacher, tmp_path / "file" / "answers"), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"augmentation": {**AUGMENTATION, "mixup": 0.8}}, "`augmentation.mixup` to be 0"),
            ({"augmentation": {"random_crop_padding": None}}, "with `teacher.cache`"),
            ({"augmentation": {**AUGMENTATION, "repeats": 2}}, "with `teacher.cache`"),
            ({"augmentation": {"alternating_flip": True}}, "for `alternating_flip`"),
        ],
        ids=str,
    )
    def test_a_recipe_that_does_not_fit(self, changes, message):
        with pytest.raises(ValueError, match=message):
            student("somewhere", "cache", **changes)


class TestStem:
    def test_a_run_begins_with_a_classifiers_stem(self, teacher, tmp_path):
        folder = train(
            recipe_from_dict(
                {
                    **STUDENT,
                    "initial_stem": teacher,
                    "steps": 1,
                    "learning_rate": 1e-9,
                    "min_learning_rate": 0.0,
                    "warmup_learning_rate": 0.0,
                }
            ),
            tmp_path / "run",
        )
        stem = load_file(f"{teacher}/model.safetensors")
        ours = load_file(folder / "model.safetensors")
        prefix = "visual_perceiver.embeddings.patch_embeddings.stem."
        for name, value in stem.items():
            if ".stem." in name and name.endswith("conv.weight"):
                torch.testing.assert_close(ours[prefix + name.split(".stem.")[1]], value, rtol=0, atol=1e-4)

    def test_another_stem_or_none_is_refused(self, teacher, tmp_path):
        wider = {**STUDENT["config"], "stem_widths": [[4], [6], [9]]}
        with pytest.raises(ValueError, match=r"stages.2.0.conv.weight of shape \[8, 6, 3, 3\] for \[9, 6, 3, 3\]"):
            train(recipe_from_dict({**STUDENT, "config": wider, "initial_stem": teacher}), tmp_path / "run")
        for field, value, message in (
            ("stem_downsample", "stride", "with downsampling stride, .* got pool"),
            ("hidden_act", "relu", "with activation ReLU, .* got GELU"),
        ):
            other = {**STUDENT["config"], field: value}
            with pytest.raises(ValueError, match=message):
                train(recipe_from_dict({**STUDENT, "config": other, "initial_stem": teacher}), tmp_path / "run")
        with pytest.raises(ValueError, match="`initial_stem` to be a folder or Hub id"):
            train(recipe_from_dict({**STUDENT, "initial_stem": str(tmp_path)}), tmp_path / "run")
        patches = {"architecture": "visual_perceiver_nano_patch4_32", "config": {}, "budgets": {"schedule": "uniform"}}
        with pytest.raises(ValueError, match=r"`config\.stem` to be conv"):
            recipe_from_dict({**STUDENT, **patches, "initial_stem": teacher})
        with pytest.raises(ValueError, match="conv with `stem_loss`, got 'patch'"):
            recipe_from_dict({**STUDENT, **patches, "stem_loss": 0.5})
        assert not (tmp_path / "run").exists()


def test_flips_that_alternate_refuse_images_of_another_size(tmp_path):
    larger = recipe_from_dict({**STUDENT, "config": {**STUDENT["config"], "image_size": 40}})
    with pytest.raises(ValueError, match=r"size 40x40 with `augmentation\.alternating_flip`"):
        train(larger, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_flips_alternate_from_epoch_to_epoch():
    images = torch.arange(3 * 32 * 32).view(1, 3, 32, 32).expand(40, -1, -1, -1).to(torch.uint8).contiguous()
    augmentation = Augmentation(random_crop_padding=0, alternating_flip=True)
    augment = BatchAugmentation(augmentation, 10, (0.5,) * 3, (0.2,) * 3, seed=0, num_images=50)
    labels, positions, indices = torch.zeros(40, dtype=torch.long), np.arange(40), np.arange(5, 45)
    epochs = [augment(images, labels, step, positions, 40, indices, step)[0] for step in range(3)]
    assert torch.equal(epochs[0], epochs[2])
    assert torch.equal(epochs[0], epochs[1].flip(-1))
    flipped = (epochs[0] != epochs[0][:1]).flatten(1).any(1).sum()
    assert 5 < flipped < 35
    with pytest.raises(ValueError, match="alternating_flip"):
        augment(images, labels, 0, positions, 40)
