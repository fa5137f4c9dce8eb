"""Model cards: they contain the measurements, and also work without some of them."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from support import REPOSITORY, papers_form

from hf_visual_perceiver.cli.evaluate import errors_line
from hf_visual_perceiver.cli.main import main
from hf_visual_perceiver.data.images import load_images, normalise
from hf_visual_perceiver.evaluation.confusion import Confusion
from hf_visual_perceiver.evaluation.evaluate import Evaluation, evaluate, int8_accuracy, read_evaluation
from hf_visual_perceiver.evaluation.robustness import Cell, Outcome, Robustness
from hf_visual_perceiver.hub.card import render_card, rewrite_card, training_lines, write_card
from hf_visual_perceiver.inference.loading import load_config
from hf_visual_perceiver.modeling import Budget


CHECKPOINTS = sorted(path.parent for path in (REPOSITORY / "checkpoints").glob("*/config.json"))
CARDS = REPOSITORY / "model_cards"
JSON_FILES = ("config.json", "evaluation.json", "training.json")


@pytest.fixture(scope="module")
def data(cifar10):
    return load_images(cifar10, "test").subset(slice(0, 200))


@pytest.fixture(scope="module")
def result(trained, data):
    # Other points than all queries, whose confusion is measured all the same.
    points = [Budget(num_active_queries=4), Budget(dqs_threshold=0.8)]
    conditions = {"model": "m", "dataset": "sample", "split": "test"}
    return evaluate(trained, data, points, batch_size=60, progress=False, conditions=conditions)


@pytest.fixture
def folder(tmp_path):
    """The JSON files of the bundled checkpoint."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for name in JSON_FILES:
        shutil.copy(Path(papers_form()) / name, folder)
    return folder


def test_accuracy_in_int8_is_the_engines(trained, data, result, folder):
    engine, cfg = trained.optimize_for_inference(int8=True), trained.config.timm_pretrained_cfg
    measured = dataclasses.replace(result, int8=int8_accuracy(trained, data, batch_size=200, progress=False))
    logits = engine(normalise(data.images, cfg["mean"], cfg["std"]), num_active_queries=4).logits
    accuracy = (logits.argmax(-1).numpy() == data.labels).mean()
    assert measured.int8["K=4"] == pytest.approx(accuracy)
    assert Evaluation.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured
    card = render_card(folder, trained.config, measured)
    assert "engine in int8" in card
    assert re.search(rf"\| K=4 \|.* {100 * accuracy:.2f} \| [\d.]+ \|", card)
    assert "int8" not in render_card(folder, trained.config, result).partition("## Where")[0]


class TestConfusion:
    def test_is_that_of_a_plain_loop(self, trained, data, result):
        cfg = trained.config.timm_pretrained_cfg
        with torch.no_grad():
            given = trained(normalise(data.images, cfg["mean"], cfg["std"])).logits.argmax(-1).tolist()
        names, counts = trained.config.label_names, result.confusion.counts
        for i, name in enumerate(names):
            for j, other in enumerate(names):
                expected = sum(a == i and b == j for a, b in zip(data.labels, given, strict=True))
                assert counts.get(name, {}).get(other, 0) == expected
        assert all(number > 0 for row in counts.values() for number in row.values())
        right = sum(result.confusion.accuracy(name) * result.confusion.images(name) for name in counts)
        assert right == pytest.approx(sum(a == b for a, b in zip(data.labels, given, strict=True)))

    def test_order(self):
        labels = np.array([0] * 10 + [1] * 4 + [2] * 2)
        given = np.array([0] * 9 + [2] + [1, 1, 0, 0] + [2, 2])
        confusion = Confusion.of(["a", "b", "c", "unseen"], labels, given)
        assert confusion.worst_first() == ["b", "a", "c"]
        assert confusion.mistakes() == [("b", "a", 2), ("a", "c", 1)]
        assert confusion.mistakes("a") == [("a", "c", 1)]
        assert confusion.sentence(classes=2) == (
            "Lowest accuracy by class: b 50.0 %, a 90.0 %. Most frequent errors (number of images): b predicted as a (2), "
            "a predicted as c (1)."
        )
        assert Confusion.of(["a"], labels * 0, labels * 0).sentence() == "Lowest accuracy by class: a 100.0 %."

    def test_classes_of_one_name(self):
        confusion = Confusion.of(["crane", "dog", "crane"], np.array([0, 2, 2]), np.array([2, 2, 1]))
        assert confusion.counts == {"crane (0)": {"crane (2)": 1}, "crane (2)": {"dog": 1, "crane (2)": 1}}

    def test_json_with_and_without(self, result):
        assert Evaluation.from_dict(json.loads(json.dumps(result.to_dict()))) == result
        values = result.to_dict()
        del values["confusion"]
        older = Evaluation.from_dict(values)
        assert older.confusion is None
        assert older.to_dict() == values
        assert errors_line(older) == "Errors by class were not measured."
        assert errors_line(result).startswith("Full network: Lowest accuracy by class: ")


