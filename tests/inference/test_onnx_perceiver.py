"""The ONNX Runtime engine: its logits equal the model's at every budget, and skipped queries are not computed."""

import copy
import json
import multiprocessing
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support import PATIENCE, REPOSITORY, small_config

from hf_visual_perceiver.cli import main as cli
from hf_visual_perceiver.inference import onnx_graphs, onnx_perceiver
from hf_visual_perceiver.inference.cascade import Cascade
from hf_visual_perceiver.inference.onnx_graphs import Graph, Sessions, read_graphs, write_graphs
from hf_visual_perceiver.inference.onnx_perceiver import CallCost, OnnxPerceiver
from hf_visual_perceiver.modeling import Budget, VisualPerceiverForImageClassification


FORMS = {
    "the paper's": {},
    "stem, block-causal": {
        "stem": "conv",
        "stem_widths": [[4], [6], [8]],
        "trunk_attention": "block_causal",
        "num_cross_attention_heads": 2,
    },
    "levels": {
        "stem": "conv",
        "stem_widths": [[4, 8], [8], [12]],
        "level_starts": [2, 6],
        "level_widths": [4, 2],
        "decoder_reads": "last_block",
        "trunk_attention": "block_causal",
    },
}
POINTS = [
    (1, None),
    (2, None),
    (7, None),
    (12, None),
    (12, 0.9),
    (12, 0.97),
    (7, 0.8),
    (12, -1.0),
    (12, 1.0),
]


@pytest.fixture(scope="module", params=FORMS.values(), ids=FORMS)
def both(request, tmp_path_factory):
    """A model and its engine; graphs are cached for the tests of this file only."""
    torch.manual_seed(0)
    model = VisualPerceiverForImageClassification(small_config(**request.param)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return model, OnnxPerceiver(model.visual_perceiver, model.head, num_threads=1)


def graph_folder(tmp_path_factory):
    """A folder for graphs, shared by this test run, which is also set as the cache for exported graphs."""
    return tmp_path_factory.getbasetemp() / "graphs"


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            onnx_perceiver,
            "cache_folder",
            lambda architecture: graph_folder(tmp_path_factory) / onnx_graphs.graphs_key(architecture),
        )
        yield


@torch.no_grad()
@pytest.mark.parametrize("t", [None, 0.9])
def test_a_number_of_queries_for_each_image(both, images, t):
    model, engine = both
    K = torch.arange(len(images)) % 12 + 1
    expected = model(images, num_active_queries=K, dqs_threshold=t)
    logits, active = engine(images, K, t)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(active, expected.active_queries)


