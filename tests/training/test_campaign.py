"""Campaigns: the order, what waits for what, pieces, failures, and the way to another machine."""

import json
import math
import os
import shutil
import types

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_visual_perceiver.loading import default_dataset, load_model
from hf_visual_perceiver.training import campaign as campaign_module
from hf_visual_perceiver.training import run as run_module
from hf_visual_perceiver.training import train as train_module
from hf_visual_perceiver.training.campaign import (
    CAMPAIGN,
    continue_campaign,
    load_campaign,
    main,
    next_run,
    restore_runs,
    state_of,
)
from hf_visual_perceiver.training.carrying import carry_in, carry_out, list_carried


RECIPE = {
    "architecture": "visual_perceiver_nano_patch4_32",
    "config": {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_queries": 8},
    "dataset": "some/images",
    "validation": 60,
    "batch_size": 16,
    "steps": 50,
    "learning_rate": 1e-3,
    "ema_decay": 0.9,
    "evaluate_queries": [1, 8],
    "log_every": 1,
    "tracker": None,
}
FIRST = {"name": "first", "recipe": "small.yaml", "images": 64}
TEACHER = {"name": "teacher", "recipe": "small.yaml", "images": 40, "seed": 1}
TAUGHT = {
    "name": "taught",
    "recipe": "small.yaml",
    "images": 32,
    "overrides": ["teacher.weight=0.9"],
    "needs": {"teacher.model": "teacher"},
}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than the training."""
    monkeypatch.setattr(run_module, "plot_curves", lambda *arguments: None)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with a few images of the sample."""
    folder = tmp_path_factory.mktemp("images")
    sample = datasets.load_dataset("parquet", data_files=f"{default_dataset()}/train.parquet", split="train")
    sample.select(range(160)).to_parquet(str(folder / "train.parquet"))
    return str(folder)


@pytest.fixture
def campaign(tmp_path, images):
    """Load a campaign of these runs."""
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(RECIPE))

    def load(*entries, runs_dir="runs", **options):
        (tmp_path / "campaign.yaml").write_text(yaml.safe_dump({"runs": list(entries)}))
        options = {"datasets": [images], **options}
        return load_campaign(tmp_path / "campaign.yaml", tmp_path / runs_dir, **options)

    return load


def pieces(monkeypatch, steps):
    """Every piece of a run ends after this many steps, as if its time was over."""
    asked = []

    def requested(self):
        asked.append(self)
        return sum(other is self for other in asked) >= 2 * steps  # asked twice in each step that is logged

    monkeypatch.setattr(train_module.StopRequest, "requested", requested)


def steps_of(runs):
    return [run.steps_done for run in runs]


def states(runs):
    return [state_of(run, runs) for run in runs]


def logged(run):
    return [entry["step"] for entry in run.folder.entries() if "loss" in entry]


