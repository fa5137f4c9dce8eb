"""Fine-tuning with transformers' Trainer and PEFT, as in docs/finetuning.md."""

import copy
import re

import datasets
import numpy as np
import peft
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from support import REPOSITORY, aligned, papers_form, run
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments, pipeline


SHAPES = ("disc", "ring", "square")
TRUNK = r".*\.layers\.\d+\..*\.(qkv|proj|fc1|fc2)"
POINTS = [{}, {"num_active_queries": 5}, {"dqs_threshold": 0.8}]


def draw_shapes(folder):
    """Write an imagefolder of three classes: shapes of random colour on a noisy background."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for shape in SHAPES:
            (folder / split / shape).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 90, (36, 40, 3), dtype=np.uint8))
                colour, (x, y) = tuple(rng.integers(140, 256, 3).tolist()), rng.integers(2, 12, 2).tolist()
                pen, box = ImageDraw.Draw(image), (x, y, x + 22, y + 22)
                if shape == "square":
                    pen.rectangle(box, fill=colour)
                else:
                    pen.ellipse(box, fill=colour if shape == "disc" else None, outline=colour, width=4)
                image.save(folder / split / shape / f"{i}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `pictures`."""
    folder = tmp_path_factory.mktemp("finetuning")
    draw_shapes(folder / "pictures")
    return folder


