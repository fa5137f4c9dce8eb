"""Comparison of runs: grouping by seed, and the numbers of a row."""

import json
import statistics

import pytest
import yaml
from PIL import Image
from support import run

from hf_visual_perceiver.evaluation import comparison as module
from hf_visual_perceiver.evaluation.comparison import compare_runs, plot_comparison
from hf_visual_perceiver.training.recipe import recipe_from_dict


BASE = {"architecture": "visual_perceiver_nano_patch4_32", "steps": 20, "dataset_name": "cifar10"}


@pytest.fixture
def make_run(tmp_path):
    """Write a run's folder with these accuracies at its last evaluated step, and a worse evaluation before."""

    def make(name, accuracies, step=20, log=(), **recipe):
        folder = tmp_path / name
        folder.mkdir()
        values = recipe_from_dict({**BASE, **recipe}).to_dict()
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
        entries = [{"step": 10, "validation_accuracy": 0.01, "K": K} for K in accuracies]
        entries += [{"step": 20, "loss": 2.0, "K": [64, 7]}, *log]
        entries += [{"step": step, "validation_accuracy": value, "K": K} for K, value in accuracies.items()]
        (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return folder

    return make


@pytest.fixture
def seeds(make_run):
    values = [{64: 0.60, 8: 0.50}, {64: 0.64, 8: 0.50}, {64: 0.71, 8: 0.53}]
    return [make_run(f"nano_seed{i}", accuracies, seed=i) for i, accuracies in enumerate(values)]


SANDWICH = {"schedule": "sandwich", "students": 2}


def test_mean_and_deviation_over_seeds(seeds):
    (row,) = compare_runs(seeds).rows
    assert row.name == "nano"
    assert row.runs == ["nano_seed0", "nano_seed1", "nano_seed2"]
    assert row.seeds == [0, 1, 2]
    assert row.step == 20
    assert row.accuracy == pytest.approx({8: 0.51, 64: 0.65})
    assert row.deviation == pytest.approx(
        {8: statistics.stdev([0.5, 0.5, 0.53]), 64: statistics.stdev([0.6, 0.64, 0.71])}
    )


def test_one_seed_has_no_deviation(seeds):
    (row,) = compare_runs(seeds[:1]).rows
    assert row.name == "nano_seed0"
    assert row.deviation == {8: None, 64: None}


def test_keys_that_do_not_change_what_is_learned_make_no_new_row(make_run):
    first = make_run("a", {64: 0.5}, seed=0)
    second = make_run("b", {64: 0.6}, seed=1, dataset="elsewhere", workers=3, log_every=7, tracker=None)
    assert len(compare_runs([first, second]).rows) == 1


@pytest.mark.parametrize(
    "change", [{"learning_rate": 1e-3}, {"dataset_name": "cifar100"}, {"config": {"num_queries": 16}}]
)
def test_keys_that_do_make_one(make_run, change):
    first, second = make_run("a", {8: 0.5}, seed=0), make_run("b", {8: 0.6}, seed=1, **change)
    rows = compare_runs([first, second]).rows
    assert [row.runs for row in rows] == [["a"], ["b"]]


class TestNames:
    def test_are_the_keys_that_differ(self, make_run, seeds):
        other = make_run("other", {64: 0.7}, queries=SANDWICH)
        rows = compare_runs([other, *seeds]).rows
        assert [row.name for row in rows] == ["budgets.schedule=sandwich", "budgets.schedule=uniform"]
        # The name leaves out what follows from the schedule; the row's facts do not.
        assert rows[0].recipe == {"budgets.schedule": "sandwich", "budgets.students": 2}

    def test_tell_apart_what_only_some_have(self, make_run):
        runs = [make_run(f"run{n}", {64: 0.5}, budgets={**SANDWICH, "students": n}) for n in (1, 2)]
        runs.append(make_run("uniform", {64: 0.5}))
        names = [row.name for row in compare_runs(runs).rows]
        assert names == [
            "budgets.schedule=sandwich, budgets.students=1",
            "budgets.schedule=sandwich, budgets.students=2",
            "budgets.schedule=uniform, no budgets.students",
        ]

    def test_are_the_folders_names_if_many_keys_differ(self, make_run):
        other = {"learning_rate": 1e-3, "weight_decay": 0.1, "batch_size": 64, "optimizer": "sgd"}
        runs = [make_run(f"small_batch_seed1{i}", {64: 0.5}, seed=i, **other) for i in range(2)]
        runs.append(make_run("baseline-k64", {64: 0.5}))
        assert [row.name for row in compare_runs(runs).rows] == ["small_batch", "baseline-k64"]

    def test_are_unique_even_if_the_folders_names_are_not(self, make_run, tmp_path):
        other = {"learning_rate": 1e-3, "weight_decay": 0.1, "batch_size": 64, "optimizer": "sgd"}
        runs = []
        for folder, recipe in (("x", {}), ("y", other)):
            (tmp_path / folder).mkdir()
            runs.append(make_run(f"{folder}/run", {64: 0.5}, **recipe))
        first, second = (row.name for row in compare_runs(runs).rows)
        assert first != second
        assert "learning_rate=0.0005" in first


def test_markdown(make_run, seeds):
    other = make_run("other", {64: 0.7, 16: 0.6}, step=15, queries=SANDWICH)
    assert compare_runs([*seeds, other]).to_markdown().splitlines() == [
        "| runs | seeds | step | K = 8 | K = 16 | K = 64 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| budgets.schedule=uniform | 3 | 20 | 51.00 ± 1.73 |  | 65.00 ± 5.57 |",
        "| budgets.schedule=sandwich | 1 | 15 |  | 60.00 | 70.00 |",
    ]


def test_budgets_of_other_families_have_their_names(make_run, seeds, tmp_path, monkeypatch):
    dvt = make_run("dvt", {1: 0.5, 3: 0.7}, architecture="dvt_nano_32")
    other = make_run("lookupvit", {3: 0.6, 7: 0.8}, architecture="lookupvit_nano_patch4_32")
    qna = make_run("qna", {1: 0.9}, architecture="qna_vit_nano_32", budgets={"schedule": "fixed", "K": 1})
    comparison = compare_runs([dvt, other, qna])
    assert comparison.to_markdown().splitlines()[0] == "| runs | seeds | step | exit = 1 | grid = 4 | full |"
    assert [line.split(" | ")[3:] for line in comparison.to_markdown().splitlines()[2:]] == [
        ["50.00", "", "70.00 |"],
        ["", "60.00", "80.00 |"],
        ["", "", "90.00 |"],
    ]
    assert json.loads(json.dumps(comparison.to_dict()))["rows"][0]["accuracy"] == {"1": 0.5, "3": 0.7}
    assert compare_runs([dvt, seeds[0]]).table()[0][3:] == ["exit = 1", "full", "K = 8", "K = 64"]

    figures = []
    monkeypatch.setattr(module, "save_figure", lambda figure, path: figures.append(figure))
    for runs, label, ticks in (
        ([dvt, qna], "budget", ["full", "exit=1\nfull"]),
        (seeds, "queries K", ["64", "8"]),
    ):
        plot_comparison(compare_runs(runs), tmp_path / "a.png")
        (axes,) = figures[-1].axes
        assert axes.get_xlabel() == label
        assert [text.get_text() for text in axes.get_xticklabels()] == ticks


def test_plain_values(seeds):
    result = json.loads(json.dumps(compare_runs(seeds).to_dict()))
    assert result["rows"][0]["accuracy"]["64"] == pytest.approx(0.65)
    assert result["rows"][0]["seeds"] == [0, 1, 2]


class TestTrainingMacs:
    def test_from_the_log(self, make_run):
        log = [{"step": 19, "loss": 1.0, "K": 1, "macs_per_image": 2e6}, {"step": 20, "macs_per_image": 4e6}]
        comparison = compare_runs([make_run("a", {64: 0.5}, log=log)])
        assert comparison.rows[0].macs_per_image == 3e6
        assert "training MACs (M)" in comparison.to_markdown()
        assert "| 3.0 |" in comparison.to_markdown()

    def test_from_a_finished_run(self, make_run):
        folder = make_run("a", {64: 0.5})
        (folder / "model").mkdir()
        (folder / "model" / "training.json").write_text('{"macs_per_image": 5e6}')
        assert compare_runs([folder]).rows[0].macs_per_image == 5e6

    def test_unknown(self, seeds):
        comparison = compare_runs(seeds)
        assert comparison.rows[0].macs_per_image is None
        assert "MACs" not in comparison.to_markdown()


class TestErrors:
    def test_no_run(self, tmp_path, seeds):
        with pytest.raises(ValueError, match=r"folder of a run, got .* without a recipe"):
            compare_runs([seeds[0], tmp_path])
        with pytest.raises(ValueError, match="at least one run"):
            compare_runs([])

    def test_not_evaluated(self, make_run, seeds):
        with pytest.raises(ValueError, match=r"Expected validation accuracies in .*young.*got none"):
            compare_runs([seeds[0], make_run("young", {}, seed=7)])

    def test_no_log(self, make_run):
        folder = make_run("young", {})
        (folder / "log.jsonl").unlink()
        with pytest.raises(ValueError, match=r"Expected validation accuracies in .*young"):
            compare_runs([folder])

    @pytest.mark.parametrize(
        "line", ['{"step": 3, "lo', "[]", '{"loss": 1}', '{"step": 3, "validation_accuracy": 0.5}', "", "\x00"]
    )
    def test_damaged_line(self, make_run, line):
        folder = make_run("a", {64: 0.5})
        with (folder / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        with pytest.raises(ValueError, match=r"in line 4 of .*log.jsonl"):
            compare_runs([folder])

    @pytest.mark.parametrize("text", ["steps: [", "- 1", "nonsense: 1"])
    def test_damaged_recipe(self, make_run, text):
        folder = make_run("a", {64: 0.5})
        (folder / "recipe.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"recipe\.yaml"):
            compare_runs([folder])

    def test_the_same_seed_twice(self, seeds):
        with pytest.raises(ValueError, match=r"different seeds, got 1 in .*nano_seed1 and .*nano_seed1"):
            compare_runs([*seeds, seeds[1]])

    def test_seeds_evaluated_at_other_steps(self, make_run, seeds):
        with pytest.raises(
            ValueError, match=r"same step and K, got step 20, K = 8, 64 in .* and step 15, K = 8, 64 in"
        ):
            compare_runs([*seeds, make_run("killed", {8: 0.4, 64: 0.5}, step=15, seed=9)])
        runs = [make_run(f"dvt{i}", {1: 0.4, 3: 0.5}, step=15 + i, architecture="dvt_nano_32", seed=i) for i in (0, 1)]
        with pytest.raises(ValueError, match=r"got step 15, exit = 1, full in .* and step 16, exit = 1, full in"):
            compare_runs(runs)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot(make_run, seeds, tmp_path, suffix):
    other = make_run("other", {64: 0.7, 16: 0.6}, queries=SANDWICH)
    path = tmp_path / f"comparison{suffix}"
    plot_comparison(compare_runs([*seeds, other]), path)
    if suffix == ".png":
        assert Image.open(path).width > 500
    else:
        text = path.read_text()
        assert "budgets.schedule=uniform" in text


def test_plot_has_a_line_with_error_bars_for_each_row(make_run, seeds, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(module, "save_figure", lambda figure, path: figures.append(figure))
    plot_comparison(compare_runs([*seeds, make_run("other", {64: 0.7}, queries=SANDWICH)]), tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert axes.get_xscale() == "log"
    first, second = axes.containers
    assert first.lines[0].get_xydata().tolist() == [[8, pytest.approx(51)], [64, pytest.approx(65)]]
    (bars,) = first.lines[2]
    (_, low), (_, high) = bars.get_segments()[1]
    assert (high - low) / 2 == pytest.approx(100 * statistics.stdev([0.6, 0.64, 0.71]))
    assert not second.has_yerr


def test_the_command(make_run, seeds, tmp_path):
    other = make_run("wide", {64: 0.9, 8: 0.8}, queries=SANDWICH)
    result = run(
        "visual-perceiver", "compare", *seeds, other, "--plot", tmp_path / "plot.png", "--json", tmp_path / "out.json"
    )
    assert result.returncode == 0, result.stderr
    assert "65.00 ± 5.57" in result.stdout
    assert "budgets.schedule=sandwich" in result.stdout
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 2
    assert Image.open(tmp_path / "plot.png").size[0] > 500
    result = run("visual-perceiver", "compare", *seeds, other, "--markdown")
    assert result.stdout.strip() == compare_runs([*seeds, other]).to_markdown()
    result = run("visual-perceiver", "compare", tmp_path / "absent")
    assert result.returncode == 1
    assert "error: Expected the folder of a run, got" in result.stderr
