"""Evaluation at every budget: the numbers equal those of plain loops, and times are comparable."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_visual_perceiver import VisualPerceiverConfig, count_macs
from hf_visual_perceiver.data.images import ImageDataset, load_images, normalise
from hf_visual_perceiver.evaluation.evaluate import (
    Evaluation,
    default_budgets,
    evaluate,
    labels_of_model,
    output_at,
)
from hf_visual_perceiver.evaluation.metrics import Accuracy
from hf_visual_perceiver.evaluation.plots import plot_tradeoff
from hf_visual_perceiver.hub.card import write_card
from hf_visual_perceiver.inference.loading import SAMPLE
from hf_visual_perceiver.modeling import Budget
from hf_visual_perceiver.training.folder import save_folder


@pytest.fixture(scope="module")
def data(cifar10):
    return load_images(cifar10, "test").subset(slice(0, 90))


@pytest.fixture(scope="module")
def result(trained, data):
    conditions = {"model": "m", "dataset": "sample", "split": "test", "command": "visual-perceiver evaluate m"}
    return evaluate(trained, data, batch_size=40, progress=False, conditions=conditions)


def test_default_budgets(trained):
    names = [budget.short(trained.config.knobs) for budget in default_budgets(trained.config)]
    assert names[:7] == ["K=1", "K=2", "K=4", "K=8", "K=16", "K=32", "full"]
    assert names[7:] == ["t=0.6", "t=0.65", "t=0.7", "t=0.8", "t=0.9", "t=0.99"]


@torch.no_grad()
def test_rows_equal_plain_loops(trained, data, result):
    cfg = trained.config.timm_pretrained_cfg
    images = normalise(data.images, cfg["mean"], cfg["std"])
    for row in result.rows:
        selects = "dqs_threshold" in row.budget.kwargs
        outputs = [trained(x[None], **row.budget.kwargs) for x in images]
        right = np.array([o.logits.argmax().item() for o in outputs]) == data.labels
        used = np.array([o.active_queries.sum().item() for o in outputs])
        assert row.accuracy == pytest.approx(right.mean())
        assert row.standard_error == pytest.approx(np.sqrt(right.mean() * (1 - right.mean()) / 90))
        assert (row.used_min, row.used_max) == (used.min(), used.max())
        assert row.used_mean == pytest.approx(used.mean())
        assert row.used_std == pytest.approx(used.std())
        candidates = 64 if selects else None
        macs = [count_macs(trained.config, int(k), candidates) for k in used]
        assert row.macs == pytest.approx(np.mean(macs))
        assert row.ms_per_image > 0
    full = next(row for row in result.rows if row.budget == Budget())
    assert full.relative_time == 1


def test_the_checkpoints_own_operating_point_does_not_leak_in(trained, data, result):
    trained.config.dqs_threshold, trained.config.num_active_queries = 0.5, 3
    try:
        again = evaluate(trained, data, [Budget(), Budget(dqs_threshold=0.9)], progress=False)
        assert (trained.config.dqs_threshold, trained.config.num_active_queries) == (0.5, 3)
    finally:
        trained.config.dqs_threshold = trained.config.num_active_queries = None
    assert again.rows[0].used_mean == 64
    expected = next(row for row in result.rows if row.budget == Budget(dqs_threshold=0.9))
    assert again.rows[1].used_mean == pytest.approx(expected.used_mean)


def test_another_thread_gets_the_checkpoints_own_answers_meanwhile(model, images):
    model.config.num_active_queries, model.config.dqs_threshold = 10, 0.3
    expected = model(images)
    with ThreadPoolExecutor(1) as thread:
        answers = []

        def meanwhile(*_):
            handle.remove()
            answers.append(thread.submit(model, images).result())

        handle = model.visual_perceiver.layers[0].register_forward_hook(meanwhile)
        evaluated = output_at(model, images, Budget())
    assert evaluated.active_queries.all()
    assert torch.equal(answers[0].active_queries, expected.active_queries)
    assert not torch.equal(answers[0].active_queries, evaluated.active_queries)


def test_knobs_may_be_tensors_and_numbers_of_numpy(trained, data):
    budget = Budget(num_active_queries=torch.tensor(16), dqs_threshold=np.float32(0.5))
    rows = evaluate(trained, data, [budget], progress=False).to_dict()["rows"]
    assert json.loads(json.dumps(rows))[0]["budget"] == {"num_active_queries": 16, "dqs_threshold": 0.5}


def test_results_of_earlier_versions_are_read(result):
    former = {"num_active_queries": 8, "dqs_threshold": None, "queries_mean": 8.0, "queries_std": 0.0}
    former |= {"queries_min": 8, "queries_max": 8, "macs": 1.0, "accuracy": 0.5, "standard_error": 0.1}
    former |= {"ms_per_image": 1.0, "relative_time": 0.2}
    selecting = {**former, "num_active_queries": None, "dqs_threshold": 0.8}
    read = Evaluation.from_dict({"rows": [former, selecting], "conditions": {}})
    assert [read.name(row.budget) for row in read.rows] == ["K=8", "t=0.8"]
    assert (read.unit, read.knobs, read.rows[0].used_mean) == (result.unit, result.knobs, 8.0)
    assert Evaluation.from_dict(json.loads(json.dumps(read.to_dict()))) == read


def test_conditions_and_json(result):
    assert {"hardware", "torch", "dtype", "batch_size", "images"} <= set(result.conditions)
    assert Evaluation.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_metric_is_of_the_evaluate_library():
    metric = Accuracy()
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add_batch(predictions=[2], references=[2])
    assert metric.compute()["accuracy"] == pytest.approx(2 / 3)


def test_labels_must_match(trained, data):
    with pytest.raises(ValueError, match=r"Expected classes among airplane, .*, got zebra"):
        evaluate(trained, dataclasses.replace(data, label_names=["zebra", *data.label_names[1:]]), progress=False)
    eleven = dataclasses.replace(data, label_names=[str(i) for i in range(11)])
    with pytest.raises(ValueError, match=r"labels in \[0, 10\), got 10"):
        evaluate(trained, eleven, progress=False)


def test_labels_are_matched_by_name(trained, data, result):
    names = data.label_names[::-1]
    reordered = ImageDataset(data.images, 9 - data.labels, names)
    again = evaluate(trained, reordered, [Budget()], progress=False)
    assert again.rows[0].accuracy == next(r.accuracy for r in result.rows if r.budget == Budget())


class TestLabelsOfModel:
    """Mapping of dataset labels to model classes."""

    def indices(self, names, given, labels):
        config = VisualPerceiverConfig(id2label=dict(enumerate(names)))
        data = ImageDataset(np.zeros((len(labels), 1, 1, 3), np.uint8), np.array(labels), given)
        return labels_of_model(SimpleNamespace(config=config), data).tolist()

    @pytest.mark.parametrize(
        ("names", "given", "expected"),
        [
            ([str(i) for i in range(10)], ["3", "7"], [3, 7]),
            (["0", "1", "10", "2"], ["2", "10"], [3, 2]),  # classes of a folder, in the order of strings
            ([f"LABEL_{i}" for i in range(4)], ["LABEL_3", "LABEL_1"], [3, 1]),
            (["crane", "ship", "crane"], ["crane", "ship", "crane"], [0, 1]),  # ImageNet has two classes "crane"
        ],
    )
    def test_names_of_the_model_match_by_name(self, names, given, expected, caplog):
        assert self.indices(names, given, [0, 1]) == expected
        assert caplog.records == []

    @pytest.mark.parametrize(
        ("names", "given", "expected"),
        [
            (["ant", "bee", "cat", "dog"], ["0", "1"], [0, 1]),
            (["ant", "bee", "cat", "dog"], ["1", "3"], [1, 3]),
            ([*"abcdefghijkl"], ["10", "2"], [10, 2]),
            (["ant", "bee", "cat", "dog"], ["LABEL_2", "LABEL_0"], [2, 0]),
            (["LABEL_0", "LABEL_1", "LABEL_2"], ["ant", "bee"], [0, 1]),
            (["LABEL_0", "LABEL_1", "LABEL_2"], ["2", "1"], [2, 1]),
        ],
    )
    def test_indices_are_taken_where_names_are_missing_and_it_is_said(self, names, given, expected, caplog):
        assert self.indices(names, given, [0, 1]) == expected
        assert "matched by index" in caplog.text

    @pytest.mark.parametrize(
        ("names", "given", "message"),
        [
            (["0", "1", "10", "2"], ["1", "3"], "Expected classes among 0, 1, 10, 2, got 3"),
            (["ant", "bee"], ["0", "2"], r"Expected labels in \[0, 2\), got 2"),
            (["LABEL_0", "LABEL_1"], ["ant", "bee", "cat"], r"Expected labels in \[0, 2\), got 2"),
            (["crane", "ship", "crane"], ["ship", "crane"], "Expected names of one class each, got crane"),
        ],
    )
    def test_others_are_refused(self, names, given, message):
        with pytest.raises(ValueError, match=message):
            self.indices(names, given, [0, 1])


def test_budgets_must_be_in_range(trained, data):
    with pytest.raises(ValueError, match=r"integer in \[1, 64\], got 65"):
        evaluate(trained, data, [Budget(num_active_queries=65)], progress=False)
    with pytest.raises(ValueError, match="batch size of at least 1, got 0"):
        evaluate(trained, data, batch_size=0, progress=False)


def test_plot(result, tmp_path):
    plot_tradeoff(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"end in .png, .svg or .pdf, got 'plot.txt'"):
        plot_tradeoff(result, tmp_path / "plot.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]


def test_card(trained, result, tmp_path):
    from huggingface_hub import ModelCard

    folder = save_folder(trained, tmp_path / "my_model")
    card = ModelCard.load(write_card(folder, trained, result))
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.license == "apache-2.0"
    values = {r.metric_name: r.metric_value for r in card.data.eval_results}
    for row in result.rows:
        assert values[f"accuracy at {result.name(row.budget)}"] == round(row.accuracy, 4)
        assert f"{100 * row.accuracy:.2f} ± {100 * row.standard_error:.2f}" in card.text
    assert "visual-perceiver evaluate m" in card.text
    conditions = {**result.conditions, "dataset": SAMPLE}
    sampled = ModelCard.load(write_card(folder, trained, dataclasses.replace(result, conditions=conditions)))
    assert {r.dataset_type for r in sampled.data.eval_results} == {"uoft-cs/cifar10"}
    write_card(folder, trained, result)
    assert (folder / "tradeoff.png").exists()
    assert json.loads((folder / "evaluation.json").read_text()) == result.to_dict()