@pytest.fixture(scope="module")
def story(place):
    """The variables after each code block of the documentation."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "finetuning.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    names, after = {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        torch.manual_seed(0)
        for block in blocks:
            exec(compile(block, "docs/finetuning.md", "exec"), names)
            after.append(dict(names))
    return after


@pytest.fixture(scope="module")
def batch(story):
    """A batch of held-out images with labels."""
    rows = story[0]["data"]["test"][:]
    return {"pixel_values": rows["pixel_values"], "labels": torch.tensor(rows["labels"])}


def test_eleven_lines_of_the_documentation_suffice():
    first = re.search(r"```python\n(.*?)```", (REPOSITORY / "docs" / "finetuning.md").read_text(), flags=re.DOTALL)[1]
    after_the_imports = first.partition("import hf_visual_perceiver\n")[2]
    statements = [line for line in after_the_imports.splitlines() if line and not line.startswith((" ", "def"))]
    assert len(statements) == 11  # and a function of two


@torch.no_grad()
def test_it_learns_and_the_folder_is_what_was_learnt(story, place, batch):
    folder = place / "outputs" / "pictures" / "model"
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert model.config.id2label == dict(enumerate(SHAPES))
    assert not (folder / "training_args.bin").exists()
    logits = model(batch["pixel_values"]).logits
    assert (logits.argmax(-1) == batch["labels"]).float().mean() > 0.6  # a third by chance
    in_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(in_timm(batch["pixel_values"]), logits, rtol=0, atol=1e-5)
    picture = str(place / "pictures" / "test" / "ring" / "0.png")
    for task in ("image-classification", "adaptive-image-classification"):
        answers = pipeline(task, model=str(folder))(picture)
        assert {answer["label"] for answer in answers} == set(SHAPES)
    result = run(
        "visual-perceiver", "evaluate", "--model", folder, "--dataset", place / "pictures", "--budget", "t=0.8"
    )
    assert result.returncode == 0, result.stderr
    assert "t=0.8" in result.stdout


@torch.no_grad()
def test_saved_and_loaded_the_logits_are_the_same(story, tmp_path, batch):
    model = copy.deepcopy(story[1]["model"]).eval()
    model.save_pretrained(tmp_path)
    again = copy.deepcopy(AutoModelForImageClassification.from_pretrained(tmp_path)).eval()
    for point in POINTS:
        assert torch.equal(again(batch["pixel_values"], **point).logits, model(batch["pixel_values"], **point).logits)


def fresh(**changes):
    """The checkpoint with a new head for the shapes, always with the same weights."""
    torch.manual_seed(1)
    return AutoModelForImageClassification.from_pretrained(
        papers_form(), id2label=dict(enumerate(SHAPES)), ignore_mismatched_sizes=True, **changes
    )


def train(model, story, folder, kind=Trainer, **settings):
    """Train on the shapes; returns the trainer."""
    arguments = TrainingArguments(
        str(folder), **{"use_cpu": True, "remove_unused_columns": False, "disable_tqdm": True, "seed": 3, **settings}
    )
    data = story[0]["data"]
    trainer = kind(model, arguments, train_dataset=data["train"], eval_dataset=data["test"])
    trainer.train()
    return trainer


def test_the_loss_falls(story, tmp_path):
    trainer = train(fresh(), story, tmp_path, max_steps=12, logging_steps=1, learning_rate=5e-4)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_accumulated_batches_are_one_batch(story, tmp_path):
    """The Trainer divides by the number of batches only if the model does not."""
    sgd = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    whole, parts, before = fresh(), fresh(), fresh()
    train(whole, story, tmp_path, per_device_train_batch_size=8, **sgd)
    train(parts, story, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **sgd)
    assert not torch.equal(whole.head.weight, before.head.weight)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(story, tmp_path, reentrant):
    plain, checkpointed = fresh(), fresh()
    train(plain, story, tmp_path, max_steps=2)
    more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    train(checkpointed, story, tmp_path, max_steps=2, **more)
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_trainers_other_losses(story, tmp_path):
    trainer = train(fresh(), story, tmp_path, max_steps=1, label_smoothing_factor=0.1)
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_predictions_are_the_logits(story, tmp_path):
    data = story[0]["data"]["test"]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, remove_unused_columns=False, disable_tqdm=True)
    trainer = Trainer(fresh(dqs_threshold=0.8), arguments)
    prediction = trainer.predict(data)
    assert prediction.predictions.shape == (24, 3)
    logits, active = trainer.predict(data, ignore_keys=[]).predictions
    np.testing.assert_array_equal(logits, prediction.predictions)
    assert active.shape == (24, 64)
    assert 1 <= active.sum(1).min() < 64


def test_query_masking_draws_in_training_alone(story, tmp_path):
    drawn = {True: [], False: []}
    model = fresh()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: drawn[module.training].append(kwargs.get("num_active_queries")), with_kwargs=True
    )
    train(model, story, tmp_path, kind=story[1]["QueryMaskingTrainer"], max_steps=8).evaluate()
    assert len(drawn[True]) == 8
    assert all(1 <= K <= 64 for K in drawn[True])
    assert len(set(drawn[True])) > 4
    assert set(drawn[False]) == {None}


def test_compiled_with_numbers_of_queries_at_random(story, tmp_path):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer = train(fresh(), story, tmp_path, story[1]["QueryMaskingTrainer"], max_steps=4, logging_steps=1, **compiled)
    plain = train(fresh(), story, tmp_path, story[1]["QueryMaskingTrainer"], max_steps=4, logging_steps=1)
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (trainer, plain)]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_the_loss_comes_first_without_a_dict(batch):
    model = fresh().eval()
    loss, logits, active = model(**batch, return_dict=False)
    expected = model(**batch)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)
    assert torch.equal(active, expected.active_queries)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, batch["labels"]))


class TestLora:
    @pytest.fixture
    def adapted(self):
        """A model with nonzero adapters; new adapters have no effect."""
        config = peft.LoraConfig(r=4, target_modules=TRUNK, modules_to_save=["head"], init_lora_weights=False)
        return peft.get_peft_model(fresh(), config).eval()

    def test_the_pattern_is_the_documentations(self):
        assert f'trunk = r"{TRUNK}"' in (REPOSITORY / "docs" / "finetuning.md").read_text()

    def test_it_attaches_to_every_linear_of_the_trunk(self, adapted):
        found = {name for name, module in adapted.base_model.model.named_modules() if hasattr(module, "lora_A")}
        linears = ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
        assert found == {f"visual_perceiver.layers.{i}.{name}" for i in range(6) for name in linears}

    def test_only_adapters_and_head_get_gradients(self, adapted, batch):
        adapted.train()(**batch, num_active_queries=9).loss.backward()
        touched = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
        assert touched == {name for name, p in adapted.named_parameters() if p.requires_grad}
        assert all("lora_" in name or "head.modules_to_save" in name for name in touched)
        assert len(touched) == 2 * 24 + 2

    def test_checkpointing_may_be_enabled_before(self, batch):
        plain = fresh()
        plain.gradient_checkpointing_enable()
        config = peft.LoraConfig(r=4, target_modules=TRUNK, init_lora_weights=False)
        adapted = peft.get_peft_model(plain, config).train()  # makes the input embeddings' output need a gradient
        adapted(**batch, num_active_queries=4).loss.backward()
        assert all(p.grad.any() for name, p in adapted.named_parameters() if "lora_" in name)

    @torch.no_grad()
    def test_budgets_work_and_merging_changes_no_logits(self, adapted, batch):
        x = batch["pixel_values"]
        before = [adapted(pixel_values=x, **point) for point in POINTS]
        assert set(before[1].active_queries.sum(1).tolist()) == {5}
        assert before[2].active_queries.sum(1).min() < 64
        plain = fresh().eval()(x)
        assert (plain.logits - before[0].logits).abs().max() > 0.01
        merged = adapted.merge_and_unload()
        assert type(merged) is type(fresh())
        for point, expected in zip(POINTS, before, strict=True):
            torch.testing.assert_close(merged(x, **point).logits, expected.logits, rtol=0, atol=1e-5)
        optimised = merged.optimize_for_inference()(x)
        torch.testing.assert_close(optimised.logits, before[0].logits, rtol=0, atol=1e-4)

    def test_the_optimised_form_would_lose_the_adapter(self, adapted):
        with pytest.raises(ValueError, match=r"Expected plain linears, got peft\..* at layers\.0\.attention\.qkv"):
            adapted.get_base_model().optimize_for_inference()

    @torch.no_grad()
    def test_the_adapter_alone_is_saved(self, adapted, batch, tmp_path):
        adapted.save_pretrained(tmp_path)
        assert not list(tmp_path.glob("*.bin"))
        again = peft.PeftModel.from_pretrained(fresh(), tmp_path).eval()
        x = batch["pixel_values"]
        assert torch.equal(again(pixel_values=x).logits, adapted(pixel_values=x).logits)

    @torch.no_grad()
    def test_the_documentations_run(self, story, place, batch):
        merged = AutoModelForImageClassification.from_pretrained(place / "outputs" / "pictures" / "merged").eval()
        x, in_memory = batch["pixel_values"], story[2]["merged"].eval()
        torch.testing.assert_close(aligned(merged)(x).logits, aligned(in_memory)(x).logits, rtol=0, atol=1e-6)
        assert (place / "outputs" / "pictures" / "lora" / "adapter_model.safetensors").is_file()


def test_features_of_the_documentation(story):
    output = story[3]["output"]
    assert output.pooler_output.shape == (4, 128)
    assert output.last_hidden_state.shape == (4, 16, 128)
    assert output.active_queries.shape == (4, 32)


def test_the_data_has_other_classes(place):
    names = datasets.load_dataset("imagefolder", data_dir=str(place / "pictures"))["train"].features["label"].names
    config = AutoModelForImageClassification.from_pretrained(papers_form()).config
    assert set(names).isdisjoint(config.label2id)
    assert AutoImageProcessor.from_pretrained(papers_form()).size["height"] == 32