def invoke(monkeypatch, *arguments):
    """The exit status of the command, run in this process."""
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["campaign", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
    return stop.value.code


class TestOrder:
    def test_the_first_that_is_ready_and_a_run_takes_the_model_it_needs(self, campaign, capsys):
        runs = campaign(TAUGHT, FIRST, TEACHER)
        assert states(runs) == ["waits for teacher", "not begun, next", "not begun"]
        taught, first, teacher = runs
        assert taught.recipe.teacher.model == str(teacher.folder.model)
        assert (first.recipe.seed, teacher.recipe.seed) == (0, 1)
        assert [run.recipe.steps for run in runs] == [2, 4, 2]
        assert continue_campaign(runs)
        assert states(runs) == ["finished"] * 3
        said = [line for line in capsys.readouterr().err.splitlines() if ": step 0 of" in line]
        assert said == ["first: step 0 of 4", "teacher: step 0 of 2", "taught: step 0 of 2"]
        facts = json.loads((taught.folder.model / "training.json").read_text())
        assert facts["recipe"]["teacher"]["model"] == str(teacher.folder.model)
        assert facts["recipe_name"] == "small.yaml"
        assert load_model(str(taught.folder.model)).config.num_queries == 8
        before = os.stat(taught.folder.model / "model.safetensors").st_mtime_ns
        assert continue_campaign(runs)
        assert os.stat(taught.folder.model / "model.safetensors").st_mtime_ns == before

    def test_precision_of_its_own(self, campaign, monkeypatch):
        """accelerate keeps the first precision of a process."""
        monkeypatch.setattr(train_module, "cpu_computes_in_bf16", lambda: True)
        bf16 = {**TEACHER, "overrides": ["mixed_precision=bf16"]}
        assert continue_campaign(campaign(FIRST, bf16, {**FIRST, "name": "third"}))

    def test_only(self, campaign):
        runs = campaign(FIRST, TEACHER, TAUGHT)
        with pytest.raises(ValueError, match="what taught needs to be finished, got teacher unfinished"):
            continue_campaign(runs, only="taught")
        with pytest.raises(ValueError, match="--only to be one of first, teacher, taught, got 'second'"):
            continue_campaign(runs, only="second")
        continue_campaign(runs, only="teacher")
        assert steps_of(runs) == [0, 2, 0]

    def test_several_processes_do_one_run(self, campaign, monkeypatch):
        runs = campaign(FIRST, TEACHER)
        begun = []

        def trained(recipe, folder, *others):
            begun.append(folder)
            return folder

        monkeypatch.setattr(campaign_module, "train", trained)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert continue_campaign(runs)
        assert begun == [runs[0].folder.path]


class TestPieces:
    def test_goes_on_where_it_stopped(self, campaign, monkeypatch):
        runs = campaign(FIRST, TEACHER)
        continue_campaign(campaign(FIRST, TEACHER, runs_dir="whole"))
        pieces(monkeypatch, 3)
        assert continue_campaign(runs)
        assert steps_of(runs) == [3, 0]
        assert states(runs) == ["to be continued, next", "not begun"]
        assert continue_campaign(runs)
        assert steps_of(runs) == [4, 2]
        assert logged(runs[0]) == [1, 2, 3, 4]
        for run in campaign(FIRST, TEACHER, runs_dir="whole"):
            one, other = (
                load_file(folder / run.name / "model" / "model.safetensors")
                for folder in (run.folder.path.parent, run.folder.path.parent.parent / "runs")
            )
            assert all(torch.equal(value, other[name]) for name, value in one.items())

    def test_time_is_shared_by_the_runs(self, campaign, monkeypatch):
        now, given = [0.0], []
        monkeypatch.setattr(campaign_module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))

        def trained(recipe, folder, resume, name, max_minutes, allow):
            given.append(max_minutes)
            now[0] += 240
            campaign_module.RunFolder(folder).start(recipe)
            (folder / "model").mkdir()
            (folder / "model" / "training.json").write_text(json.dumps({"recipe": {"steps": recipe.steps}}))
            return folder

        monkeypatch.setattr(campaign_module, "train", trained)
        runs = campaign(FIRST, TEACHER, {**FIRST, "name": "third"})
        assert continue_campaign(runs, max_minutes=7)
        assert given == [7.0, 3.0]
        with pytest.raises(ValueError, match="`--max-minutes` to be above 0, got 0"):
            continue_campaign(runs, max_minutes=0)

    def test_a_budget_that_was_changed_is_noticed(self, campaign):
        continue_campaign(campaign(TEACHER))
        longer = campaign({**TEACHER, "images": 64})
        assert "has another recipe: steps (2 -> 4)" in state_of(longer[0], longer)
        with pytest.raises(ValueError, match=r"these keys differ: steps \(2 -> 4\)"):
            continue_campaign(longer)
        assert continue_campaign(longer, allow_recipe_change=True)
        assert states(longer) == ["finished"]
        assert logged(longer[0]) == [1, 2, 3, 4]


class TestFailures:
    @pytest.fixture
    def broken(self, monkeypatch):
        """Runs of seed 1 have losses that are not finite."""
        original = run_module.forward_backward

        def forward_backward(*arguments):
            recipe = arguments[6]
            return original(*arguments) * (math.nan if recipe.seed == 1 else 1)

        monkeypatch.setattr(run_module, "forward_backward", forward_backward)

    def test_the_next_run_is_done_and_the_failed_one_left(self, campaign, broken, monkeypatch, capsys):
        runs = campaign(TEACHER, TAUGHT, FIRST)
        assert not continue_campaign(runs)
        assert states(runs) == [
            "failed at step 0: Expected a finite loss, got nan",
            "waits for teacher",
            "finished",
        ]
        assert "teacher failed: Expected a finite loss" in capsys.readouterr().err
        assert continue_campaign(runs)  # nothing was tried
        assert "Nothing is left to train." in capsys.readouterr().err
        assert not continue_campaign(runs, only="teacher")
        monkeypatch.undo()
        assert continue_campaign(runs, only="teacher")
        assert next_run(runs).name == "taught"

    def test_the_exit_status(self, campaign, images, broken, monkeypatch, tmp_path):
        campaign(TEACHER)
        arguments = ["--campaign", tmp_path / "campaign.yaml", "--runs-dir", tmp_path / "runs"]
        assert invoke(monkeypatch, *arguments, "--dataset", images) == 1

    def test_what_concerns_all_runs_stops_the_campaign(self, campaign):
        runs = campaign(FIRST, TEACHER, datasets=["/no/such/place"])
        with pytest.raises(FileNotFoundError, match="/no/such/place"):
            continue_campaign(runs)
        assert steps_of(runs) == [0, 0]


