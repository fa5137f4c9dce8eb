"""Behaviour that all commands share: start-up, checkpoint and image arguments, output and errors."""

import io
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from support import REPOSITORY
from typer.testing import CliRunner

import hf_visual_perceiver
from hf_visual_perceiver.cli.main import COMMANDS, app, main
from hf_visual_perceiver.data.image_files import list_images
from hf_visual_perceiver.data.images import load_images
from hf_visual_perceiver.data.parts import at_most, evenly_spaced
from hf_visual_perceiver.data.sample_images import write_sample_images
from hf_visual_perceiver.export.graph import export_onnx
from hf_visual_perceiver.inference import classification
from hf_visual_perceiver.inference.loading import default_model, load_model
from hf_visual_perceiver.modeling import Budget


FEW = ["--max-images", "20"]
QUICK = [*FEW, "--budget", "K=2"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_sample_images(tmp_path_factory.mktemp("pictures"), 2)


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Run the command in this process; return its exit status and output."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["visual-perceiver", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return (stop.value.code, *capsys.readouterr())

    return run


class TestStart:
    def test_help_and_typos_are_answered_without_torch(self):
        """The models are registered only when a command starts."""
        arguments = [
            ["--help"],
            ["--version"],
            [],
            ["evalute"],
            ["evaluate", "--bacth-size", "1"],
            ["card"],
            ["publish", "a/b"],
        ]
        arguments += [[name, "--help"] for name in COMMANDS]
        arguments += [["evaluate", "--batch-size", "many"], ["evaluate", "--dtype", "float23"], ["predict"]]
        arguments += [["evaluate", "--plot", "plot.txt"], ["info", "--json", "absent/r.json"]]
        code = f"""
import sys
from visual_perceiver_launcher import main
for arguments in {arguments!r}:
    sys.argv = ["visual-perceiver", *arguments]
    try:
        main()
    except SystemExit as stop:
        print(stop.code)
heavy = {{"torch", "transformers", "timm", "datasets", "numpy", "matplotlib", "huggingface_hub"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
sys.argv = ["visual-perceiver", "compare", "absent"]
try:
    main()
except SystemExit as stop:
    assert stop.code == 1, stop.code
import hf_visual_perceiver, timm
assert timm.is_model("visual_perceiver_tiny_patch4_32")
assert hf_visual_perceiver.VisualPerceiverConfig
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        for said in ("No such command 'evalute'", "--bacth-size", "unable to", "got 'float23'"):
            assert said in done.stderr.replace("\n", " ")
        assert "Expected a checkpoint folder" in done.stderr

    def test_version(self, run_main):
        status, out, _ = run_main("--version")
        assert status == 0
        assert f"visual-perceiver {hf_visual_perceiver.__version__} (torch {torch.__version__.split('+')[0]}" in out

    def test_the_package_shows_its_public_names_alone(self):
        assert dir(hf_visual_perceiver) == sorted(hf_visual_perceiver.__all__)
        assert not [
            n for n in dir(hf_visual_perceiver) if isinstance(getattr(hf_visual_perceiver, n), types.ModuleType)
        ]

    def test_the_bundled_checkpoint_loads_from_any_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        folder = hf_visual_perceiver.bundled_checkpoint()
        assert isinstance(folder, str)
        assert Path(folder, "model.safetensors").is_file()


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (
                RuntimeError("mkldnn_reorder failed\nException raised from f at g.cpp:12"),
                "mkldnn_reorder failed (--debug shows the traceback)",
            ),
            (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB."), "try a smaller --batch-size"),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "try a smaller --batch-size"),
            (MemoryError(), "MemoryError (try a smaller --batch-size)"),
            (ImportError("No module named 'gradio'"), "No module named 'gradio'"),
            (FloatingPointError("a loss of nan"), "a loss of nan"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_what_a_machine_lacks_is_said_in_one_line(self, error, message, pictures, monkeypatch, run_main):
        def fail(*args):
            raise error

        monkeypatch.setattr(classification, "classify", fail)
        status, _, said = run_main("predict", pictures[0])
        assert status == 1
        assert said.startswith("error: ")
        assert message in said
        assert len(said.strip().splitlines()) == 1
        for arguments in (["--debug", "predict", pictures[0]], ["predict", pictures[0], "--debug"]):
            monkeypatch.setattr("sys.argv", ["visual-perceiver", *map(str, arguments)])
            with pytest.raises(type(error)):
                main()

    def test_a_mistake_of_ours_keeps_its_traceback(self, pictures, monkeypatch):
        monkeypatch.setattr(classification, "classify", lambda model: None)
        monkeypatch.setattr("sys.argv", ["visual-perceiver", "predict", str(pictures[0])])
        with pytest.raises(TypeError):
            main()


class TestResults:
    @pytest.mark.parametrize(
        "arguments",
        [
            ["info"],
            ["predict", "{picture}"],
            ["evaluate", *QUICK],
            ["calibrate", *QUICK, "--target-macs", "0.5"],
            ["robustness", *QUICK, "--corruption", "contrast", "--severity", "1", "--budget", "t=0.8"],
            ["knn", *FEW, "--budget", "K=2", "--neighbours", "3"],
            ["attention-maps", *QUICK, "--output", "{folder}/maps.png"],
            ["compare-exports", "{graph}", *QUICK],
            ["benchmark", "--batch-size", "1", "--budget", "K=2", "--single-calls", "1", "--form", "eager"],
            ["compare", "{run}"],
        ],
        ids=lambda arguments: arguments[0],
    )
    def test_json_on_stdout_is_alone_there(self, arguments, pictures, tmp_path, request, monkeypatch):
        places = {"picture": pictures[0], "folder": tmp_path}
        if "{graph}" in arguments:
            export_onnx(load_model(default_model()), tmp_path / "m.onnx", Budget(num_active_queries=2))
            places["graph"] = tmp_path / "m.onnx"
        if "{run}" in arguments:
            places["run"] = finished_run(tmp_path / "run")
        monkeypatch.chdir(tmp_path)
        result = CliRunner().invoke(app, [*(a.format(**places) for a in arguments), "--json", "-"])
        assert result.exit_code == 0, result.exception
        values = json.loads(result.stdout)
        assert result.stderr.strip()
        assert not Path("-").exists()
        if "--max-images" in arguments:
            conditions = values.get("conditions", values)
            counts = [conditions[key] for key in ("images", "gallery_images", "queried_images") if key in conditions]
            assert counts
            assert set(counts) == {20}

    def test_max_images_are_of_all_classes(self, cifar10):
        assert evenly_spaced(1000, 600)[-1] == 998
        assert evenly_spaced(3).tolist() == evenly_spaced(3, 9).tolist() == [0, 1, 2]
        whole, few = load_images(cifar10, "test"), at_most(load_images(cifar10, "test"), 10)
        assert (few.images[1] == whole.images[len(whole) // 10]).all()
        with pytest.raises(ValueError, match="at least 1 image, got 0"):
            evenly_spaced(10, 0)


class TestCheckpoints:
    @pytest.mark.parametrize(
        "command", ["info", "evaluate", "calibrate", "benchmark", "robustness", "knn", "export", "card", "demo-app"]
    )
    def test_an_argument_and_the_option_name_it_alike(self, command, tmp_path):
        needed = ["--target-macs", "0.5"] if command == "calibrate" else []
        for given in ([str(tmp_path / "a")], ["--model", str(tmp_path / "a")]):
            refused = CliRunner().invoke(app, [command, *given, *needed])
            assert isinstance(refused.exception, ValueError)
            assert str(tmp_path / "a") in str(refused.exception)
        refused = CliRunner().invoke(app, [command, "a", "--model", "b", *needed])
        assert str(refused.exception) == "Expected one checkpoint, got 'a' and --model 'b'."

    def test_publish_takes_it_either_way(self, tmp_path):
        for given in (
            [str(tmp_path), "a/b"],
            ["a/b", "--model", str(tmp_path)],
            [f"{tmp_path}/", "a/b", "--model", str(tmp_path)],
        ):
            refused = CliRunner().invoke(app, ["publish", *given, "--dry-run"])
            assert isinstance(refused.exception, ValueError)
            assert str(tmp_path) in str(refused.exception)
        assert CliRunner().invoke(app, ["publish", "a", "b", "c"]).exit_code == 2

    def test_the_same_folder_twice_is_no_contradiction(self, tmp_path):
        refused = CliRunner().invoke(app, ["info", f"{tmp_path}/", "--model", str(tmp_path)])
        assert "Expected a folder or Hub id of a checkpoint" in str(refused.exception)


class TestImages:
    def test_an_image_on_stdin(self, pictures, monkeypatch, run_main):
        stdin = types.SimpleNamespace(buffer=io.BytesIO(pictures[0].read_bytes()))
        monkeypatch.setattr("sys.stdin", stdin)
        status, out, _ = run_main("predict", "-", pictures[0], "--json", "-")
        assert status == 0
        piped, file = json.loads(out)["images"]
        assert piped["file"] == "-"
        assert piped["labels"] == pytest.approx(file["labels"], abs=1e-6)
        monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"no image")))
        status, _, said = run_main("predict", "-")
        assert status == 1
        assert "Cannot read stdin as an image" in said
        with pytest.raises(ValueError, match="one image on stdin, got 2 times -"):
            list_images(["-", "-"])

    @pytest.mark.parametrize("command", ["predict", "attention-maps"])
    @pytest.mark.parametrize("address", ["https://example.com/cat.png", "HTTP://a/b", "s3://bucket/key.png"])
    def test_addresses_are_refused(self, command, address):
        refused = CliRunner().invoke(app, [command, address])
        assert isinstance(refused.exception, ValueError)
        assert f"got the URL '{address}'" in str(refused.exception)


def finished_run(folder: Path) -> Path:
    """The folder of a finished run, for `compare`."""
    folder.mkdir()
    recipe = {"architecture": "visual_perceiver_nano_patch4_32", "steps": 2}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    (folder / "log.jsonl").write_text('{"step": 2, "validation_accuracy": 0.5, "K": 64}\n')
    return folder
