"""Security: no code or pickles are run, no tokens leak, nothing is written elsewhere, huge images are not decoded.

Related tests: remote code and pickles in test_packaging.py, tokens and ids in test_publish.py, images in requests in
test_handler.py.
"""

import ast
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import timm
import torch
from hub_server import Hub
from safetensors.torch import load_file
from support import PATIENCE, REPOSITORY, papers_form, run, small_config
from transformers import AutoModel, AutoModelForImageClassification, pipeline
from typer.testing import CliRunner

from hf_visual_perceiver.cli.main import app
from hf_visual_perceiver.data.images import load_images
from hf_visual_perceiver.export import graph as export_module
from hf_visual_perceiver.inference import loading
from hf_visual_perceiver.inference.loading import load_config, load_model
from hf_visual_perceiver.modeling import VisualPerceiverForImageClassification
from hf_visual_perceiver.modeling.handler import EndpointHandler
from hf_visual_perceiver.training.folder import save_folder
from hf_visual_perceiver.utils.conditions import measurement_conditions


@pytest.fixture
def folder(tmp_path):
    return save_folder(VisualPerceiverForImageClassification(small_config()), tmp_path / "model")


def sources(*folders):
    """Path in the repository and syntax tree of each Python file."""
    for name in folders:
        for path in (REPOSITORY / name).rglob("*.py"):
            yield path.relative_to(REPOSITORY).as_posix(), ast.parse(path.read_text())


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


