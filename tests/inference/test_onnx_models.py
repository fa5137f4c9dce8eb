"""The ONNX Runtime engines of the other families: outputs equal the model's at every budget, and saved work stays saved."""

import copy
import math
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from hf_visual_perceiver.cli import main as cli
from hf_visual_perceiver.data.images import load_images
from hf_visual_perceiver.data.sample_images import write_sample_images
from hf_visual_perceiver.evaluation.evaluate import int8_accuracy
from hf_visual_perceiver.inference import onnx_graphs, onnx_models
from hf_visual_perceiver.inference.loading import default_dataset
from hf_visual_perceiver.modeling import FAMILIES, Budget
from hf_visual_perceiver.modeling.elastic import default_preprocessing
from hf_visual_perceiver.modeling.static_classifier import StaticClassifier
from hf_visual_perceiver.training.folder import save_folder


DVT = {
    "patches": [[16, 16, 0], [11, 10, 0], [8, 8, 0]],
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
}
PERCEIVER = {
    "num_frequency_bands": 3,
    "num_queries": 3,
    "hidden_size": 24,
    "num_blocks": 2,
    "num_cross_attends": 2,
    "num_self_attends_per_block": 1,
}
MODELS = {  # model type, fields of the config, and budgets
    "dvt": ("dynamic_vision_transformer", DVT, [{"max_exit": 1}, {}, {"exit_thresholds": 0.25}]),
    "dvt, no reuse": ("dynamic_vision_transformer", {**DVT, "feature_reuse": False, "relation_reuse": False}, [{}]),
    "lookupvit": (
        "lookupvit",
        {"hidden_size": 24, "patch_size": 8, "num_hidden_layers": 1, "max_compressed_size": 3},
        [{"compressed_size": 1}, {"compressed_size": [1, 3]}, {}],
    ),
    "lookupvit, one classifier": (
        "lookupvit",
        {
            "hidden_size": 24,
            "patch_size": 8,
            "num_hidden_layers": 1,
            "classify_with": "compressed",
            "max_compressed_size": 2,
        },
        [{}],
    ),
    "perceiver": ("iterative_perceiver", PERCEIVER, [{"num_active_queries": 1}, {"num_iterations": 1}, {}]),
    "perceiver io, convolution": (
        "iterative_perceiver",
        {**PERCEIVER, "decoder_type": "query", "num_cross_attends": 1, "inputs": "conv", "stem_channels": 8},
        [{"num_active_queries": 2, "num_iterations": 1}],
    ),
    "qna": (
        "qna_vit",
        {
            "hidden_sizes": [12, 24],
            "local_depths": [0, 1],
            "qna_depths": [1, 0],
            "qna_heads": [2, 4],
            "local_heads": [2, 2],
            "window_sizes": [4, 4],
        },
        [{}],
    ),
    "static": (None, {"output_stride": 8, "channels": [8, 8, 8, 8]}, [{}]),
}
ONE_OF_EACH = ["dvt", "lookupvit", "perceiver", "qna", "static"]


