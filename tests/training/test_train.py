"""Training runs: they learn, resumed runs are identical, and processes share a batch."""

import json
import os
import signal
import subprocess
import sys
import time

import datasets
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from support import PATIENCE, REPOSITORY, papers_form, run

from hf_visual_perceiver.data.images import load_images, normalise
from hf_visual_perceiver.hub.card import training_lines
from hf_visual_perceiver.inference.loading import default_dataset, load_model
from hf_visual_perceiver.training import checkpointing, objective, state
from hf_visual_perceiver.training import run as run_module
from hf_visual_perceiver.training import train as train_module
from hf_visual_perceiver.training.checkpointing import RunFolder
from hf_visual_perceiver.training.recipe import recipe_from_dict
from hf_visual_perceiver.training.train import train


SMALL = {
    "architecture": "visual_perceiver_nano_patch4_32",
    "config": {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_queries": 8},
    "validation": 1000,
    "steps": 6,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "ema_decay": 0.9,
    "clip_gradient_norm": 1.0,
    "evaluate_budgets": [1, 8],
    "evaluate_every": 4,
    "save_every": 2,
    "log_every": 1,
    "tracker": None,
}


def small_recipe(**changes):
    return recipe_from_dict({**SMALL, "dataset": default_dataset(), **changes})


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "dataset": default_dataset()}))
    return path


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def losses_or_none(folder):
    return losses(folder) if (folder / "log.jsonl").exists() else None


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def assert_same_run(a, b):
    assert losses(a) == losses(b)
    for name, value in weights(a).items():
        assert torch.equal(value, weights(b)[name]), name


DEIT = {
    "mixup": 0.8,
    "cutmix": 1.0,
    "random_crop_padding": 4,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.25,
}


def test_a_run_from_start_to_end(tmp_path):
    folder = train(small_recipe(augmentation=DEIT, tracker="tensorboard"), tmp_path / "run", recipe_name="small.yaml")
    model = load_model(str(folder))
    assert model.config.label_names[3] == "cat"
    facts = json.loads((folder / "training.json").read_text())
    assert facts["processes"] == 1
    assert facts["training_images"] == 1000
    assert set(facts["validation_accuracy"]) == {"1", "8"}
    assert facts["training_hours"] > 0
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]
    # The averaged weights are the ones published.
    raw = load_file(tmp_path / "run" / "checkpoints" / "step_6" / "state.safetensors")
    assert not torch.equal(raw["model.network.head.weight"], weights(tmp_path / "run")["head.weight"])
    assert torch.equal(raw["average.head.weight"], weights(tmp_path / "run")["head.weight"])
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000