class TestWeights:
    @pytest.mark.parametrize("harmless", [True, False])
    def test_a_pickle_in_the_place_of_safetensors_is_not_read(self, folder, tmp_path, harmless):
        weights = load_file(folder / "model.safetensors")
        torch.save(weights if harmless else {**weights, "trap": Trap(tmp_path / "mark")}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="Cannot read the weights of"):
            load_model(str(folder))
        shutil.copy(REPOSITORY / "modeling" / "handler.py", folder)
        with pytest.raises(OSError, match="safetensors"):
            EndpointHandler(str(folder))
        assert not (tmp_path / "mark").exists()

    def test_every_load_asks_for_safetensors(self):
        loads = [
            (path, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
            for path, tree in sources("hf_visual_perceiver", "modeling", "training")
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "from_pretrained"
            and ast.unparse(node.func.value).startswith(("AutoModel", "VisualPerceiver", "classifier"))
        ]
        assert {path for path, _ in loads} == {
            "hf_visual_perceiver/inference/loading.py",
            "hf_visual_perceiver/hub/without_package.py",
            "modeling/handler.py",
            "training/initial.py",
            "training/teacher.py",
        }
        assert [path for path, arguments in loads if arguments.get("use_safetensors") != "True"] == []


class TestTrust:
    def test_a_folders_own_code_is_not_run(self, folder, tmp_path):
        mark = tmp_path / "mark"
        for path in folder.glob("*.py"):
            path.write_text(f"open({str(mark)!r}, 'w').close()\n{path.read_text()}")
        load_model(str(folder))
        AutoModel.from_pretrained(folder)
        AutoModelForImageClassification.from_pretrained(folder)
        timm.create_model(f"local-dir:{folder}", pretrained=True)
        pipeline("adaptive-image-classification", model=str(folder))
        assert not mark.exists()
        exec(next(folder.glob("*.py")).read_text().splitlines()[0])
        assert mark.exists()

    def test_another_models_code_is_neither_run_nor_asked_about(self, tmp_path, monkeypatch):
        asked = []
        monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")
        config = {"model_type": "stranger", "auto_map": {"AutoConfig": "stranger.StrangerConfig"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n")
        with pytest.raises(ValueError, match="Expected a folder or Hub id of a checkpoint"):
            load_config(str(tmp_path))
        assert asked == []
        assert not (tmp_path / "mark").exists()


# Runs in a process of its own, because an audit hook stays. What is opened by importing is not counted.
WATCHED = """
import sys
import torch
from hf_visual_perceiver.modeling import VisualPerceiverConfig, VisualPerceiverForImageClassification
events, watching = [], False

def hook(event, arguments):
    if not watching:
        return
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "urllib.", "http.")):
        events.append((event, str(arguments)))
    if event == "open":
        frame = sys._getframe()
        # Imports on first use are Python's own, of code that is installed.
        while frame is not None and "importlib" not in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is None:
            events.append((event, str(arguments[0])))

sys.addaudithook(hook)
watching = True
model = VisualPerceiverForImageClassification(VisualPerceiverConfig(num_hidden_layers=1, num_labels=3)).eval()
x = torch.zeros(2, 3, 32, 32)
for point in ({}, {"num_active_queries": 5}, {"dqs_threshold": 0.8}):
    model(x, labels=torch.tensor([0, 2]), **point).loss.backward()
    model(x, output_attentions=True, output_hidden_states=True, **point)
    model.optimize_for_inference(backend="torch")(x, **point)
watching = False
# torch asks about the processor, and transformers looks into a model's source for the attention that it supports.
expected = ("/proc/", "/sys/", sys.modules[VisualPerceiverForImageClassification.__module__].__file__)
print([event for event in events if not event[1].startswith(expected)])
watching = True
open(sys.executable, "rb").close()
watching = False
print(len(events))
"""


def test_the_code_that_travels_opens_nothing():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", WATCHED], capture_output=True, text=True, timeout=PATIENCE, env=environment
    )
    assert result.returncode == 0, result.stderr
    opened, count = result.stdout.splitlines()
    assert opened == "[]"
    assert int(count) > 0  # the hook hears


class TestTokens:
    def test_a_refused_model_is_named_without_the_token(self, tmp_path):
        with Hub() as hub:
            hub.fail("GET", "somebody/secret", status=403, message="no access for hf_verysecret")
            environment = {
                "HF_ENDPOINT": hub.url,
                "HF_TOKEN": "hf_verysecret",
                "HF_HOME": str(tmp_path),
                "HF_HUB_OFFLINE": "0",
            }
            result = run("visual-perceiver", "info", "--model", "somebody/secret", env=environment)
            assert hub.requests
        assert result.returncode == 1
        assert "Expected a folder or Hub id of a checkpoint" in result.stderr
        assert "hf_verysecret" not in result.stdout + result.stderr
        assert len(result.stderr.strip().splitlines()) == 1

    def test_results_do_not_tell_the_environment(self, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
        assert "hf_verysecret" not in json.dumps(measurement_conditions())


class TestPlaces:
    @pytest.mark.parametrize(
        "name", ["../../somebody", "somebody/..", "somebody/../../perceiver", "/somebody/perceiver", ".."]
    )
    def test_ids_that_lead_elsewhere_write_nothing(self, name, tmp_path, monkeypatch):
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        result = CliRunner().invoke(app, ["export", name])
        assert isinstance(result.exception, ValueError)
        assert [path.name for path in tmp_path.rglob("*")] == ["here"]

    @pytest.mark.parametrize(
        "name", ["somebody/perceiver", "somebody/..", "../../somebody", "/somebody/perceiver", "somebody/.perceiver"]
    )
    @pytest.mark.parametrize("form", ["onnx", "torch-export", "safetensors-timm"])
    def test_what_is_named_after_an_id_lies_in_this_folder(self, name, form, tmp_path, monkeypatch):
        """This also holds for ids that could exist on the Hub."""
        written = []

        def export(model, output, *more):
            written.append(output)
            output.touch()
            return 0.0

        model = VisualPerceiverForImageClassification(small_config())
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(loading, "load_config", lambda name: model.config)
        monkeypatch.setattr(loading, "load_model", lambda name: model)
        for function in ("export_onnx", "export_program", "export_timm"):
            monkeypatch.setattr(export_module, function, export)
        result = CliRunner().invoke(app, ["export", name, "--format", form])
        assert result.exit_code == 0, result.exception
        assert [output.resolve().parent for output in written] == [tmp_path]


def huge_png(width, height):
    """A PNG file of less than 100 bytes whose header claims this size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


class TestImages:
    def test_huge_files_are_not_decoded(self, tmp_path):
        path = tmp_path / "huge.png"
        path.write_bytes(huge_png(8000, 5000))
        result = CliRunner().invoke(app, ["predict", str(path)])
        assert result.exit_code == 1
        assert "at most 33,554,432 pixels, got 8000x5000" in " ".join(result.stderr.split())
        with pytest.raises(ValueError, match="at most 33,554,432 pixels"):
            pipeline("adaptive-image-classification", model=papers_form())(str(path))

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize(("side", "got"), [(6_000, "6000x6000"), (20_000, "more than Pillow opens")])
    def test_those_of_a_dataset_have_the_same_limit(self, tmp_path, side, got):
        for name in ("a", "b"):
            (tmp_path / "pictures" / "train" / name).mkdir(parents=True)
            (tmp_path / "pictures" / "train" / name / "1.png").write_bytes(huge_png(side, side))
        with pytest.raises(ValueError, match=rf"Cannot read image 0 of .*at most 33,554,432 pixels, got {got}"):
            load_images(str(tmp_path / "pictures"), "train")

    def test_files_are_opened_in_one_place_and_no_limit_is_lifted(self):
        opening, lifting = set(), set()
        for path, tree in sources("hf_visual_perceiver", "modeling", "training"):
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
                    opening.add(path)
                if isinstance(node, (ast.Attribute, ast.Constant)) and "MAX_IMAGE_PIXELS" in ast.unparse(node):
                    lifting.add(path)
        # The second opens what it has itself compressed, in memory.
        assert opening == {"modeling/handler.py", "hf_visual_perceiver/evaluation/corruptions.py"}
        assert lifting == set()


def test_servers_are_for_this_machine():
    with Hub() as hub:
        assert hub.server.socket.getsockname()[0] == "127.0.0.1"
    readme = (REPOSITORY / "README.md").read_text()
    assert readme.count("-m http.server") == readme.count("-m http.server --bind 127.0.0.1")
    for path, tree in sources("hf_visual_perceiver", "modeling", "training", "tests"):
        if path == "tests/hub/test_security.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("HTTPServer", "TCPServer")):
                assert ast.unparse(node.args[0]).startswith("('127.0.0.1', "), path