class TestCarrying:
    def test_an_empty_machine_goes_on_at_the_same_step(self, campaign, images, monkeypatch, tmp_path, capsys):
        campaign(TEACHER, TAUGHT, FIRST)
        here = ["--campaign", tmp_path / "campaign.yaml", "--dataset", images]
        assert (
            invoke(
                monkeypatch, *here, "--runs-dir", tmp_path / "one", "--only", "teacher", "--carry-out", tmp_path / "way"
            )
            == 0
        )
        pieces(monkeypatch, 1)
        assert invoke(monkeypatch, *here, "--runs-dir", tmp_path / "one", "--carry-out", tmp_path / "way") == 0
        assert [path.name for path in sorted((tmp_path / "way").iterdir())] == [
            "taught.step1.part1of1",
            "teacher.finished.part1of1",
        ]
        there = [*here, "--runs-dir", tmp_path / "two", "--carry-in", tmp_path / "way"]
        assert invoke(monkeypatch, *there, "--status") == 0
        one, two = (campaign(TEACHER, TAUGHT, FIRST, runs_dir=name) for name in ("one", "two"))
        assert steps_of(two) == steps_of(one) == [2, 1, 0]
        assert states(two) == ["finished", "to be continued, next", "not begun"]
        bytes_of = [(runs[0].folder.model / "model.safetensors").read_bytes() for runs in (one, two)]
        assert bytes_of[0] == bytes_of[1]
        # The teacher is where it is on this machine.
        stored = yaml.safe_load(two[1].folder.recipe_file.read_text())
        assert stored["teacher"]["model"] == str(two[0].folder.model)
        shutil.rmtree(tmp_path / "one")
        monkeypatch.undo()
        assert invoke(monkeypatch, *there, "--carry-out", tmp_path / "way", "--only", "taught") == 0
        assert steps_of(two) == [2, 2, 0]
        assert logged(two[1]) == [1, 2]
        assert "Carried in: nothing that is further than here." in capsys.readouterr().err
        # The parts of before have gone.
        assert sorted(carried.run for carried in list_carried(tmp_path / "way")) == ["taught", "teacher"]
        assert all(math.isinf(carried.step) for carried in list_carried(tmp_path / "way"))

    @pytest.fixture
    def stopped(self, campaign, monkeypatch):
        """A run of 4 steps that stopped after 2."""
        runs = campaign(FIRST)
        with monkeypatch.context() as patch:
            pieces(patch, 2)
            continue_campaign(runs)
        assert runs[0].steps_done == 2
        return runs[0]

    def test_parts(self, stopped, campaign, tmp_path):
        way = tmp_path / "way"
        arguments = (stopped.folder, "first", 4, way)
        parts = carry_out(*arguments, max_files=99, part_bytes=20_000)
        assert len(parts) > 2
        assert all(part.stat().st_size <= 20_000 for part in parts)
        assert sorted(way.iterdir()) == sorted(parts)
        # Twelve parts are in the order of their numbers, not of their names.
        assert len(carry_out(*arguments, max_files=99, part_bytes=4_000)) > 10
        assert not any(part.exists() for part in parts)
        other = campaign(FIRST, runs_dir="other")
        assert restore_runs(other, way) == ["first"]
        assert steps_of(other) == [2]
        (way / "notes.txt").write_text("not a part")
        before = sorted(way.iterdir())
        with pytest.raises(ValueError, match=r"at most 3 files in .*way, got 1 and \d+ more of first"):
            carry_out(*arguments, max_files=3, part_bytes=4_000)
        assert sorted(way.iterdir()) == before

    def test_nothing_saved_nothing_carried(self, campaign, tmp_path):
        run = campaign(FIRST)[0]
        assert carry_out(run.folder, "first", 4, tmp_path / "way", max_files=8) == []
        assert not (tmp_path / "way").exists()

    def test_damage(self, stopped, campaign, tmp_path):
        parts = carry_out(stopped.folder, "first", 4, tmp_path / "way", max_files=99, part_bytes=20_000)
        other = campaign(FIRST, runs_dir="other")
        data = bytearray(parts[1].read_bytes())
        data[10_000] ^= 1
        parts[1].write_bytes(data)
        with pytest.raises(ValueError, match="the parts of first as they were written, got damage"):
            restore_runs(other, tmp_path / "way")
        parts[1].unlink()
        with pytest.raises(ValueError, match=rf"Expected {len(parts)} parts of first .*: part 2 is missing"):
            restore_runs(other, tmp_path / "way")
        assert not other[0].folder.path.exists()
        with pytest.raises(ValueError, match="--carry-in to be a folder"):
            restore_runs(other, tmp_path / "nowhere")

    def test_what_is_further_here_stays(self, stopped, campaign, tmp_path):
        carry_out(stopped.folder, "first", 4, tmp_path / "way", max_files=8)
        runs = campaign(FIRST)
        state = (stopped.folder.checkpoints / "step_2" / "state.safetensors").read_bytes()
        assert restore_runs(runs, tmp_path / "way") == []
        assert (stopped.folder.checkpoints / "step_2" / "state.safetensors").read_bytes() == state
        continue_campaign(runs)
        assert restore_runs(runs, tmp_path / "way") == []
        assert states(runs) == ["finished"]

    def test_another_recipe_is_not_taken(self, stopped, campaign, tmp_path):
        carry_out(stopped.folder, "first", 4, tmp_path / "way", max_files=8)
        changed = campaign({**FIRST, "seed": 3}, runs_dir="other")
        with pytest.raises(ValueError, match=r"these keys differ: seed \(0 -> 3\)"):
            restore_runs(changed, tmp_path / "way")
        assert not changed[0].folder.path.exists()
        # Nor is one of those that are here given away for it.
        here = campaign({**FIRST, "seed": 3}, runs_dir="third")
        here[0].folder.start(here[0].recipe)
        with pytest.raises(ValueError, match=r"these keys differ: seed \(3 -> 0\)"):
            carry_in(list_carried(tmp_path / "way")[0], here[0].folder, stopped.recipe)
        assert yaml.safe_load(here[0].folder.recipe_file.read_text())["seed"] == 3

    def test_several_processes(self, campaign, monkeypatch, tmp_path, capsys):
        campaign(FIRST)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert invoke(monkeypatch, "--campaign", tmp_path / "campaign.yaml", "--carry-in", tmp_path) == 1
        assert "--carry-in to be given to one process" in capsys.readouterr().err