def test_learns_64_images_by_heart(tmp_path):
    from datasets import load_dataset

    images = load_dataset("parquet", data_files=f"{default_dataset()}/train.parquet", split="train").select(range(64))
    (tmp_path / "data").mkdir()
    images.to_parquet(str(tmp_path / "data" / "train.parquet"))
    recipe = small_recipe(
        dataset=str(tmp_path / "data"),
        validation=0,
        config={"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "initializer_range": 0.1},
        budgets={"schedule": "fixed", "K": 16},
        steps=120,
        batch_size=64,
        learning_rate=3e-3,
        warmup_steps=10,
        ema_decay=None,
        save_every=200,
        weight_decay=0.0,
        augmentation={"random_crop_padding": 0, "horizontal_flip": 0},
    )
    model = load_model(str(train(recipe, tmp_path / "run")))
    data = load_images(str(tmp_path / "data"))
    cfg = model.config.timm_pretrained_cfg
    with torch.no_grad():
        logits = model(normalise(data.images, cfg["mean"], cfg["std"]), num_active_queries=16).logits
    assert (logits.argmax(-1).numpy() == data.labels).mean() >= 0.98


# A stem whose levels have classifiers of their own while they are trained.
LEVELS = {
    "config": {
        **SMALL["config"],
        "stem": "conv",
        "stem_widths": [[6, 8], [8], [12]],
        "level_starts": [1, 5],
        "level_widths": [4, 2],
        "trunk_attention": "block_causal",
    },
    "budgets": {"schedule": "nested"},
    "stem_loss": 0.5,
}


class TestResuming:
    def test_classifiers_of_a_stem_go_on(self, tmp_path, monkeypatch):
        recipe = small_recipe(**LEVELS)
        train(recipe, tmp_path / "whole")
        original, steps = run_module.forward_backward, []

        def interrupt(*args):
            steps.append(args)
            if len(steps) == 4:
                raise InterruptedError
            return original(*args)

        monkeypatch.setattr(run_module, "forward_backward", interrupt)
        with pytest.raises(InterruptedError):
            train(recipe, tmp_path / "pieces")
        monkeypatch.setattr(run_module, "forward_backward", original)
        train(recipe, tmp_path / "pieces", resume=True)
        assert_same_run(tmp_path / "whole", tmp_path / "pieces")
        before, after = (
            load_file(tmp_path / run / "checkpoints" / f"step_{step}" / "state.safetensors")
            for run, step in (("pieces", 4), ("whole", 6))
        )
        heads = [name for name in after if ".heads." in name and name.startswith("model")]
        assert heads
        assert not any(torch.equal(before[name], after[name]) for name in heads)

    def test_equals_no_interruption_bit_for_bit(self, tmp_path, monkeypatch):
        recipe = small_recipe(augmentation=DEIT)
        train(recipe, tmp_path / "whole")

        class StoppedError(Exception):
            pass

        # Stops in the middle of step 5, and once more in the middle of writing the checkpoint of step 6.
        original = run_module.forward_backward
        calls = []

        def interrupt(*args):
            calls.append(args)
            if len(calls) == 5:
                raise StoppedError
            return original(*args)

        monkeypatch.setattr(run_module, "forward_backward", interrupt)
        with pytest.raises(StoppedError):
            train(recipe, tmp_path / "pieces")
        monkeypatch.setattr(run_module, "forward_backward", original)
        assert RunFolder(tmp_path / "pieces").saved_steps() == [2, 4]

        write_state = checkpointing.write_state

        def half_write(folder, *args):
            write_state(folder, *args)
            os.truncate(folder / "state.safetensors", 100)
            raise StoppedError

        monkeypatch.setattr(checkpointing, "write_state", half_write)
        with pytest.raises(StoppedError):
            train(recipe, tmp_path / "pieces", resume=True)
        monkeypatch.setattr(checkpointing, "write_state", write_state)
        assert RunFolder(tmp_path / "pieces").saved_steps() == [2, 4]

        train(recipe, tmp_path / "pieces", resume=True)
        assert_same_run(tmp_path / "whole", tmp_path / "pieces")
        assert RunFolder(tmp_path / "pieces").saved_steps() == [4, 6]
        assert not list((tmp_path / "pieces" / "checkpoints").glob(".*"))

    def test_after_kill_9(self, tmp_path, recipe_file):
        command = [sys.executable, "-m", "hf_visual_perceiver.training.train", "--config", recipe_file]
        overrides = ["steps=60", "evaluate_every=null"]
        folder = tmp_path / "run"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*command, "--output-dir", folder, *overrides],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + PATIENCE
        while not RunFolder(folder).saved_steps() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert RunFolder(folder).saved_steps()
        assert not (folder / "model").exists()
        # The run's own recipe: the overrides need not be given again.
        result = run(*command, "--output-dir", folder, "--resume", env={"OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
        assert "Resuming after step" in result.stderr
        assert f"The recipe is the run's own, {folder / 'recipe.yaml'}." in result.stderr
        recipe = small_recipe(steps=60, evaluate_every=None)
        train(recipe, tmp_path / "whole")
        assert_same_run(tmp_path / "whole", folder)

    def test_overrides_apply_to_the_runs_own_recipe(self, tmp_path, recipe_file, monkeypatch):
        asked = []
        monkeypatch.setattr(train_module, "train", lambda recipe, *rest: asked.append(recipe))
        folder = RunFolder(tmp_path / "run")
        folder.start(small_recipe(steps=60, seed=3))
        train_module.command(recipe_file, folder.path, resume=True)
        train_module.command(recipe_file, folder.path, resume=True, overrides=["log_every=5", "steps=70"])
        train_module.command(recipe_file, folder.path, resume=True, allow_recipe_change=True, overrides=["seed=4"])
        train_module.command(recipe_file, tmp_path / "new")
        assert [(r.steps, r.seed, r.log_every) for r in asked] == [(60, 3, 1), (70, 3, 5), (6, 4, 1), (6, 0, 1)]
        assert folder.changes(asked[0]) == []
        assert folder.changes(asked[1]) == ["steps (60 -> 70)"]  # which `train` refuses

    def test_a_share_and_the_steps_that_it_stands_for_are_one_recipe(self, tmp_path):
        folder = RunFolder(tmp_path / "run")
        folder.start(small_recipe(steps=60, warmup_steps=6))
        assert folder.changes(small_recipe(steps=60, warmup_steps=0.1)) == []
        assert folder.changes(small_recipe(steps=60, warmup_steps=0.2)) == ["warmup_steps (6 -> 12)"]

    def test_a_finished_run_stays_as_it_is(self, tmp_path):
        folder = train(small_recipe(), tmp_path / "run")
        (folder / "README.md").write_text("measured since")
        before = weights(tmp_path / "run")
        assert train(small_recipe(), tmp_path / "run", resume=True) == folder
        assert (folder / "README.md").exists()
        assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "run").items())