@torch.no_grad()
@pytest.mark.parametrize(("K", "t"), POINTS)
def test_equals_the_model_and_one_image_at_a_time(both, images, K, t):
    model, engine = both
    expected = model(images, num_active_queries=K, dqs_threshold=t)
    logits, active = engine(images, K, t)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(active, expected.active_queries)
    alone = torch.cat([engine(image[None], K, t)[0] for image in images])
    torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_any_number_of_calls(both, images, monkeypatch):
    model, engine = both
    expected = model(images, dqs_threshold=0.9).logits
    monkeypatch.setattr(onnx_perceiver, "TOKENS_PER_CALL", 30)
    monkeypatch.setattr(onnx_perceiver, "WINDOW", 3)
    torch.testing.assert_close(engine(images, 12, 0.9)[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(engine(images, 12)[0], model(images).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("padding", [0.0, 1e9], ids=["pads", "never pads"])
def test_dropped_queries_go_through_no_trunk(both, images, monkeypatch, padding):
    model, engine = both
    expected = model(images, dqs_threshold=0.9)
    rows = []
    run = type(engine.sessions).run

    def counting(self, stage, outputs=None, **inputs):
        if stage == "trunk":
            rows.append(inputs["keep"])
        return run(self, stage, outputs, **inputs)

    engine.cost = CallCost(call=1.0 - min(padding, 1.0), image=(0.0, padding, 0.0))
    monkeypatch.setattr(type(engine.sessions), "run", counting)
    logits, _ = engine(images, 12, 0.9)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    kept = expected.active_queries.sum().item()
    assert sum(keep.sum() for keep in rows) == kept < 8 * 12
    if padding:
        assert sum(keep.size for keep in rows) == kept
    else:
        assert len(rows) == 1  # one call for all, padded to the longest


@torch.no_grad()
def test_going_on_equals_one_pass(both, images):
    model, engine = both
    state = engine.start(images)
    for K in (1, 3, 4, 4, 10, 12):
        output, alone = state.extend(K), model(images, num_active_queries=K)
        torch.testing.assert_close(output.logits, alone.logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(output.active_queries, alone.active_queries)
    for wrong in (4, 13):
        with pytest.raises(ValueError, match=f"got {wrong}"):
            state.extend(wrong)


@torch.no_grad()
def test_going_on_reads_new_queries_alone_and_of_images_that_are_left(both, images, monkeypatch):
    _, engine = both
    asked, levels = [], []
    run = type(engine.sessions).run

    def noting(self, stage, outputs=None, **inputs):
        if "query" in inputs and stage not in ("trunk", "extend"):
            asked.append((len(next(iter(inputs.values()))), inputs["query"].tolist()))
        if stage.startswith("level"):
            levels.append((stage, len(inputs["x"])))
        return run(self, stage, outputs, **inputs)

    monkeypatch.setattr(type(engine.sessions), "run", noting)
    state = engine.start(images)
    assert not asked
    state.extend(2)
    left = state[torch.tensor([1, 4, 6])]
    for K in (7, 7, 8):
        left.extend(K)
    state.extend(12)  # what is left goes its own way
    by_images = {n: [query for images, queries in asked if images == n for query in queries] for n in (8, 3)}
    assert by_images == {8: list(range(12)), 3: [2, 3, 4, 5, 6, 7]}
    # Each level of the stem is computed once for the images that ask for it.
    deeper = [(f"level_{i}", n) for n in (3, 8) for i in range(1, engine.config.num_levels)]
    assert levels == [("level_0", 8), *deeper]


@torch.no_grad()
@pytest.mark.parametrize("mirror", [False, True])
def test_a_cascade(both, images, mirror):
    thresholds = [0.4, 0.5, 2.0][: 2 + mirror]
    stages = [Budget(num_active_queries=2), Budget(num_active_queries=4), Budget()]
    expected, output = (Cascade(model, stages, thresholds, mirror)(images) for model in both)
    assert torch.equal(output.stage, expected.stage)
    assert torch.equal(output.used, expected.used)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_copies_pickles_and_threads(both, images):
    _, engine = both
    expected = engine(images, 12, 0.95)[0]
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert torch.equal(other(images, 12, 0.95)[0], expected)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: engine(images, 12, 0.95)[0], range(8)))
    assert all(torch.equal(answer, expected) for answer in answers)


def _first_logit(engine, images):
    return float(engine(images, 12)[0][0, 0])


def test_after_a_fork(both, images):
    _, engine = both
    expected = _first_logit(engine, images)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_first_logit, (engine, images)).get(timeout=PATIENCE) == pytest.approx(expected)


def test_is_a_snapshot_without_gradients_or_autocast(both, images):
    model, engine = both
    before = engine(images, 12)[0]
    changed = copy.deepcopy(model)
    other = OnnxPerceiver(changed.visual_perceiver, changed.head, num_threads=1)
    with torch.no_grad():
        changed.head.weight.mul_(2)
    assert torch.equal(other(images, 12)[0], before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = engine(images.requires_grad_(), 12)[0]
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    assert torch.equal(logits, before)


@torch.no_grad()
def test_eight_bits(both, images):
    model, _ = both
    engine = OnnxPerceiver(model.visual_perceiver, model.head, num_threads=1, int8=True)
    assert sum(len(graph.content) for graph in engine.sessions.graphs.values()) > 5000
    expected, logits = model(images).logits, engine(images, 12)[0]
    # Of a network of random weights, whose rounding errors nothing has made small.
    error = (logits - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.35


@torch.no_grad()
def test_eight_bits_of_a_trained_network(trained):
    images = torch.load(REPOSITORY / "tests/modeling/golden_nano.pt", weights_only=True)["images"]
    expected = trained(images).logits
    logits = trained.optimize_for_inference(int8=True)(images).logits
    assert 1e-4 < (logits - expected).norm() / expected.norm() < 0.1


class TestBadInput:
    """Bad input is refused with a message, before an export starts."""

    @pytest.fixture
    def optimized(self, both):
        return both[0].optimize_for_inference(num_threads=1)

    @pytest.fixture
    def no_export(self, monkeypatch):
        monkeypatch.setattr(onnx_perceiver, "graphs_of", lambda *_: pytest.fail("exported first"))

    @pytest.mark.parametrize("threads", [0, -1, 1.5, True])
    def test_threads_that_make_no_sense(self, both, threads, no_export):
        model, _ = both
        with pytest.raises(ValueError, match="`num_threads`"):
            OnnxPerceiver(model.visual_perceiver, model.head, num_threads=threads)

    @pytest.mark.parametrize("int8", [False, True])
    def test_without_onnxruntime(self, both, monkeypatch, no_export, int8):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(ImportError, match=r"Expected onnxruntime to be installed.*pip install onnxruntime"):
            both[0].optimize_for_inference(int8=int8)

    def test_without_onnx(self, both, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnx", None)
        with pytest.raises(ImportError, match="Expected onnx to be installed for quantising"):
            both[0].optimize_for_inference(int8=True)

    def test_the_command_line_says_what_to_install(self, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        monkeypatch.setattr("sys.argv", ["visual-perceiver", "predict", str(REPOSITORY / "docs/cat.png"), "--fast"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 1
        error = capsys.readouterr().err.strip().splitlines()
        assert "Expected onnxruntime to be installed" in error[-1]
        assert not any("Traceback" in line for line in error)

    def test_images_elsewhere(self, optimized, images):
        for read in (optimized, optimized.start):
            with pytest.raises(ValueError, match="Expected images on cpu, where the engine computes, got meta"):
                read(images.to("meta"))

    @pytest.mark.parametrize("shape", [(8, 3, 16, 20), (0, 3, 16, 16), (8, 1, 16, 16), (3, 16, 16)])
    def test_images_of_another_shape(self, optimized, shape):
        for read in (optimized, optimized.start):
            with pytest.raises(ValueError, match="Expected"):
                read(torch.zeros(shape))

    @pytest.mark.parametrize("K", [0, 13, -1, 2.5, True, "3"])
    def test_queries_out_of_range(self, optimized, images, K):
        message = rf"`num_active_queries` to be an integer in \[1, 12\], got {K!r}"
        with pytest.raises(ValueError, match=message):
            optimized(images, num_active_queries=K)
        with pytest.raises(ValueError, match=message):
            optimized.start(images).extend(K)

    @pytest.mark.parametrize("t", [-2, float("nan"), "0.5"])
    def test_thresholds_out_of_range(self, optimized, images, t):
        with pytest.raises(ValueError, match="`dqs_threshold`"):
            optimized(images, dqs_threshold=t)


@torch.no_grad()
def test_the_greedy_rule(images, tmp_path):
    model = VisualPerceiverForImageClassification(small_config(dqs_reference="kept", num_hidden_layers=1)).eval()
    engine = OnnxPerceiver(model.visual_perceiver, model.head, num_threads=1)
    expected = model(images, dqs_threshold=0.9)
    logits, active = engine(images, 12, 0.9)
    assert torch.equal(active, expected.active_queries)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)


class TestGraphs:
    GRAPHS = {"read": Graph(b"abc", ("w",)), "trunk": Graph(b"defg", ())}

    def test_are_read_as_written(self, tmp_path):
        write_graphs(tmp_path / "graphs", "key", self.GRAPHS)
        assert read_graphs(tmp_path / "graphs", "key", self.GRAPHS) == self.GRAPHS

    @pytest.mark.parametrize("damage", ["another key", "other stages", "a changed file", "a missing file", "no index"])
    def test_others_are_not_taken(self, tmp_path, damage):
        write_graphs(tmp_path, "key", self.GRAPHS)
        key, stages = "key", dict(self.GRAPHS)
        if damage == "another key":
            key = "other"
        elif damage == "other stages":
            stages.pop("read")
        elif damage == "a changed file":
            (tmp_path / "trunk.onnx").write_bytes(b"defh")
        elif damage == "a missing file":
            (tmp_path / "trunk.onnx").unlink()
        else:
            (tmp_path / "graphs.json").write_text("{")
        assert read_graphs(tmp_path, key, stages) is None

    def test_are_needed_no_longer_once_read(self, both, images, tmp_path, monkeypatch):
        model, engine = both
        monkeypatch.setattr(onnx_perceiver, "SHIPPED", tmp_path)
        key = onnx_graphs.graphs_key(onnx_perceiver.architecture_of(model.config, 5))
        write_graphs(tmp_path / key, key, engine.sessions.graphs)
        monkeypatch.setattr(onnx_graphs, "export_stage", lambda stage: pytest.fail("exported"))
        again = OnnxPerceiver(model.visual_perceiver, model.head, num_threads=1)
        shutil.rmtree(tmp_path / key)
        torch.testing.assert_close(again(images, 12, 0.95)[0], engine(images, 12, 0.95)[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(again)(images, 7)[0], engine(images, 7)[0], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("damage", ["another family", "another weight", "a list", "no stages", "cut off", "empty"])
    def test_damaged_ones_are_exported_anew(self, both, images, tmp_path, monkeypatch, damage):
        model, engine = both
        key = onnx_graphs.graphs_key(onnx_perceiver.architecture_of(model.config, 5))
        write_graphs(tmp_path, key, engine.sessions.graphs)
        file = tmp_path / "graphs.json"
        index = json.loads(file.read_text())
        if damage == "another family":
            index["key"] = "0" * 32
        elif damage == "another weight":
            index["stages"]["read"]["weights"][0] = "layers.0.weight"
        elif damage == "a list":
            index = [index]
        elif damage == "no stages":
            index["stages"] = None
        text = json.dumps(index)
        file.write_text({"cut off": text[:99], "empty": ""}.get(damage, text))
        monkeypatch.setattr(onnx_perceiver, "cache_folder", lambda architecture: tmp_path)
        exports = iter(engine.sessions.graphs.values())
        monkeypatch.setattr(onnx_graphs, "export_stage", lambda stage: next(exports))
        again = OnnxPerceiver(model.visual_perceiver, model.head, num_threads=1)
        assert next(exports, None) is None
        torch.testing.assert_close(again(images, 12)[0], engine(images, 12)[0], rtol=1e-5, atol=1e-5)
        assert read_graphs(tmp_path, key, engine.sessions.graphs) == engine.sessions.graphs

    @pytest.mark.parametrize("damage", ["a newer opset", "a newer format", "no graph"])
    def test_one_that_onnxruntime_does_not_take(self, both, images, damage):
        import onnx

        _, engine = both
        graph = engine.sessions.graphs["read"]
        proto = onnx.load_from_string(graph.content)
        if damage == "a newer opset":
            proto.opset_import[0].version = 99
        else:
            proto.ir_version = 99
        content = b"no graph" if damage == "no graph" else proto.SerializeToString()
        sessions = Sessions({"read": Graph(content, graph.weights)}, {}, num_threads=1)
        sessions.weights = engine.sessions.weights
        with pytest.raises(ValueError, match=r"Expected the graph of stage read to load in onnxruntime \d.*, got: "):
            sessions.run("read", tokens=images.numpy(), query=np.arange(3))

    def test_hold_no_weights_and_serve_other_weights(self, both, images):
        model, engine = both
        for name, graph in engine.sessions.graphs.items():
            if name == "select":
                assert not graph.weights
                continue
            assert any(name.startswith("visual_perceiver.cross_attention.") for name in graph.weights)
        torch.manual_seed(5)
        other = VisualPerceiverForImageClassification(model.config).eval()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(onnx_perceiver, "graphs_of", lambda stages, *_: engine.sessions.graphs)
            again = OnnxPerceiver(other.visual_perceiver, other.head, num_threads=1)
        with torch.no_grad():
            torch.testing.assert_close(again(images, 12)[0], other(images).logits, rtol=1e-4, atol=1e-4)
            assert not np.allclose(again(images, 12)[0], engine(images, 12)[0])
