"""The frontier of all families: each setting is timed, tables and the plot hold what was measured, and bad input is named."""

import json

import frontier
import numpy as np
import pytest
import torch
from frontier import (
    budgets_table,
    figure_of,
    leaders_table,
    load_networks,
    main,
    time_points,
    timed_points,
    trained_epochs,
)
from matplotlib.colors import rgb_to_hsv, to_rgb
from support import save_networks

from hf_visual_perceiver.data.images import load_images
from hf_visual_perceiver.evaluation.frontier import Frontier, Point
from hf_visual_perceiver.modeling import FAMILIES
from hf_visual_perceiver.modeling.static_classifier import StaticConfig


def point(model: str, setting: str, macs: float, accuracy: float, kind: str = "fixed") -> Point:
    return Point(model, setting, kind, macs, accuracy, 0.01, macs, accuracy)


POINTS = [
    point("a", "K=1", 5e6, 0.7),
    point("a", "i=1", 6e6, 0.6),
    point("a", "full", 3e7, 0.8),
    point("a", "t=0.8", 9e6, 0.65, "adaptive"),
    point("b", "K=1", 8e6, 0.75),
    point("static", "full", 2e7, 0.9),
]


@pytest.mark.parametrize("fast", [False, True])
def test_run_on_all_families(fast, tmp_path, cifar10, capsys, monkeypatch):
    monkeypatch.setattr(frontier, "SINGLE", 4)
    folders = save_networks(tmp_path, load_images(cifar10, "test[:2]").label_names)
    if fast:  # an export takes seconds
        folders = {"timm_wrapper": folders["timm_wrapper"]}
    options = {"dataset": cifar10, "split": "test[:16]", "choose": "train[-16:]", "macs": [1.0, 1000.0]}
    files = {"plot": tmp_path / "f.png", "json_file": tmp_path / "f.json"}
    main(
        [*folders.values()],
        dataset_name="d",
        batch_size=[1, 3],
        repetitions=2,
        threads=1,
        fast=fast,
        **options,
        **files,
    )
    printed, written = capsys.readouterr().out, json.loads(files["json_file"].read_text())
    assert "| network | settings | epochs | <= 1 M | <= 1000 M |" in printed
    assert "| timm_wrapper | full | 40.8 |" in printed
    timed = [p for p in written["points"] if p["ms_per_image"]]
    assert {p["model"] for p in timed} == folders.keys()
    of_all, of_timed = ({(p["model"], p["kind"]) for p in found} for found in (written["points"], timed))
    assert of_timed == of_all
    for p in timed:
        assert p["family"] == p["model"]
        assert p["ms_per_image"].keys() == {"1", "3"}
        assert min(p["ms_per_image"].values()) > 0
    facts = written["conditions"]
    assert (facts["images"], facts["dataset"], facts["threads"], facts["repetitions"]) == (16, "d", 1, 2)
    assert facts["form"] == ("onnxruntime" if fast else "eager")
    assert {"hardware", "torch", "command"} <= facts.keys()
    assert files["plot"].stat().st_size > 5000


def test_efficient_budgets_and_all_others_are_timed():
    assert [p.setting for p in timed_points(POINTS)] == ["K=1", "full", "t=0.8", "K=1", "full"]


def test_times_are_of_all_images_in_batches(cifar10, monkeypatch):
    monkeypatch.setattr(frontier, "SINGLE", 5)
    seen: list[int] = []

    class Network(torch.nn.Module):
        def forward(self, pixels, **knobs):
            seen.append(len(pixels))

    network = Network()
    batches = torch.zeros(10, 3, 4, 4)
    monkeypatch.setattr(
        frontier, "pixel_batches", lambda model, data, size: enumerate(batches[: len(data)].split(size))
    )
    monkeypatch.setattr(frontier, "forward_at", lambda model, point: model)
    monkeypatch.setattr(
        frontier,
        "interleaved",
        lambda runs, *others: {name: [run() or 6.0, 1.0, 3.0] for name, run in runs.items()},
    )
    data = load_images(cifar10, "test[:10]")
    found = time_points({"a": network}, POINTS[:2], data, [2, 10], 3)
    assert seen == [2] * 3 * 2 + [10] * 2  # three batches of two, of two points
    assert found == {p: {2: 500.0, 10: 300.0} for p in POINTS[:2]}
    with pytest.raises(ValueError, match="at least 11 images to time batches of 11 on, got 10"):
        time_points({"a": network}, POINTS[:2], data, [11], 3)
    with pytest.raises(ValueError, match="batch size of at least 1, got 0"):
        time_points({"a": network}, POINTS[:2], data, [0], 3)