@pytest.mark.parametrize("distillation", ["soft", "hard"])
def test_a_frozen_teacher(tmp_path, distillation):
    teacher = {"model": papers_form(), "distillation": distillation, "weight": 0.9}
    before = load_model(papers_form()).state_dict()
    train(small_recipe(steps=3, teacher=teacher), tmp_path / "taught")
    train(small_recipe(steps=3), tmp_path / "alone")
    taught, alone = losses(tmp_path / "taught"), losses(tmp_path / "alone")
    assert all(taught[step] != alone[step] for step in (1, 2, 3))
    facts = json.loads((tmp_path / "taught" / "model" / "training.json").read_text())
    assert any(
        f"{distillation} distillation from visual_perceiver_nano_cifar10" in line for line in training_lines(facts)
    )
    assert all(torch.equal(value, before[name]) for name, value in load_model(papers_form()).state_dict().items())


@pytest.mark.parametrize("has", [True, False])
def test_bf16_is_for_cpus_that_have_it(tmp_path, monkeypatch, has):
    monkeypatch.setattr(train_module, "cpu_computes_in_bf16", lambda: has)
    for name, precision in (("float32", "no"), ("bf16", "bf16")):
        AcceleratorState._reset_state(True)  # accelerate keeps the first precision of a process
        train(small_recipe(steps=2, mixed_precision=precision), tmp_path / name)
    AcceleratorState._reset_state(True)
    assert (losses(tmp_path / "float32") == losses(tmp_path / "bf16")) == (not has)


