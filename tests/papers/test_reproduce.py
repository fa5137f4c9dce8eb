"""The report on the paper: random subsets, selection, attention, and missing checkpoints."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from reproduce import CHECKPOINTS, main, write_report
from reproduce_measure import (
    measure,
    measure_random_subsets,
    measure_selection,
    read_checkpoints,
    reorder_queries,
)
from reproduce_sections import training_images
from rich.console import Console
from support import papers_form, small_config

from hf_visual_perceiver.cli.main import main as cli_main
from hf_visual_perceiver.data.images import ImageDataset, load_images, normalise
from hf_visual_perceiver.evaluation import paper
from hf_visual_perceiver.evaluation.attention_maps import average_attention, plot_attention_maps
from hf_visual_perceiver.modeling import Budget, VisualPerceiverForImageClassification
from hf_visual_perceiver.modeling.query_selection import select_queries
from hf_visual_perceiver.training.folder import save_folder


@pytest.fixture(scope="module")
def data(cifar10) -> ImageDataset:
    return load_images(cifar10, "test").subset(slice(0, 30))


def network(data, seed=0, **fields) -> VisualPerceiverForImageClassification:
    """A random network for the dataset's classes."""
    torch.manual_seed(seed)
    labels = dict(enumerate(data.label_names))
    fields = {
        "image_size": 32,
        "patch_size": 8,
        "id2label": labels,
        "label2id": {n: i for i, n in labels.items()},
    } | fields
    config = small_config(**{"num_labels": len(labels)} | fields)
    return VisualPerceiverForImageClassification(config).eval()


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """Three checkpoints, and a YAML that names them and some missing ones."""
    root = tmp_path_factory.mktemp("checkpoints")
    save_folder(network(data), root / "masking")
    save_folder(network(data, 1), root / "fixed")
    save_folder(network(data, 2, num_queries=4), root / "specialist")
    names = {"query_masking": "masking", "fixed_64": "fixed", "specialists": {4: "specialist", 1: "absent", 16: None}}
    (root / "all.yaml").write_text(yaml.safe_dump(names))
    return root


def pixels_of(data, model):
    cfg = model.config.timm_pretrained_cfg
    return normalise(data.images, cfg["mean"], cfg["std"])


@torch.no_grad()
def test_reordered_queries_are_a_subset_of_the_network(data):
    model = network(data)
    pixels, order = pixels_of(data, model), torch.randperm(12)
    reordered = reorder_queries(model, order)
    parts, keep = model.visual_perceiver, torch.zeros(len(data), 12, dtype=torch.bool)
    keep[:, order[:5]] = True
    subset = parts.decode(parts.process(parts.keep_queries(parts.read(pixels, 12), keep)))
    torch.testing.assert_close(reordered(pixels, num_active_queries=5).logits, model.head(subset), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(pixels, num_active_queries=5).logits, model.head(subset), atol=1e-3)
    torch.testing.assert_close(reordered(pixels).logits, model(pixels).logits, atol=1e-5, rtol=1e-5)


def test_random_subsets(data):
    model = network(data)
    rows, _ = measure_random_subsets(model, data, [1, 6, 12], seed=3, progress=False)
    again, _ = measure_random_subsets(model, data, [1, 6, 12], seed=3, progress=False)
    assert [row.accuracies for row in rows] == [row.accuracies for row in again]
    assert all(len(row.accuracies) == 5 for row in rows)
    assert rows[2].deviation == 0
    assert rows[0].deviation == pytest.approx(np.std(rows[0].accuracies, ddof=1))
    assert rows[0].deviation > 0


@torch.no_grad()
def test_selection_is_that_of_each_image(data):
    model = network(data)
    found = measure_selection(model, data, 0.9, example=17, batch_size=8)
    y = model.visual_perceiver.read(pixels_of(data, model), 12)
    keep = select_queries(y, 0.9)
    assert found.counts.tolist() == keep.sum(1).tolist()
    assert found.keep.tolist() == keep[17].tolist()
    expected = torch.nn.functional.cosine_similarity(y[17, :, None], y[17, None], dim=-1)
    np.testing.assert_allclose(found.similarities, expected.numpy(), atol=1e-5)