def create(name):
    """A small classifier of CIFAR-10's images, with random weights that give different answers to different images."""
    model_type, fields, _ = MODELS[name]
    labels = load_images(default_dataset(), "test").label_names
    labelled = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    torch.manual_seed(0)
    if model_type is None:
        cfg = {**default_preprocessing(32), "input_size": [3, 32, 32]}
        config = TimmWrapperConfig(architecture="resnet18", model_args=fields, pretrained_cfg=cfg, **labelled)
        return StaticClassifier(TimmWrapperForImageClassification(config))
    family = FAMILIES[model_type]
    model = family.classifier(family.config(**fields, **labelled, initializer_range=0.2)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Graphs are cached for the tests of this file only."""
    folder = tmp_path_factory.mktemp("graphs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_models, "cache_folder", lambda of: folder / onnx_graphs.graphs_key(of))
        yield


@pytest.fixture(scope="module")
def both():
    """A model and its engine, by name; made once."""
    made = {}

    def get(name):
        if name not in made:
            model = create(name)
            made[name] = model, model.optimize_for_inference(num_threads=1)
        return made[name]

    return get


@pytest.fixture
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def assert_alike(output, expected):
    """All fields of the outputs are equal, the floating-point ones to 1e-4."""
    assert type(output) is type(expected)
    assert list(output) == list(expected)
    for given, wanted in zip(output.to_tuple(), expected.to_tuple(), strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_model_at_every_budget(both, images, name):
    model, fast = both(name)
    for knobs in MODELS[name][2]:
        for pixels in (images, images[:1]):
            assert_alike(fast(pixels, **knobs), model(pixels, **knobs))
        assert (fast.config.count_macs(Budget(**knobs), fast(images, **knobs)) > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_exits_receive_the_images_that_are_not_sure(both, images, monkeypatch, seed):
    model, fast = both("dvt")
    thresholds = []
    for logits in model(images).exit_logits[:2]:  # between the images, so that rounding cannot decide
        likely = logits.softmax(-1).amax(-1).sort().values
        place = torch.randint(1, 6, (), generator=torch.Generator().manual_seed(seed))
        thresholds.append(((likely[place - 1] + likely[place]) / 2).item())
    expected = model(images, exit_thresholds=thresholds)
    rows, run = [], type(fast.engine.sessions).run

    def counting(self, stage, outputs=None, **inputs):
        rows.append((stage, {len(x) for x in inputs.values()}))
        return run(self, stage, outputs, **inputs)

    monkeypatch.setattr(type(fast.engine.sessions), "run", counting)
    output = fast(images, exit_thresholds=thresholds)
    going_on = [(expected.exits > i).sum().item() for i in range(3)]
    assert going_on[0] > going_on[1] > 0
    assert rows == [(f"exit_{i}", {n}) for i, n in enumerate(going_on) if n]
    assert_alike(output, expected)
    for i in range(6):
        alone = fast(images[i, None], exit_thresholds=thresholds)
        torch.testing.assert_close(alone.logits, output.logits[i, None], rtol=1e-4, atol=1e-5)
        assert alone.exits == output.exits[i]
    rows.clear()
    assert fast(images, exit_thresholds=0.0).exits.tolist() == [1] * 6
    assert fast(images, max_exit=1, exit_thresholds=math.inf).exits.tolist() == [1] * 6
    assert {stage for stage, _ in rows} == {"exit_0"}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("dvt_nano_32", {"exit_thresholds": 0.11}),
        ("lookupvit_nano_patch4_32", {"compressed_size": 3}),
        ("perceiver_nano_32", {"num_iterations": 1}),
        ("qna_vit_nano_32", {}),
    ],
)
def test_timms_models(images, name, knobs):
    model = timm.create_model(name, num_classes=10, initializer_range=0.1).eval()
    backend = "onnxruntime" if name.startswith("perceiver") else "torch"  # an export takes seconds
    fast = model.optimize_for_inference(backend=backend)
    torch.testing.assert_close(fast(images, **knobs), model(images, **knobs), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="num_classes"):
        timm.create_model(name, num_classes=0).optimize_for_inference()


@torch.no_grad()
def test_a_grid_for_each_image(both, images):
    model, fast = both("lookupvit")
    sides = torch.tensor([3, 1, 1, 3, 1, 3])
    assert_alike(fast(images, compressed_size=sides), model(images, compressed_size=sides))
    with pytest.raises(ValueError, match="Expected `compressed_size` of 6 images, got 2"):
        fast(images, compressed_size=sides[:2])


@torch.no_grad()
def test_the_configs_budget_is_the_default(both, images):
    model = copy.deepcopy(both("lookupvit")[0])
    model.config.compressed_size = 1
    fast = model.optimize_for_inference()
    assert fast.engine.sessions.graphs.keys() == {"grid=1"}
    assert fast(images).tokens.tolist() == [1] * 6
    assert_alike(fast(images), model(images))


def test_graphs_are_made_in_any_mode(both, images):
    model = both("perceiver")[0]
    with torch.no_grad():
        expected = model(images, num_active_queries=1)
    fresh = model.optimize_for_inference()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_models, "graphs_of", lambda stages, *_: onnx_graphs.graphs_of(stages, {}, []))
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            output = fresh(images, num_active_queries=1)
    assert_alike(output, expected)
    assert not fresh(images.requires_grad_()).logits.requires_grad


def test_copies_pickles_and_threads(both, images):
    for name in ("dvt", "lookupvit"):
        _, fast = both(name)
        budgets = [{}, MODELS[name][2][0]]
        expected = [fast(images, **knobs).logits for knobs in budgets]
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            other.engine.sessions.graphs.clear()  # also what makes graphs is copied
            assert all(map(torch.equal, (other(images, **knobs).logits for knobs in budgets), expected))
        fresh = copy.deepcopy(fast)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda i: fresh(images, **budgets[i % 2]).logits, range(8)))  # noqa: B023
        assert all(torch.equal(answer, expected[i % 2]) for i, answer in enumerate(answers))


@torch.no_grad()
def test_is_a_snapshot(both, images):
    model = copy.deepcopy(both("lookupvit")[0])
    fast = model.optimize_for_inference()
    before = fast(images).logits
    model.head.weight.mul_(2)
    assert torch.equal(fast(images).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dvt", "lookupvit"])
def test_eight_bits(both, images, name):
    model = both(name)[0]
    expected, logits = model(images).logits, model.optimize_for_inference(int8=True)(images).logits
    assert 1e-4 < (logits - expected).norm() / expected.norm() < 0.2


@torch.no_grad()
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_models_own_modules_in_any_dtype(both, images, name):
    model = both(name)[0]
    assert_alike(model.optimize_for_inference(backend="torch")(images), model(images))
    fast, half = model.optimize_for_inference(torch.bfloat16), copy.deepcopy(model).bfloat16()
    assert fast.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.float16):
        logits = fast(images).logits
    assert torch.equal(logits, half(images.bfloat16()).logits)


@torch.no_grad()
def test_cached_graphs_serve_other_weights(both, images, monkeypatch):
    both("lookupvit")[1](images)
    monkeypatch.setattr(onnx_graphs, "export_stage", lambda stage: pytest.fail("exported"))
    other = create("lookupvit")
    for p in other.parameters():
        p.add_(0.1 * torch.randn_like(p))
    assert_alike(other.optimize_for_inference()(images), other(images))
    monkeypatch.setattr(onnx_models, "code_hash", lambda: "the code has changed")
    with pytest.raises(pytest.fail.Exception, match="exported"):
        other.optimize_for_inference()


class TestBadInput:
    @pytest.mark.parametrize("name", ONE_OF_EACH)
    def test_knobs_and_images(self, both, images, name):
        _, fast = both(name)
        for knob in fast.config.knobs.values():
            for value in (0, "x", True, 99) if knob != "exit_thresholds" else ("x", [0.1] * 7, float("nan")):
                with pytest.raises(ValueError, match=knob):
                    fast(images, **{knob: value})
        with pytest.raises(ValueError, match="labels"):
            fast(images, labels=torch.zeros(6, dtype=torch.long))
        for pixels in (images[:, :1], images[..., :8], images[0], images[:0], images.int(), images.to("meta")):
            with pytest.raises(ValueError, match="Expected"):
                fast(pixels)
        with pytest.raises(RuntimeError, match="cannot be moved"):
            fast.half()

    def test_settings(self, both, monkeypatch):
        model = both("qna")[0]
        monkeypatch.setattr(onnx_models, "graphs_of", lambda *_: pytest.fail("exported first"))
        for settings, message in (
            ({"num_threads": 0}, "`num_threads` to be an integer of at least 1, got 0"),
            ({"backend": "tensorrt"}, "`backend` among torch, onnxruntime, got 'tensorrt'"),
            ({"backend": "torch", "int8": True}, "no int8 with `backend` 'torch'"),
            ({"backend": "onnxruntime", "dtype": torch.bfloat16}, "float32 on a CPU for `backend` 'onnxruntime'"),
        ):
            with pytest.raises(ValueError, match=message):
                model.optimize_for_inference(**settings)
        with pytest.raises(ValueError, match="Expected weights in memory"):
            copy.deepcopy(model).to("meta").optimize_for_inference()

    @pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
    def test_without_a_package(self, both, monkeypatch, package):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setattr(onnx_models, "code_hash", lambda: "no graphs are cached for this")
        with pytest.raises(ImportError, match=f"Expected .*{package}.* to be installed"):
            both("qna")[0].optimize_for_inference()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_commands(name, tmp_path, monkeypatch, capsys):
    model = create(name)
    if name == "static":
        folder = tmp_path / "model"
        model.network.save_pretrained(folder)
    else:
        folder = save_folder(model, tmp_path / "model")
    used, call = [], onnx_models.OnnxModel.run_stage
    monkeypatch.setattr(
        onnx_models.OnnxModel, "run_stage", lambda self, stage, **x: used.append(stage) or call(self, stage, **x)
    )
    monkeypatch.setattr("hf_visual_perceiver.benchmark.benchmark.matmul_peak", lambda *_: 1.0)
    pictures, budget = tmp_path / "pictures", Budget(**MODELS[name][2][0])
    write_sample_images(pictures, 2)
    point = ["--budget", budget.short(model.config.knobs)]
    for arguments, said in (
        (["predict", pictures, "--model", folder, "--fast", *point], "label"),
        (["evaluate", folder, "--fast", "--max-images", 8, *point], "form optimized"),
        (
            [
                "benchmark",
                folder,
                "--batch-size",
                1,
                "--repetitions",
                1,
                "--single-calls",
                1,
                "--dtype",
                "float32",
                *point,
            ],
            "optimized float32",
        ),
    ):
        used.clear()
        monkeypatch.setattr("sys.argv", ["visual-perceiver", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert stop.value.code == 0, err
        assert said in " ".join(out.split())
        assert used
    assert int8_accuracy(model, load_images(default_dataset(), "test").subset(range(8)), 8).keys() == {
        b.short(model.config.knobs) for b in model.config.budgets()
    }
