"""Exported files: logits equal PyTorch's, cost falls with K, and no partial file is left."""

import importlib.util
import json
import re

import numpy as np
import pytest
import timm
import torch
from support import papers_form, small_config
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from hf_visual_perceiver.cli.main import app
from hf_visual_perceiver.data.images import load_images, normalise, pixels_of_size
from hf_visual_perceiver.export.check import check_export, check_quantised
from hf_visual_perceiver.export.comparison import compare_exports, comparison_budgets
from hf_visual_perceiver.export.graph import export_onnx, export_program, export_timm, quantise, trace
from hf_visual_perceiver.export.runtime import METADATA_KEY, OnnxClassifier, load_exported
from hf_visual_perceiver.inference.loading import default_dataset, default_model, load_model
from hf_visual_perceiver.modeling import FAMILIES, Budget, VisualPerceiverForImageClassification, count_macs
from hf_visual_perceiver.modeling.modeling_visual_perceiver import clear_threshold
from hf_visual_perceiver.modeling.query_selection import cosine_similarities
from hf_visual_perceiver.training.folder import save_folder
from hf_visual_perceiver.utils import extras


pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def data():
    return load_images(default_dataset(), "test").subset(slice(0, 64))


@pytest.fixture(scope="module")
def pixels(data, trained):
    cfg = trained.config.timm_pretrained_cfg
    return normalise(pixels_of_size(data, range(12), (32, 32)), cfg["mean"], cfg["std"])


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The bundled checkpoint in ONNX."""
    path = tmp_path_factory.mktemp("onnx") / "nano.onnx"
    assert export_onnx(trained, path) < 1e-4
    return path


@pytest.fixture(scope="module")
def int8(exported):
    path = exported.with_name("int8.onnx")
    quantise(exported, path)
    return path


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    config = small_config(num_hidden_layers=1, num_labels=10)
    return VisualPerceiverForImageClassification(config).eval()


@pytest.fixture(scope="module")
def small_folder(small, tmp_path_factory):
    return save_folder(small, tmp_path_factory.mktemp("folders") / "small")


def fixed_at(path, K):
    classifier = OnnxClassifier(path)
    classifier.fixed = {"num_active_queries": K}
    return classifier


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_onnx_gives_pytorchs_logits_and_queries(exported, trained, pixels):
    session = ort.InferenceSession(exported)
    assert {i.name: i.type for i in session.get_inputs()} == {
        "pixel_values": "tensor(float)",
        "dqs_threshold": "tensor(float)",
        "num_active_queries": "tensor(int64)",
    }
    with torch.inference_mode():
        cosines = cosine_similarities(trained.visual_perceiver.read(pixels, 64))
        for K in (1, 2, 7, 16, 64):
            for threshold in (0.6, 0.8, 0.9, 1.0):
                t = clear_threshold(cosines, threshold)
                for images in (pixels, pixels[:1]):
                    expected = trained(images, num_active_queries=K, dqs_threshold=t)
                    inputs = {"pixel_values": images.numpy(), "dqs_threshold": np.asarray(t, np.float32)}
                    logits, active = session.run(
                        ["logits", "active_queries"], {**inputs, "num_active_queries": np.asarray(K)}
                    )
                    np.testing.assert_allclose(logits, expected.logits, rtol=0, atol=1e-4)
                    np.testing.assert_array_equal(active, expected.active_queries)
        assert len(set(trained(pixels, dqs_threshold=0.8).active_queries.sum(1).tolist())) > 1


def test_a_stem_with_levels_in_whole_and_up_to_a_budget(tmp_path):
    network, few = load_model(default_model()), Budget(num_active_queries=4)
    # Compared with PyTorch at several budgets while it is written.
    assert export_onnx(network, tmp_path / "all.onnx") < 1e-4
    assert export_onnx(network, tmp_path / "few.onnx", few) < 1e-4
    # Levels that no query of the budget reads are left out.
    assert (tmp_path / "few.onnx").stat().st_size < 0.8 * (tmp_path / "all.onnx").stat().st_size


def test_a_number_of_queries_that_does_not_exist_is_the_nearest(exported, pixels):
    session = ort.InferenceSession(exported)
    for given, used in ((0, 1), (-3, 1), (64, 64), (1000, 64)):
        inputs = {"pixel_values": pixels[:2].numpy(), "dqs_threshold": np.asarray(1, np.float32)}
        logits, active = session.run(None, {**inputs, "num_active_queries": np.asarray(given)})
        assert active.sum(1).tolist() == [used, used]
        assert np.isfinite(logits).all()


def test_metadata_is_what_a_page_needs(exported, trained):
    session = ort.InferenceSession(exported)
    facts = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
    cfg = trained.config.timm_pretrained_cfg
    assert facts["labels"] == trained.config.label_names
    assert (facts["mean"], facts["std"], facts["image_size"]) == (cfg["mean"], cfg["std"], [32, 32])
    assert (facts["num_queries"], facts["num_active_queries"]) == (64, None)
    assert (facts["default_num_active_queries"], facts["default_dqs_threshold"]) == (64, 1.0)
    text = exported.read_bytes()
    assert b".py" not in text  # no traces of the source, which hold paths
    assert str(exported.parent).encode() not in text


@pytest.mark.parametrize("fixed", [False, True])
def test_fewer_queries_cost_fewer_multiply_accumulates(small, fixed):
    x = torch.zeros(1, 3, 16, 16)
    dynamic = trace(small)
    for K in (2, 5, 12):
        module = (trace(small, Budget(num_active_queries=K)) if fixed else dynamic).module()
        knobs = (torch.tensor(1.0),) if fixed else (torch.tensor(1.0), torch.tensor(K))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(x, *knobs)
        config = small.config
        # The network's, and the cosines of K queries with each other.
        assert counter.get_total_flops() / 2 == count_macs(config, K) + K**2 * config.hidden_size
    assert count_macs(small.config, 2) < 0.6 * count_macs(small.config, 12)


def test_fixed_number_of_queries(small, small_folder, tmp_path):
    path = tmp_path / "k4.onnx"
    done = CliRunner().invoke(
        app, ["export", str(small_folder), "--budget", "K=4", "--output", str(path)], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "Largest difference from PyTorch's logits" in done.output
    assert names(tmp_path) == ["k4.onnx"]
    classifier = OnnxClassifier(path)
    assert [i.name for i in classifier.session.get_inputs()] == ["pixel_values", "dqs_threshold"]
    x = torch.randn(5, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(classifier(x).logits, small(x, num_active_queries=4).logits, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="to be 4, which is fixed in the graph, got 5"):
        classifier(x, num_active_queries=5)
    assert check_export(classifier, small, {"num_active_queries": 4}) < 1e-4


def test_the_other_selection_rule(tmp_path):
    config = small_config(num_hidden_layers=1, dqs_reference="kept")
    greedy = VisualPerceiverForImageClassification(config).eval()
    # The two rules must differ on what is compared.
    x, every = torch.randn(8, 3, 16, 16), VisualPerceiverForImageClassification(small_config(num_hidden_layers=1))
    every.load_state_dict(greedy.state_dict())
    with torch.inference_mode():
        cosines = cosine_similarities(greedy.visual_perceiver.read(x, 12))
        t = clear_threshold(cosines, float(cosines.flatten().quantile(0.7)))
        expected = greedy(x, dqs_threshold=t)
        assert not expected.active_queries.equal(every.eval()(x, dqs_threshold=t).active_queries)
    export_onnx(greedy, tmp_path / "kept.onnx")
    given = OnnxClassifier(tmp_path / "kept.onnx")(x, dqs_threshold=t)
    assert given.active_queries.equal(expected.active_queries)
    torch.testing.assert_close(given.logits, expected.logits, rtol=0, atol=1e-4)


def test_torch_export(small, tmp_path):
    assert export_program(small, tmp_path / "m.pt2") < 1e-4
    assert names(tmp_path) == ["m.pt2"]
    assert b".py" not in (tmp_path / "m.pt2").read_bytes()  # no traces of the source, which hold paths
    module = torch.export.load(tmp_path / "m.pt2").module()
    x = torch.randn(4, 3, 16, 16)
    with torch.inference_mode():
        logits, active = module(x, torch.tensor(1.0), torch.tensor(3))
        torch.testing.assert_close(logits, small(x, num_active_queries=3).logits, rtol=0, atol=1e-5)
    assert active.sum(1).tolist() == [3] * 4
    assert load_exported(tmp_path / "m.pt2").config.timm_model_args == small.config.timm_model_args


def test_timm_folder(trained, pixels, tmp_path):
    export_timm(trained, tmp_path / "timm")
    assert names(tmp_path / "timm") == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert "model_type" not in config
    assert "num_classes" not in config["model_args"]
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.inference_mode():
        expected = trained(pixels, num_active_queries=9).logits
        torch.testing.assert_close(model(pixels, num_active_queries=9), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="to be new or empty"):
        export_timm(trained, tmp_path / "timm")


def test_int8_resembles_and_is_small(int8, exported, trained, data):
    assert int8.stat().st_size < 0.4 * exported.stat().st_size
    assert 0 < check_quantised(OnnxClassifier(int8), trained) < 0.1
    result = compare_exports(
        trained,
        [exported, int8],
        data,
        [Budget(num_active_queries=8), Budget(), Budget(dqs_threshold=0.8)],
        batch_size=32,
        progress=False,
    )
    assert [row.budget.short(trained.config.knobs) for row in result.rows[::3]] == ["K=8", "full", "t=0.8"]
    for pytorch, onnx, quantised in zip(result.rows[::3], result.rows[1::3], result.rows[2::3], strict=True):
        assert (pytorch.form, pytorch.same_answer, pytorch.relative_time) == ("PyTorch", 1, 1)
        assert onnx.accuracy == pytorch.accuracy
        assert onnx.same_answer == 1
        assert onnx.used_mean == pytorch.used_mean
        assert 0.9 <= quantised.same_answer <= 1
        assert quantised.megabytes < onnx.megabytes
    other = VisualPerceiverForImageClassification(small_config()).eval()
    with pytest.raises(ValueError, match="Expected num_active_queries = 4, which is fixed in a file, got 5"):
        comparison_budgets(
            {"PyTorch": trained, "k4.onnx": fixed_at(exported, 4)}, trained.config, [Budget(num_active_queries=5)]
        )
    with pytest.raises(ValueError, match="Expected files with the same num_active_queries fixed"):
        comparison_budgets({name: fixed_at(exported, K) for name, K in (("a", 4), ("b", 5))}, trained.config)
    with pytest.raises(ValueError, match="got another label_names"):
        compare_exports(other, [exported], data, progress=False)


def test_budgets_to_compare_leave_out_knobs_at_their_full_value(exported):
    dvt = FAMILIES["dynamic_vision_transformer"].config()
    off = [float("inf")] * 2
    for fixed, name in (
        ({"max_exit": 1, "exit_thresholds": off}, "exit=1"),
        ({"max_exit": 3, "exit_thresholds": off}, "full"),
        ({"max_exit": 3, "exit_thresholds": [0.7, 0.8]}, "p=[0.7, 0.8]"),
    ):
        graph = OnnxClassifier(exported)
        graph.fixed, graph.inputs = fixed, []
        assert [b.short(dvt.knobs) for b in comparison_budgets({"PyTorch": None, "a.onnx": graph}, dvt)] == [name]
    config, graph = small_config(), fixed_at(exported, 12)
    wanted = [Budget(dqs_threshold=0.8), Budget(num_active_queries=12), Budget()]
    chosen = comparison_budgets({"PyTorch": None, "a.onnx": graph}, config, wanted)
    assert chosen == [Budget(dqs_threshold=0.8), Budget()]


def test_int8_on_the_command_line(small_folder, tmp_path):
    done = CliRunner().invoke(app, ["export", str(small_folder), "--int8", "--output", str(tmp_path / "m.onnx")])
    assert done.exit_code == 0, done.exception
    assert "of their standard deviation" in done.output
    assert names(tmp_path) == ["m.onnx"]
    assert load_exported(tmp_path / "m.onnx").precision == "int8"
    files = [str(tmp_path / "m.onnx"), "--model", str(small_folder), "--json", str(tmp_path / "c.json")]
    points = ["--budget", "K=3", "--budget", "t=0.5", "--split", "test[:40]", "--max-images", "40"]
    compared = CliRunner().invoke(app, ["compare-exports", *files, *points])
    assert compared.exit_code == 0, compared.exception
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert [row["form"] == "PyTorch" for row in rows] == [True, False, True, False]
    assert f"{100 * rows[1]['accuracy']:.2f} ±" in compared.output
    part = ["--split", "test[:40]", "--budget", "K=3", "--budget", "t=0.5", "--markdown"]
    written = CliRunner().invoke(app, ["compare-exports", *files, *part])
    assert written.exit_code == 0, written.exception
    header, rule, *lines = [line for line in written.output.splitlines() if line.startswith("|")]
    assert header.startswith("| setting | form | MB | accuracy (%) |")
    assert rule.count("|") == header.count("|")
    again = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in rows]  # the same images
    for line, row in zip(lines, again, strict=True):
        assert f"| {row['form']} | {row['megabytes']:.2f} | {100 * row['accuracy']:.2f} ±" in line


def test_a_wrong_graph_is_not_kept(small, tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"earlier")
    monkeypatch.setattr(
        "hf_visual_perceiver.modeling.modeling_visual_perceiver.keep_dissimilar",
        lambda similar, reference: ~similar.all(-1),
    )
    with pytest.raises(ValueError, match=r"Expected the exported (logits|graph) .* at K=\d+"):
        export_onnx(small, path)
    assert names(tmp_path) == ["m.onnx"]
    assert path.read_bytes() == b"earlier"
    with pytest.raises(ValueError, match=r"Expected the exported (logits|graph)"):
        export_program(small, tmp_path / "m.pt2")
    assert names(tmp_path) == ["m.onnx"]


def test_a_quantisation_that_ruins_the_model_is_not_kept(small, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_visual_perceiver.export.check.INT8_TOLERANCE", 1e-6)
    with pytest.raises(ValueError, match="quantising changes the answers"):
        export_onnx(small, tmp_path / "m.onnx", Budget(num_active_queries=2), int8=True)
    assert names(tmp_path) == []


def test_a_full_disk_leaves_nothing(small, tmp_path, monkeypatch):
    def full(*arguments, **more):
        (tmp_path / ".m.tmp.onnx").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnx.save", full)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(small, tmp_path / "m.onnx", Budget(num_active_queries=2))
    assert names(tmp_path) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(package, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == package else found(name))
    refused = CliRunner().invoke(app, ["export", papers_form(), "--output", str(tmp_path / "m.onnx")])
    assert isinstance(refused.exception, ImportError)
    expected = f"Expected {package} to be installed, from the extra `(export|cli)`: pip install 'hf-visual-perceiver"
    assert re.match(expected, str(refused.exception))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "tflite"], "--format to be one of onnx, torch-export, safetensors-timm, got 'tflite'"),
        (["--budget", "K=0"], r"an integer in \[1, 64\], got 0"),
        (["--budget", "K=65"], r"an integer in \[1, 64\], got 65"),
        (["--budget", "K=8", "--format", "safetensors-timm"], "with a graph"),
        (["--int8", "--format", "torch-export"], "--int8 with --format onnx, got 'torch-export'"),
        (["--output", "no/such/folder/m.onnx"], "a file name in an existing folder"),
        (["--output", "README.md/m.onnx"], "a file name in an existing folder"),
        (["--output", "m.txt"], "a file that ends in .onnx"),
        (["--format", "torch-export", "--output", "m.onnx"], "a file that ends in .pt2"),
        (["--format", "safetensors-timm", "--output", "tests"], "to be new or empty"),
    ],
)
def test_bad_input(arguments, message):
    refused = CliRunner().invoke(app, ["export", papers_form(), *arguments])
    assert refused.exit_code == 1
    with pytest.raises(ValueError, match=message):
        raise refused.exception


def test_folders_and_files_that_are_none(tmp_path):
    refused = CliRunner().invoke(app, ["export", str(tmp_path)])
    assert "Expected a folder or Hub id of a checkpoint" in str(refused.exception)
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    (tmp_path / "bad.pt2").write_bytes(b"not an archive")
    for name, message in (
        ("bad.onnx", "Cannot read .* as an ONNX file"),
        ("bad.pt2", "Cannot read .* as a torch.export file"),
        ("none.onnx", "does not exist"),
        ("bad.txt", "ends in .onnx or .pt2"),
    ):
        with pytest.raises(ValueError, match=message):
            load_exported(tmp_path / name)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    refused = CliRunner().invoke(app, ["export", papers_form(), "--output", str(tmp_path / "m.onnx")])
    assert "a writable folder" in str(refused.exception)