class TestCard:
    def test_says_what_is_confused(self, folder, result):
        config = load_config(str(folder))
        text = render_card(folder, config, result)
        worst = result.confusion.worst_first()
        assert text.index(f"| {worst[0]} |") < text.index(f"| {worst[-1]} |")
        label, given, number = result.confusion.mistakes()[0]
        assert f"{label} predicted as {given} ({number})" in text
        assert "Accuracy of the full network by class" in text
        without = render_card(folder, config, dataclasses.replace(result, confusion=None))
        assert "Errors by class were not measured." in without
        many = Confusion.of([f"a|{i}" for i in range(30)], np.arange(30), np.arange(30) // 2)
        text = render_card(folder, config, dataclasses.replace(result, confusion=many))
        assert "the 10 worst of 30 classes" in text
        assert text.count("\n| a\\|") == 10

    def test_of_json_alone_is_that_of_the_measurement(self, trained, folder, result):
        card = write_card(folder, trained, result).read_text()
        (folder / "README.md").unlink()
        (folder / "tradeoff.png").unlink()
        assert rewrite_card(folder).read_text() == card
        assert (folder / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
        elsewhere = rewrite_card(folder, folder.parent / "card.md").read_text()
        assert elsewhere == card.replace("(tradeoff.png)", "(copied/tradeoff.png)")

    def test_robustness(self, folder, result):
        outcomes = [Outcome(Budget(), 0.7, 0.01, 64.0, False)], [Outcome(Budget(), 0.5, 0.01, 64.0, False)]
        cells = [
            Cell("clean", 0, outcomes[0]),
            *(Cell(name, s, outcomes[1]) for name in ("fog", "all") for s in (1, None)),
        ]
        robustness = Robustness(cells, [], {"images": 200, "dataset": "sample", "split": "test", "model": "m"})
        assert "Robustness to corrupted or shifted images was not measured." in rewrite_card(folder).read_text()
        (folder / "robustness.json").write_text(json.dumps(robustness.to_dict()))
        text = rewrite_card(folder).read_text()
        assert "is 50.00 %; on the same 200 images without corruption it is 70.00 %" in text
        assert "was not measured. Accuracy is" not in text

    def test_what_is_missing_or_damaged_is_named(self, folder):
        before = sorted(folder.iterdir())
        (folder / "training.json").write_text("{}")
        with pytest.raises(ValueError, match=r"Expected .*training.json to be a valid file"):
            rewrite_card(folder, folder / "card.md")
        (folder / "evaluation.json").write_text('{"rows": 3}')
        with pytest.raises(ValueError, match=r"Expected .*evaluation.json to be a valid file"):
            rewrite_card(folder)
        (folder / "evaluation.json").unlink()
        with pytest.raises(ValueError, match=r"Expected .*evaluation.json to exist; `visual-perceiver evaluate "):
            rewrite_card(folder)
        (folder / "evaluation.json").write_text(Path(papers_form(), "evaluation.json").read_text())
        assert sorted(folder.iterdir()) == before
        (folder / "training.json").unlink()
        assert "## Training\n\nNot recorded." in rewrite_card(folder).read_text()

    def test_the_command(self, folder, monkeypatch, capsys):
        for output in (folder / "README.md", folder.parent / "card.md"):
            options = [] if output.name == "README.md" else ["--output", str(output)]
            monkeypatch.setattr("sys.argv", ["visual-perceiver", "card", str(folder), *options])
            with pytest.raises(SystemExit) as stop:
                main()
            assert stop.value.code == 0
            assert str(output) in capsys.readouterr().out
            assert output.read_text().startswith("---\n")
        monkeypatch.setattr("sys.argv", ["visual-perceiver", "card", str(folder), "--output", "no/such/card.md"])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 1
        assert "Expected a file name in an existing folder" in capsys.readouterr().err

    def test_a_run_that_teaches_is_called_by_its_name(self):
        facts = json.loads((Path(papers_form()) / "training.json").read_text())
        for model, name in (("runs/wide/model", "wide"), ("facebook/deit", "deit"), ("model", "model")):
            facts["recipe"]["teacher"] = {"model": model, "distillation": "hard"}
            assert any(f"hard distillation from {name}." in line for line in training_lines(facts))

    @pytest.mark.parametrize(
        ("name", "accuracies", "expected"),
        [
            ("dvt_nano", {"1": 0.5, "3": 0.7}, "50.00 % (exit=1), 70.00 % (full)"),
            ("lookupvit_nano", {"4": 0.5, "7": 0.6}, "50.00 % (grid=5), 60.00 % (full)"),
            ("perceiver_nano", {"2": 0.5, "6": 0.6}, "50.00 % (i=1), 60.00 % (i=2)"),
            ("qna_vit_nano", {"1": 0.7}, "70.00 % (full)"),
            ("visual_perceiver_nano", {"8": 0.5, "64": 0.7}, "50.00 % (K=8), 70.00 % (K=64)"),
        ],
    )
    def test_validation_accuracies_name_their_budgets(self, name, accuracies, expected):
        facts = json.loads((REPOSITORY / "checkpoints" / f"{name}_cifar10" / "training.json").read_text())
        facts["validation_accuracy"] = accuracies
        assert training_lines(facts)[-1] == f"Validation accuracy at the end: {expected}."


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda path: path.name)
class TestPublishedCards:
    def test_are_what_their_json_says(self, checkpoint):
        config, evaluation = load_config(str(checkpoint)), read_evaluation(checkpoint / "evaluation.json")
        again = f"`visual-perceiver card {checkpoint.name}` writes it anew"
        assert (checkpoint / "README.md").read_text() == render_card(checkpoint, config, evaluation), again
        picture = f"../checkpoints/{checkpoint.name}/tradeoff.png"
        assert (CARDS / picture).is_file()
        card = (CARDS / f"{checkpoint.name}.md").read_text()
        assert card == render_card(checkpoint, config, evaluation, picture), again

    def test_metadata(self, checkpoint):
        card, evaluation = ModelCard.load(checkpoint / "README.md"), read_evaluation(checkpoint / "evaluation.json")
        assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
        assert (card.data.pipeline_tag, card.data.metrics) == ("image-classification", ["accuracy"])
        assert card.data.model_name == checkpoint.name
        values = {r.metric_name: (r.metric_value, r.dataset_split) for r in card.data.eval_results}
        split = evaluation.conditions["split"]
        assert values == {
            f"accuracy at {evaluation.name(row.budget)}": (round(row.accuracy, 4), split) for row in evaluation.rows
        }
        headings = [line for line in card.text.splitlines() if line.startswith("## ")]
        names = ["Measured", "Errors by class", "Use", "Training", "Limits", "Licence", "Citation"]
        assert headings == [f"## {name}" for name in names]


def test_every_card_has_a_checkpoint():
    cards = {path.stem for path in CARDS.glob("*.md")} - {"template"}
    assert cards == {path.name for path in CHECKPOINTS}
