"""The frontier: its cascades equal `Cascade`, and settings are chosen on other images."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from support import save_networks
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
from typer.testing import CliRunner

from hf_visual_perceiver.cli.main import app
from hf_visual_perceiver.cli.options import model_label
from hf_visual_perceiver.data.images import load_images, normalise
from hf_visual_perceiver.evaluation.frontier import (
    CASCADE_THRESHOLDS,
    Frontier,
    Point,
    best_point,
    efficient,
    forward_at,
    frontier_figure,
    measure_points,
)
from hf_visual_perceiver.inference.cascade import Cascade
from hf_visual_perceiver.inference.loading import load_model


@torch.no_grad()
def test_points_are_what_the_model_and_its_cascades_do(trained, cifar10):
    data, choosing = load_images(cifar10, "test[:60]"), load_images(cifar10, "train[-40:]")
    points = {point.setting: point for point in measure_points("m", trained, data, choosing, 30, progress=False)}
    stages, cfg = trained.config.budgets(), trained.config.timm_pretrained_cfg
    costs = np.array(trained.config.count_stages(stages))
    for images, macs, accuracy in ((data, "macs", "accuracy"), (choosing, "chosen_macs", "chosen_accuracy")):
        x = normalise(images.images, cfg["mean"], cfg["std"])
        output = Cascade(trained, stages, [0.6] * (len(stages) - 1))(x)
        assert getattr(points["cascade at 0.6"], macs) == pytest.approx(costs[output.stage.numpy()].mean())
        right = output.logits.argmax(-1).numpy() == images.labels
        assert getattr(points["cascade at 0.6"], accuracy) == pytest.approx(right.mean())
        right = trained(x, num_active_queries=8).logits.argmax(-1).numpy() == images.labels
        assert getattr(points["K=8"], accuracy) == pytest.approx(right.mean())
    assert {points[name].kind for name in ("K=8", "full")} == {"fixed"}
    assert (points["t=0.8"].kind, points["cascade at 0.6"].kind) == ("adaptive", "cascade")
    assert points["K=8"].macs == trained.config.count_macs(stages[3])
    for setting in (
        "K=8",
        "full",
        "t=0.8",
        "cascade at 0.6",
        "cascade to K=4 + mirror at 0.6",
        "cascade to K=1 + mirror at 0.6",
    ):
        right = forward_at(trained, points[setting])(normalise(data.images, cfg["mean"], cfg["std"])).logits.argmax(-1)
        assert points[setting].accuracy == pytest.approx((right.numpy() == data.labels).mean())


def point(setting: str, macs: float, accuracy: float, chosen: float, kind: str = "fixed") -> Point:
    return Point("m", setting, kind, macs, accuracy, 0.01, macs, chosen)


def test_settings_are_chosen_by_the_other_images():
    points = [point("K=1", 5e6, 0.7, 0.71), point("K=2", 8e6, 0.8, 0.7), point("t=0.8", 9e6, 0.75, 0.9, "adaptive")]
    assert best_point(points[:2], 10e6) == points[0]
    assert best_point(points, 4e6) is None
    headers, fixed, best = Frontier(points, [4e6, 10e6], {}).table()
    assert headers == ["network", "settings", "<= 4 M", "<= 10 M"]
    assert fixed == ["m", "fixed", "", "70.00 (K=1)"]
    assert best == ["m", "any", "", "75.00 (t=0.8)"]


def test_lines_leave_out_what_costs_more_for_less():
    cheap, worse, best = point("K=1", 5e6, 0.7, 0.7), point("i=1", 8e6, 0.8, 0.69), point("full", 9e6, 0.7, 0.8)
    as_good, dearer = point("K=2", 9e6, 0.9, 0.8), point("i=2", 5e6, 0.9, 0.6)
    assert efficient([best, as_good, worse, dearer, cheap]) == [cheap, best]
    axes = frontier_figure(Frontier([best, worse, cheap], [1e7], {})).axes[0]
    np.testing.assert_allclose(axes.get_lines()[0].get_xydata(), [[5, 70], [9, 70]])


def test_one_colour_a_network():
    others = [Point("static", "full", "fixed", 4e7, 0.9, 0.01, 4e7, 0.9)]
    points = [point("K=1", 5e6, 0.7, 0.71), point("t=0.8", 9e6, 0.75, 0.9, "adaptive"), *others]
    axes = frontier_figure(Frontier(points, [1e7], {"dataset": "d", "images": 10})).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines) == ["m", "m, adaptive", "static"]
    assert lines["m"].get_color() == lines["m, adaptive"].get_color() != lines["static"].get_color()
    np.testing.assert_allclose(lines["static"].get_xydata(), [[40, 90]])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["m", "static", "adaptive"]


def test_a_timm_classifier_is_one_point(tmp_path, cifar10):
    """Saved by transformers alone."""
    names = load_images(cifar10, "test[:2]").label_names
    config = TimmWrapperConfig(
        architecture="cifar_resnet20", id2label=dict(enumerate(names)), pretrained_cfg={"input_size": [3, 32, 32]}
    )
    config.pretrained_cfg |= {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"}
    network = TimmWrapperForImageClassification(config).eval()
    network.save_pretrained(tmp_path / "run" / "model")
    loaded, data = load_model(str(tmp_path / "run" / "model")), load_images(cifar10, "test[:60]")
    found, *mirrored = measure_points("r", loaded, data, data, 30, progress=False)
    x = normalise(data.images, [0.5] * 3, [0.25] * 3)
    with torch.no_grad():
        logits, others = network(x).logits, network(x.flip(-1)).logits
    assert found.accuracy == pytest.approx((logits.argmax(-1).numpy() == data.labels).mean())
    assert (found.setting, found.kind, found.macs) == ("full", "fixed", 40_813_184)
    assert [m.setting for m in mirrored] == [f"full + mirror at {threshold:g}" for threshold in CASCADE_THRESHOLDS]
    # So early in its training it is sure of nothing, and sees all images twice.
    assert mirrored[-1].macs == 2 * found.macs
    assert mirrored[-1].accuracy == pytest.approx(((logits + others).argmax(-1).numpy() == data.labels).mean())
    with pytest.raises(ValueError, match="no knobs for a timm classifier, got num_active_queries"):
        loaded.config.resolve(num_active_queries=4)
    assert model_label(str(tmp_path / "run" / "model")) == "run"


def test_command(tmp_path):
    options = ["--split", "test[:16]", "--choose", "train[-16:]", "--batch-size", "16", "--macs", "30", "--markdown"]
    files = ["--json", str(tmp_path / "frontier.json"), "--plot", str(tmp_path / "frontier.png")]
    result = CliRunner().invoke(app, ["frontier", *options, *files])
    assert result.exit_code == 0, result.output
    assert "<= 30 M" in result.output
    written = json.loads((tmp_path / "frontier.json").read_text())
    assert (written["limits"], written["conditions"]["images_to_choose_by"]) == ([30e6], 16)
    assert (tmp_path / "frontier.png").stat().st_size > 5000


def test_all_families_in_one_call(tmp_path, cifar10):
    folders = save_networks(tmp_path, load_images(cifar10, "test[:2]").label_names)
    options = ["--dataset", cifar10, "--split", "test[:16]", "--choose", "train[-16:]", "--batch-size", "16"]
    files = ["--json", str(tmp_path / "frontier.json"), "--plot", str(tmp_path / "frontier.png")]
    result = CliRunner().invoke(app, ["frontier", *folders.values(), *options, *files])
    assert result.exit_code == 0, result.output
    points = json.loads((tmp_path / "frontier.json").read_text())["points"]
    counts = {name: Counter(p["kind"] for p in points if p["model"] == name) for name in folders}
    assert list(counts) == list(dict.fromkeys(p["model"] for p in points))
    many = len(CASCADE_THRESHOLDS)
    assert counts["visual_perceiver"] == {"fixed": 3, "adaptive": 6, "cascade": (1 + 3) * many}
    assert counts["iterative_perceiver"] == {"fixed": 4, "cascade": 4 * many}
    assert counts["dynamic_vision_transformer"] == {"fixed": 3, "adaptive": 5, "cascade": 3 * many}
    assert counts["qna_vit"] == counts["timm_wrapper"] == {"fixed": 1, "cascade": many}
    again = CliRunner().invoke(app, ["frontier", folders["qna_vit"], f"{folders['qna_vit']}/", *options])
    assert "different names, got qna_vit more than once" in str(again.exception)