def test_tables_and_figure():
    times = {p: {1: 2 * p.macs / 1e6, 256: p.macs / 1e6} for p in timed_points(POINTS)}
    measured = Frontier(POINTS, [1e6, 1e7, 2e7], {"dataset": "d", "images": 9, "hardware": "h", "threads": 1})
    assert leaders_table(measured, {"b": 80}).splitlines()[2:] == [
        "| a | fixed |  |  | 70.00 (K=1) | 70.00 (K=1) |",
        "| a | any |  |  | 70.00 (K=1) | 70.00 (K=1) |",
        "| b | fixed | 80 |  | **75.00 (K=1)** | 75.00 (K=1) |",
        "| static | fixed |  |  |  | **90.00 (full)** |",
    ]
    rows = budgets_table(times).splitlines()
    assert rows[0].endswith("| ms per image, batch 1 | ms per image, batch 256 |")
    assert rows[2] == "| a | K=1 | 5.0 | 70.00 ± 1.00 | 10 | 5 |"
    assert len(rows) == 2 + 4
    families = {"a": "lookupvit", "b": "lookupvit", "static": "timm_wrapper"}
    figure = figure_of(measured, times, families, 1, {"static": 80})
    assert "static, 80 epochs" in [text.get_text() for text in figure.legends[0].get_texts()]
    left, right = figure.axes
    lines = {line.get_label(): line for line in right.get_lines()}
    np.testing.assert_allclose(lines["a"].get_xydata(), [[10, 70], [60, 80]])
    np.testing.assert_allclose(left.get_lines()[0].get_xydata(), [[5, 70], [30, 80]])
    hues = {name: rgb_to_hsv(to_rgb(line.get_color()))[0] for name, line in lines.items()}
    assert hues["a"] == pytest.approx(hues["b"], abs=0.01) != pytest.approx(hues["static"], abs=0.01)
    assert lines["a"].get_color() == lines["a, adaptive"].get_color() != lines["b"].get_color()
    assert lines["static"].get_marker() != lines["b"].get_marker()
    assert right.get_xlabel() == "ms per image, one image"


def test_epochs_of_all_stages(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "training.json").write_text('{"epochs": 7.9, "earlier_training": {"epochs": 72.2}}')
    assert trained_epochs({"a": tmp_path / "a", "b": tmp_path / "b"}) == {"a": 80}


def test_networks_of_the_comparison_after_equal_training_were_trained_alike():
    folders = sorted(frontier.BASELINES.with_name("eight_epochs").glob("*/"))
    networks = load_networks([str(folder) for folder in folders])
    assert {model.config.model_type for model in networks.values()} == {*FAMILIES, StaticConfig.model_type}
    assert set(trained_epochs({folder.name: folder for folder in folders}).values()) == {8}
    recipes = [json.loads((folder / "training.json").read_text())["recipe"] for folder in folders]
    for key in (
        "teacher",
        "steps",
        "batch_size",
        "learning_rate",
        "optimizer",
        "weight_decay",
        "ema_decay",
        "augmentation",
    ):
        assert {json.dumps(recipe[key], sort_keys=True) for recipe in recipes} == {
            json.dumps(recipes[0][key], sort_keys=True)
        }


def test_checkpoints_by_default_are_those_that_load(tmp_path, monkeypatch, capsys):
    folders = save_networks(tmp_path, ["a", "b"])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    monkeypatch.setattr(frontier, "shipped", lambda name: tmp_path)
    baselines = {folder.name for folder in frontier.BASELINES.iterdir()}
    assert baselines == {"resnet20_cifar10", "vit_nano_cifar10"}
    assert load_networks(None).keys() == folders.keys() | baselines
    monkeypatch.setattr(frontier, "BASELINES", tmp_path / "none")
    assert "broken is left out: Expected" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match="different names, got qna_vit more than once"):
        load_networks([folders["qna_vit"], folders["qna_vit"]])
    monkeypatch.setattr(frontier, "shipped", lambda name: tmp_path / "broken")
    with pytest.raises(ValueError, match="Expected a checkpoint in checkpoints/ that can be loaded, got none"):
        load_networks(None)