@torch.no_grad()
def test_average_attention(data):
    model = network(data, num_attention_heads=3, num_cross_attention_heads=2)
    pixels = pixels_of(data, model)
    maps = average_attention(model, pixels.split(8), Budget(num_active_queries=7))
    weights = model(pixels, num_active_queries=7, output_attentions=True).cross_attentions[0]
    np.testing.assert_allclose(maps.reshape(7, -1), weights.mean((0, 1)).numpy(), atol=1e-6)
    np.testing.assert_allclose(maps.sum((1, 2)), 1, atol=1e-5)
    with pytest.raises(ValueError, match="at least one image"):
        average_attention(model, [])


def test_the_report_has_everything_and_says_what_is_missing(data, folder, tmp_path):
    checkpoints = read_checkpoints(folder / "all.yaml")
    called = {"dataset": "a sample", "split": "test"}
    found = measure(
        checkpoints, data, 16, progress=False, robustness_images=4, robustness_severities=(3,), conditions=called
    )
    report = write_report(found, tmp_path / "out").read_text()
    for heading in (
        "Table 1",
        "Table 2",
        "Table 3",
        "Figures 7 and 8",
        "Figures 3, 4, 5 and 9",
        "Figure 10",
        "Robustness to common",
    ):
        assert re.search(rf"^## .*{heading}", report, re.MULTILINE), heading
    assert "**specialist 1** (no `absent`): K = 1 among" in report
    assert "Figure 9." in report
    assert "**specialist 16** (no folder is named)" in report
    assert "seed 0" in report
    assert "| paper | - | 12 x 192 | 6.18 | 64 | 179.2 |" in report
    assert "| specialist 4 | specialist, " in report
    pictures = set(re.findall(r"\(paper/(\w+\.png)\)", report))
    assert {"figure_2.png", "figure_3.png", "figure_4.png", "figure_10.png", "attention_specialist_4.png"} <= pictures
    assert {p.name for p in (tmp_path / "out" / "paper").glob("*.png")} == pictures
    for value in (*paper.SPECIALISTS.values(), *paper.RANDOM_SUBSETS.values(), *paper.QUERY_MASKING.values()):
        assert f"| {value:.2f} |" in report
    # Each measured number is in the report.
    for row in found.query_masking.rows:
        assert f"{100 * row.accuracy:.2f} ± {100 * row.standard_error:.2f}" in report
    for row in found.random_subsets:
        assert f"{100 * row.mean:.2f} ± {100 * row.deviation:.2f}" in report
    assert found.specialists[4].used_mean == 4
    numbers = json.loads((tmp_path / "out" / "paper" / "measurements.json").read_text())
    assert len(numbers["selection"]["counts"]) == len(data)
    assert numbers["robustness"]["conditions"]["images"] == 4
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("role", ["query_masking", "fixed_64", "specialist"])
def test_one_checkpoint_of_any_role_and_one_image_are_enough(role, data, folder, tmp_path):
    names = {"query_masking": {"query_masking": "masking"}, "fixed_64": {"fixed_64": "fixed"}}
    file = folder / f"{role}.yaml"
    file.write_text(yaml.safe_dump(names.get(role, {"specialists": {4: "specialist"}})))
    found = measure(read_checkpoints(file), data.subset(slice(0, 1)), progress=False)
    found.conditions |= {"dataset": "a sample", "split": "test"}
    report = write_report(found, tmp_path).read_text()
    assert ("Missing: no query_masking checkpoint" in report) == (role != "query_masking")
    assert (tmp_path / "paper" / "figure_2.png").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flagship: x", "Expected roles among query_masking, fixed_64, specialists in .*, got flagship"),
        ("- a", r"to name checkpoints by role .* got \['a'\]"),
        ("a: [", "Cannot read the checkpoints of"),
        ("specialists: {one: x}", "to map a number of queries to a folder"),
        ("query_masking: 3", "Expected a folder for query_masking in .*, got 3"),
        ("query_masking: absent", "Expected at least one checkpoint of .* to exist"),
        ("query_masking:", "Expected at least one checkpoint of .* to exist"),
    ],
)
def test_bad_yaml(text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_checkpoints(tmp_path / "c.yaml")
    with pytest.raises(ValueError, match="Cannot read the checkpoints"):
        read_checkpoints(tmp_path / "absent.yaml")


def test_checkpoints_that_do_not_fit(data, folder, tmp_path):
    checkpoints = read_checkpoints(folder / "all.yaml")
    zebras = dataclasses.replace(data, label_names=["zebra", *data.label_names[1:]])
    with pytest.raises(ValueError, match=r"query_masking checkpoint does not fit the dataset: .* got zebra"):
        measure(checkpoints, zebras, progress=False)
    with pytest.raises(ValueError, match=r"index of an image in \[0, 30\), got 30"):
        measure(checkpoints, data, example=30, progress=False)
    (folder / "many.yaml").write_text("specialists: {5: specialist}")
    with pytest.raises(ValueError, match="specialist of 5 queries to have at least as many, got 4"):
        measure(read_checkpoints(folder / "many.yaml"), data, progress=False)


def test_the_yaml_that_ships_names_a_checkpoint():
    assert read_checkpoints(CHECKPOINTS).query_masking


def run_main(run, arguments, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", *map(str, arguments)])
    monkeypatch.setattr("reproduce.messages", Console(stderr=True, width=300))
    with pytest.raises(SystemExit) as stop:
        run()
    return stop.value.code


def test_command(data, folder, tmp_path, monkeypatch, capsys):
    sample = tmp_path / "images" / "test"
    for i in range(20):
        (sample / data.label_names[data.labels[i]]).mkdir(parents=True, exist_ok=True)
        data.image(i).save(sample / data.label_names[data.labels[i]] / f"{i}.png")
    # The names of an imagefolder are in their own order, and matched.
    options = ["--config", folder / "all.yaml", "--dataset", tmp_path / "images", "--device", "cpu"]
    assert run_main(main, [*options, "--output-dir", tmp_path / "out"], monkeypatch) == 0
    output = capsys.readouterr()
    assert "missing: specialist 1, absent" in output.err
    report = (tmp_path / "out" / "paper.md").read_text()
    assert "20 images of images, split test" in report
    file = tmp_path / "file"
    file.write_text("")
    assert run_main(main, [*options, "--output-dir", file], monkeypatch) == 1
    assert "error: Expected a folder for the report" in capsys.readouterr().err


def test_attention_maps_command(data, folder, tmp_path, monkeypatch, capsys):
    data.image(0).save(tmp_path / "image.png")
    out, result = tmp_path / "maps.png", tmp_path / "maps.json"
    command = ["attention-maps", "--model", folder / "masking", "--output", out]
    arguments = [*command, tmp_path / "image.png", "--json", result, "--budget", "K=3"]
    assert run_main(cli_main, arguments, monkeypatch) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    maps = np.array(json.loads(result.read_text())["maps"])
    model = network(data)
    expected = average_attention(model, [pixels_of(data, model)[:1]], Budget(num_active_queries=3))
    np.testing.assert_allclose(maps, expected, atol=1e-5)
    for more, message in (
        (["--budget", "K=13"], "integer in [1, 12], got 13"),
        ([tmp_path / "image.png", "--dataset", "x"], "either images or --dataset, got both"),
        (["--output", tmp_path / "maps.txt"], "Expected a plot's file to end in"),
        ([tmp_path / "absent.png"], "Cannot read"),
    ):
        capsys.readouterr()
        assert run_main(cli_main, [*command, *more], monkeypatch) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 5])
def test_any_number_of_maps_can_be_drawn(count, tmp_path):
    plot_attention_maps(np.full((count, 2, 3), 1 / 6), tmp_path / "m.png")
    assert (tmp_path / "m.png").is_file()


def test_images_of_all_stages_of_a_training_count(tmp_path):
    facts = json.loads(Path(papers_form(), "training.json").read_text())
    facts["recipe"] |= {"steps": 1_000, "batch_size": 500}
    facts.pop("earlier_training", None)
    (tmp_path / "training.json").write_text(json.dumps(facts))
    assert training_images(tmp_path) == 500_000
    (tmp_path / "training.json").write_text(json.dumps({**facts, "earlier_training": facts}))
    assert training_images(tmp_path) == 1_000_000
    (tmp_path / "training.json").write_text("{}")
    with pytest.raises(ValueError, match=r"training\.json to be a valid file"):
        training_images(tmp_path)