class TestPieces:
    """Runs that stop cleanly and resume, also on another device."""

    SANDWICH = {"budgets": {"schedule": "sandwich", "students": 2}, "students": {"teacher": "ema"}}

    def test_pieces_of_any_length_equal_the_whole(self, tmp_path, monkeypatch, capsys):
        recipe = small_recipe(augmentation=DEIT, save_every=100, **self.SANDWICH)
        train(recipe, tmp_path / "whole")
        asked = []

        def every_second_time(self):
            asked.append(self)
            return len(asked) % 3 == 0

        monkeypatch.setattr(train_module.StopRequest, "requested", every_second_time)
        pieces = 1
        while train(recipe, tmp_path / "pieces", resume=pieces > 1) is None:
            pieces += 1
        assert pieces > 2
        assert_same_run(tmp_path / "whole", tmp_path / "pieces")

    def test_a_state_that_is_kept_apart(self, tmp_path, monkeypatch):
        """Stands in for DeepSpeed, which is not a dependency and was tested by hand."""
        recipe = small_recipe(ema_decay=None)
        train(recipe, tmp_path / "whole")
        monkeypatch.setattr(run_module, "keeps_state_apart", lambda accelerator: True)
        assert train(recipe, tmp_path / "pieces", max_minutes=1e-5) is None
        assert (tmp_path / "pieces" / "apart" / "step_1" / "optimizer.bin").exists()
        train(recipe, tmp_path / "pieces", resume=True)
        assert_same_run(tmp_path / "whole", tmp_path / "pieces")
        kept = {path.name for path in (tmp_path / "pieces" / "apart").iterdir()}
        assert kept == {"step_4", "step_6"}
        with pytest.raises(ValueError, match=r"`ema_decay` to be null with .*got 0.9"):
            train(small_recipe(), tmp_path / "averaged")

    def test_max_minutes(self, tmp_path, capfd):
        assert train(small_recipe(save_every=100), tmp_path / "run", max_minutes=1e-5) is None
        run = RunFolder(tmp_path / "run")
        assert run.saved_steps() == [1]
        assert "1e-05 minutes are over" in capfd.readouterr().err
        assert (run.path / "curves.png").exists()
        with pytest.raises(ValueError, match="`--max-minutes` to be above 0, got 0"):
            train(small_recipe(), tmp_path / "other", max_minutes=0)

    def test_sigterm(self, tmp_path, recipe_file):
        folder = tmp_path / "run"
        arguments = ["--output-dir", folder, "steps=100000", "evaluate_every=null", "save_every=100000"]
        process = subprocess.Popen(
            [sys.executable, "-m", "hf_visual_perceiver.training.train", "--config", recipe_file, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + PATIENCE
        while not losses_or_none(folder) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
        _, messages = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, messages
        assert "(SIGTERM)" in messages
        assert RunFolder(folder).saved_steps() == [max(losses(folder))]

    def test_a_full_disk(self, tmp_path, monkeypatch):
        train(small_recipe(steps=2), tmp_path / "run")
        before = weights(tmp_path / "run")

        def full(tensors, *args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(state, "save_torch_state_dict", full)
        with pytest.raises(OSError, match=r"Cannot save step 4 in .*No space left on device.*checkpoints: \[2\]"):
            train(small_recipe(steps=6), tmp_path / "run", resume=True, allow_recipe_change=True)
        run = RunFolder(tmp_path / "run")
        assert run.saved_steps() == [2]
        assert not list(run.checkpoints.glob(".*"))
        assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "run").items())

    def test_another_recipe_goes_on_when_allowed(self, tmp_path):
        train(small_recipe(steps=2), tmp_path / "run")
        changed = small_recipe(steps=4, learning_rate=1e-4)
        assert train(changed, tmp_path / "run", resume=True, allow_recipe_change=True) is not None
        assert list(losses(tmp_path / "run")) == [1, 2, 3, 4]
        assert train(changed, tmp_path / "run", resume=True) is not None  # now it is the run's own

    def test_a_damaged_checkpoint_is_named(self, tmp_path):
        train(small_recipe(steps=2), tmp_path / "run")
        os.truncate(tmp_path / "run" / "checkpoints" / "step_2" / "state.safetensors", 1000)
        with pytest.raises(ValueError, match=r"complete checkpoint in .*step_2, got a damaged one"):
            train(small_recipe(steps=4), tmp_path / "run", resume=True, allow_recipe_change=True)


class TestStreams:
    @pytest.fixture
    def shards(self, tmp_path):
        """Three shards of unequal length, and validation images."""
        images = datasets.load_dataset("parquet", data_files=f"{default_dataset()}/train.parquet", split="train")
        folder = tmp_path / "stream"
        folder.mkdir()
        for i, rows in enumerate((range(30), range(30, 70), range(70, 80))):
            images.select(rows).to_parquet(str(folder / f"train-{i}.parquet"))
        images.select(range(100, 140)).to_parquet(str(folder / "validation.parquet"))
        return str(folder)

    def recipe(self, shards, **changes):
        stream = {"streaming": True, "validation_split": "validation", "validation": 32, "shuffle_window": 16}
        return small_recipe(
            dataset=shards, **stream, **{"steps": 12, "evaluate_every": None, "save_every": 5, **changes}
        )

    def test_resume_in_the_middle_of_an_epoch(self, tmp_path, shards, monkeypatch):
        recipe = self.recipe(shards, workers=1, augmentation={"random_crop_padding": None})
        train(recipe, tmp_path / "whole")
        monkeypatch.setattr(train_module.StopRequest, "requested", lambda self: True)
        assert train(recipe, tmp_path / "pieces") is None
        monkeypatch.undo()
        assert RunFolder(tmp_path / "pieces").saved_steps() == [1]
        train(recipe, tmp_path / "pieces", resume=True)
        assert_same_run(tmp_path / "whole", tmp_path / "pieces")

    def test_an_unreadable_image(self, tmp_path, shards):
        path = f"{shards}/train-1.parquet"
        table = datasets.load_dataset("parquet", data_files=path, split="train", keep_in_memory=True)
        table = table.cast_column("img", datasets.Image(decode=False))
        broken = table.map(
            lambda row, i: {"img": {"bytes": b"broken", "path": "lost.png"}} if i == 3 else row, with_indices=True
        )
        broken.cast_column("img", datasets.Image()).to_parquet(path)
        with pytest.raises(ValueError, match=r"Cannot read lost\.png"):
            train(self.recipe(shards), tmp_path / "strict")
        assert train(self.recipe(shards, unreadable="replace"), tmp_path / "lenient") is not None

    def test_two_processes_with_uneven_shares(self, tmp_path, shards):
        recipe = self.recipe(shards)
        path = tmp_path / "stream.yaml"
        path.write_text(yaml.safe_dump(recipe.to_dict()))
        environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        arguments = ["-m", "hf_visual_perceiver.training.train", "--config", path, "--output-dir", tmp_path / "run"]
        result = run("torchrun", "--nproc_per_node", "2", *arguments, "--max-minutes", "0.0001", env=environment)
        assert result.returncode == 0, result.stderr
        assert RunFolder(tmp_path / "run").saved_steps() == [1]
        # One process goes on with what two began.
        assert train(recipe, tmp_path / "run", resume=True) is not None
        assert list(losses(tmp_path / "run")) == list(range(1, 13))


@pytest.mark.parametrize("queries", ["{schedule: sandwich}", "{schedule: stratified, groups: 4}"])
def test_two_processes_give_the_losses_of_one(tmp_path, recipe_file, queries):
    arguments = ["-m", "hf_visual_perceiver.training.train", "--config", recipe_file, "augmentation.mixup=0.8"]
    arguments += ["augmentation.cutmix=1.0", "augmentation.random_crop_padding=4", "micro_batch_size=4"]
    arguments += ["augmentation.auto_augment=rand-m9-mstd0.5-inc1", f"budgets={queries}"]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    single = run(sys.executable, *arguments, "--output-dir", tmp_path / "one", env=environment)
    assert single.returncode == 0, single.stderr
    double = run("torchrun", "--nproc_per_node", "2", *arguments, "--output-dir", tmp_path / "two", env=environment)
    assert double.returncode == 0, double.stderr
    facts = [json.loads((tmp_path / name / "model" / "training.json").read_text()) for name in ("one", "two")]
    assert [f["processes"] for f in facts] == [1, 2]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(one) == list(two) == [1, 2, 3, 4, 5, 6]
    assert all(abs(one[step] - two[step]) < 1e-4 for step in one)
    assert facts[0]["validation_accuracy"] == pytest.approx(facts[1]["validation_accuracy"], abs=2e-3)


THREADS_AT_THE_END = """
import gc
import sys
from pathlib import Path
from hf_visual_perceiver.training.recipe import load_recipe
from hf_visual_perceiver.training.train import train

gc.disable()  # a collection by chance would hide what is left over
train(load_recipe(sys.argv[1], ["steps=2"]), sys.argv[2], resume=sys.argv[3] == "resume")
names = [name.read_text() for name in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in names if "gloo" in name], names
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads in /proc")
def test_threads_of_gloo_end_before_python_does(tmp_path, recipe_file):
    # One that still has a tensor to drop when Python exits aborts the process.
    (tmp_path / "script.py").write_text(THREADS_AT_THE_END)
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for mode in ("new", "resume"):
        arguments = [tmp_path / "script.py", recipe_file, tmp_path / "run", mode]
        ended = run("torchrun", "--nproc_per_node", "2", *arguments, env=environment)
        assert ended.returncode == 0, ended.stderr


def test_accelerate_launch_on_a_checkouts_script(tmp_path, recipe_file):
    result = run(
        "accelerate",
        "launch",
        "--cpu",
        REPOSITORY / "training" / "train.py",
        "--config",
        recipe_file,
        "--output-dir",
        tmp_path / "run",
        "steps=2",
        "mixed_precision=bf16",
        "workers=1",
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert load_model(str(tmp_path / "run" / "model")).dtype == torch.float32


class TestMistakes:
    def test_a_folder_that_holds_another_run(self, tmp_path):
        train(small_recipe(steps=2), tmp_path / "run")
        log = (tmp_path / "run" / "log.jsonl").read_text()
        with pytest.raises(ValueError, match="already holds a run: continue it with --resume"):
            train(small_recipe(steps=2), tmp_path / "run")
        with pytest.raises(ValueError, match=r"these keys differ: steps \(2 -> 3\), seed \(0 -> 1\)"):
            train(small_recipe(steps=3, seed=1), tmp_path / "run", resume=True)
        assert (tmp_path / "run" / "log.jsonl").read_text() == log

    def test_a_folder_that_holds_something_else(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("precious")
        with pytest.raises(ValueError, match="empty or new; it holds something else"):
            train(small_recipe(), tmp_path)
        with pytest.raises(ValueError, match=r"a run to resume in .*, found none"):
            train(small_recipe(), tmp_path / "new", resume=True)
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"validation": 2000}, "`validation` to be below the 2000 images, got 2000"),
            ({"batch_size": 1024}, "at least 1024 images, one batch, got 1000"),
            ({"batch_size": 15}, "a multiple of 2"),
            ({"budgets": {"schedule": "stratified", "groups": 3}}, "multiple of 6 .*groups of the schedule.*, got 16"),
            ({"budgets": {"schedule": "sandwich", "students": 0}}, "students`?, got 0"),
            ({"budgets": {"schedule": "fixed", "K": 9}}, "got 9"),
            ({"optimizer": "adamm"}, "a name of timm's optimisers, got 'adamm'"),
            ({"augmentation": {"auto_augment": "foo"}}, "in timm's notation of RandAugment, .*got 'foo'"),
            ({"teacher": {"model": "absent/"}}, "`teacher.model` to be a folder or Hub id .*got 'absent/'"),
            ({"attention": "flash_attention_9"}, "Cannot use `attention` 'flash_attention_9'"),
        ],
    )
    def test_nothing_is_written_when_the_recipe_does_not_fit(self, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            train(small_recipe(**changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(("log_every", "what"), [(1, "finite loss, got nan"), (100, "finite weights")])
    def test_a_loss_that_is_not_finite_stops_the_run(self, tmp_path, monkeypatch, log_every, what):
        original, calls = objective.soft_cross_entropy, []

        def explode(*args):
            calls.append(args)
            return original(*args) * (float("nan") if len(calls) == 3 else 1)

        monkeypatch.setattr(objective, "soft_cross_entropy", explode)
        with pytest.raises(
            FloatingPointError, match=rf"{what}.* at step \d with (K=\d|full); complete checkpoints: \[2\]"
        ):
            train(small_recipe(log_every=log_every), tmp_path / "run")
        # What is not finite took no checkpoint's place.
        run = RunFolder(tmp_path / "run")
        assert run.saved_steps() == [2]
        report = json.loads(run.failure_file.read_text())
        assert report["complete_checkpoints"] == [2]
        weights = load_file(tmp_path / "run" / report["weights"])
        assert "visual_perceiver.cross_attention.queries" in weights
        assert not all(value.isfinite().all() for value in weights.values())
        assert not (tmp_path / "run" / "model").exists()

    def test_the_command_says_it_in_one_line(self, tmp_path, recipe_file):
        result = run(sys.executable, "-m", "hf_visual_perceiver.training.train", "--config", recipe_file, "steps=none")
        assert result.returncode == 1
        assert "valid integer for `steps`, got 'none'" in result.stderr
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (torch.OutOfMemoryError("CUDA out of memory."), "a smaller micro_batch_size needs less"),
            (RuntimeError("mkldnn failed\nat a.cpp"), "error: mkldnn failed (--debug shows the traceback)"),
        ],
        ids=["memory", "kernel"],
    )
    def test_what_a_machine_lacks_is_said_in_one_line(self, error, message, recipe_file, monkeypatch, capsys):
        def fail(*args):
            raise error

        monkeypatch.setattr(train_module, "train", fail)
        monkeypatch.setattr("sys.argv", ["train.py", "--config", str(recipe_file)])
        with pytest.raises(SystemExit) as stop:
            train_module.main()
        assert stop.value.code == 1
        said = capsys.readouterr().err
        assert message in said
        assert len(said.strip().splitlines()) == 1
        monkeypatch.setattr("sys.argv", ["train.py", "--config", str(recipe_file), "--debug"])
        with pytest.raises(type(error)):
            train_module.main()