class TestStatus:
    def test_the_table(self, campaign, monkeypatch, tmp_path, capsys):
        continue_campaign(campaign(TEACHER))
        teacher = campaign(TEACHER, TAUGHT, FIRST)[0]
        capsys.readouterr()
        monkeypatch.chdir(tmp_path)
        assert invoke(monkeypatch, "--campaign", "campaign.yaml", "--runs-dir", "runs", "--status") == 0
        out = capsys.readouterr().out
        cells = [line.split() for line in out.splitlines() if line.strip()]
        assert [cell[:3] for cell in cells[2:5]] == [["teacher", "2", "2"], ["taught", "0", "2"], ["first", "0", "4"]]
        assert cells[2][6] == "finished"
        assert [cell[6:] for cell in cells[3:5]] == [["not", "begun,", "next"], ["not", "begun"]]
        for K, accuracy in teacher.accuracies().items():
            assert f"{100 * accuracy:.2f} (K = {K})" in out
        assert (
            "taught: accelerate launch -m hf_visual_perceiver.training.train --config small.yaml --output-dir runs/taught "
            "teacher.weight=0.9 steps=2 seed=0 teacher.model=runs/teacher/model" in out
        )
        assert not (tmp_path / "runs" / "taught").exists()

    def test_accuracies_are_the_last(self, campaign):
        run = campaign({**FIRST, "overrides": ["evaluate_every=2"]})[0]
        continue_campaign([run])
        last = [e for e in run.folder.entries() if "validation_accuracy" in e and e["step"] == 4]
        assert run.accuracies() == {e["K"]: e["validation_accuracy"] for e in last}
        assert list(run.accuracies()) == [1, 8]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{**FIRST, "budget": 3}], "Unknown key `budget` in run 1 of .*campaign.yaml. Allowed keys: images, name"),
        ([{"name": "first", "recipe": "small.yaml"}], "Missing key `images` in run 1"),
        ([{**FIRST, "images": "many"}], r"Expected int in run 1 of .*: images, got 'many'"),
        ([{**FIRST, "images": 15}], "first in .*`images` to be at least a batch of 16, got 15"),
        ([{**FIRST, "recipe": "lost.yaml"}], r"first in .*Expected `recipe` to be a file, got .*lost\.yaml"),
        ([FIRST, {**FIRST, "seed": 1}], "every name once in .*, got first 2 times"),
        ([TAUGHT], "taught to need runs among taught, got 'teacher'"),
        (
            [{**TEACHER, "needs": {"teacher.model": "taught"}}, TAUGHT, FIRST],
            "wait for themselves, got teacher, taught",
        ),
        ([{**FIRST, "name": "a/b"}], "names of letters, digits, _ and -, got 'a/b'"),
        ([{**FIRST, "overrides": ["queries.K"]}], r"first in .*override such as steps=100, got 'queries.K'"),
        (
            [{**FIRST, "overrides": [{"queries.K": 3}]}],
            "overrides such as queries.K=16 for first in .*, got {'queries.K': 3}",
        ),
        ([{**FIRST, "overrides": ["colour=3"]}], "first in .*Unknown key `colour`"),
        ([{**FIRST, "overrides": ["steps=3"]}], "`images`, `seed`, `needs` and --dataset to say what steps is"),
        ([{**FIRST, "needs": {"colour": "first"}}], "wait for themselves, got first"),
        ([FIRST, {**TAUGHT, "needs": {"colour.model": "first"}}], "taught in .*Unknown key `colour`"),
        (["first"], "run 1 of .* to hold keys and values, got 'first'"),
        ([], "at least one run in .*, got none"),
    ],
)
def test_a_campaign_that_does_not_fit_is_named(campaign, tmp_path, entries, message):
    with pytest.raises(ValueError, match=message):
        campaign(*entries)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("runs: [", "to be YAML"), ("plan: []", "one key, `runs`, with a list, got plan"), ("- 1", "got list")],
)
def test_a_file_that_is_no_campaign(tmp_path, text, message):
    (tmp_path / "campaign.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_campaign(tmp_path / "campaign.yaml")


def test_places_of_datasets(campaign, tmp_path):
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**RECIPE, "dataset": "other/images"}))
    other = {**FIRST, "name": "other", "recipe": "other.yaml"}
    runs = campaign(FIRST, other, datasets=["/data"])
    assert [run.recipe.dataset for run in runs] == ["/data", "other/images"]
    runs = campaign(FIRST, other, datasets=["other/images=/x=y", "/data"])
    assert [run.recipe.dataset for run in runs] == ["/data", "/x=y"]
    assert [run.recipe.dataset_name for run in runs] == ["some/images", "other/images"]
    with pytest.raises(ValueError, match="a name among some/images, other/images, got 'third/images=/x'"):
        campaign(FIRST, other, datasets=["third/images=/x"])


def test_overrides_for_all_change_nothing_learned(campaign):
    assert campaign(FIRST, TEACHER, overrides=["compile=true"])[1].recipe.compile
    with pytest.raises(ValueError, match=r"an override for all runs to be of .*compile.*, got 'batch_size'"):
        campaign(FIRST, overrides=["batch_size=8"])


def test_the_campaign_that_ships():
    runs = load_campaign()
    by_name = {run.name: run for run in runs}
    assert runs[0].name == "flagship"
    assert all(run.recipe.batch_size >= 512 and run.recipe.steps >= 26_400 for run in runs)
    assert by_name["flagship_distilled"].needs == {"teacher.model": "teacher"}
    fixed = {run.recipe.queries["K"] for run in runs if run.recipe.queries["schedule"] == "fixed"}
    assert fixed == {1, 4, 16, 64}
    assert CAMPAIGN.name == "campaign.yaml"
