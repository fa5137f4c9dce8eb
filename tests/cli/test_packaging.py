"""The installed package: one package, one command, and all data files."""

import ast
import email
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from support import PATIENCE, REPOSITORY

import hf_visual_perceiver
from hf_visual_perceiver.utils.extras import EXTRAS


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns(
        ".*", "build", "dist", "outputs", "runs", "*.egg-info", "__pycache__", "node_modules"
    )
    shutil.copytree(REPOSITORY, source, ignore=ignored)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    return next(folder.glob("*.whl"))


def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"hf_visual_perceiver", "visual_perceiver_launcher.py"}
    package = {name.removeprefix("hf_visual_perceiver/") for name in names}
    assert {
        "__init__.py",
        "cli/main.py",
        "modeling/modeling_visual_perceiver.py",
        "modeling/timm_visual_perceiver.py",
        "training/train.py",
        "training/recipes/cifar10_query_masking.yaml",
        "data/test.parquet",
        "model_cards/template.md",
        "checkpoints/visual_perceiver_nano_cifar10/model.safetensors",
        "checkpoints/visual_perceiver_nano_cifar10/examples/000_cat.png",
        "modeling/handler.py",
        "hub/space/app.py",
        "hub/space/style.css",
    } <= package
    assert not any("test_" in name for name in names)
    entry_points = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "visual-perceiver = visual_perceiver_launcher:main" in entry_points


def test_the_installed_wheel_works(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    # The unpacked wheel comes first on the path, away from the checkout.
    code = (
        "import sys; path = sys.argv.pop();"
        "from visual_perceiver_launcher import main;"
        "sys.argv = ['visual-perceiver', 'evaluate', '--budget', 'K=4', '--max-images', '20'];"
        "exec('try: main()\\nexcept SystemExit as stop: assert not stop.code');"
        "import hf_visual_perceiver, hf_visual_perceiver.training.train, timm;"
        "assert hf_visual_perceiver.__file__.startswith(path);"
        "timm.create_model('visual_perceiver_tiny_patch4_32')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    assert "K=4" in result.stdout


REMOTE = [
    "configuration_visual_perceiver",
    "conv_stem",
    "elastic",
    "engines",
    "family_config",
    "macs",
    "modeling_visual_perceiver",
    "optimized",
    "query_selection",
    "ragged",
    "spatial_init",
    "visual_perceiver_incremental",
    "visual_perceiver_layers",
    "visual_perceiver_network",
]


HARMLESS = {
    "ast",
    "bisect",
    "collections",
    "contextlib",
    "copy",
    "dataclasses",
    "functools",
    "itertools",
    "math",
    "numbers",
    "operator",
    "typing",
}  # neither files nor sockets


def imports(tree: ast.AST) -> tuple[set[str], set[str | None]]:
    """The packages that a file imports, and the neighbours that it imports relatively."""
    absolute, relative = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            absolute |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            relative.add(node.module)
    return absolute, relative


def test_modeling_is_flat():
    """transformers follows only `from .name import` when it copies the code of a checkpoint."""
    folder = REPOSITORY / "modeling"
    assert [path for path in folder.rglob("*.py") if path.parent != folder] == []
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, f"{path.name}:{node.lineno}"
                assert node.module, f"{path.name}:{node.lineno}"
                assert "." not in node.module, f"{path.name}:{node.lineno}"
                assert (folder / f"{node.module}.py").is_file(), f"{path.name}:{node.lineno}"


def calls(tree: ast.AST) -> set[str]:
    """The calls in a file, as written."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("name", REMOTE)
def test_code_that_travels_with_weights_needs_torch_and_transformers_alone(name):
    tree = ast.parse((REPOSITORY / "modeling" / f"{name}.py").read_text())
    absolute, relative = imports(tree)
    assert relative <= set(REMOTE)
    assert absolute <= {"torch", "transformers", "huggingface_hub", *HARMLESS}
    # transformers' own configs take their validation from there; nothing else of it is needed.
    hub = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module for module in hub if module and module.startswith("huggingface_hub")} <= {
        "huggingface_hub.dataclasses"
    }
    assert calls(tree).isdisjoint({"open", "exec", "eval", "compile", "__import__", "torch.load", "torch.save"})


def test_the_endpoints_handler_needs_no_more_than_an_endpoint_has():
    tree = ast.parse((REPOSITORY / "modeling" / "handler.py").read_text())
    absolute, relative = imports(tree)
    assert relative == set()  # it is loaded by its path, without a package around it
    # This package is tried for, where it is installed.
    optional = {"hf_visual_perceiver"}
    known = {"torch", "transformers", "numpy", "PIL", "base64", "binascii", "io", "logging", "pathlib"}
    assert absolute <= {*known, *HARMLESS, *optional}
    outside_functions = [imports(node)[0] for node in tree.body if not isinstance(node, ast.FunctionDef)]
    assert optional.isdisjoint(set().union(*outside_functions))
    # Images come in the request: it opens no file by name.
    assert calls(tree).isdisjoint({"open", "exec", "eval", "compile", "__import__", "torch.load", "Path.open"})


def test_remote_code_is_trusted_in_two_places_alone():
    trusting = set()
    for folder in ("hf_visual_perceiver", "modeling", "training", "benchmarks"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                keyword = isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
                # As a key, or to be set by name.
                named = isinstance(node, ast.Constant) and node.value == "trust_remote_code"
                if named or (keyword and ast.unparse(node.value) != "False"):
                    trusting.add(path.relative_to(REPOSITORY).as_posix())
    # The check of the folder that its owner publishes, and the folder's own handler, which is itself such code.
    assert trusting == {"hf_visual_perceiver/hub/without_package.py", "modeling/handler.py"}


def test_weights_are_read_from_safetensors_alone():
    """`torch.load` executes pickles, unless weights_only is set."""
    for folder in ("hf_visual_perceiver", "modeling", "training"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                    "torch.load",
                    "pickle.load",
                    "pickle.loads",
                ):
                    safe = {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only")
                    assert safe == "True", f"{path}:{node.lineno}"


def test_the_checkpoints_code_is_the_packages():
    folders = sorted(path.parent for path in (REPOSITORY / "checkpoints").glob("*/config.json"))
    assert len(folders) >= 2
    for folder in folders:
        files = {path.stem: path.read_text() for path in folder.glob("*.py")}
        if "configuration_visual_perceiver" in files:
            assert set(files) >= set(REMOTE)
        for name, text in files.items():
            assert text == (REPOSITORY / "modeling" / f"{name}.py").read_text(), f"{folder.name}: {name}"


# Whether a script works in an interpreter that lacks the packages of the extras.
WITHOUT = ("accelerate", "datasets", "evaluate", "matplotlib", "onnxruntime", "scipy")


def without(code, *packages):
    blocked = f"import sys; sys.modules.update(dict.fromkeys({packages!r}));"
    command = [sys.executable, "-c", f"{blocked} {code}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def test_the_models_need_no_extra():
    code = (
        "import hf_visual_perceiver, timm, torch; "
        "from transformers import AutoModelForImageClassification as Auto; "
        "folder = hf_visual_perceiver.bundled_checkpoint(); x = torch.zeros(1, 3, 32, 32); "
        "one = Auto.from_pretrained(folder).eval()(x).logits; "
        "torch.testing.assert_close(one, timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(x))"
    )
    done = without(code, *WITHOUT, "gradio")
    assert done.returncode == 0, done.stderr


def test_the_space_needs_gradio_and_matplotlib_alone():
    code = "import hf_visual_perceiver as p; from hf_visual_perceiver.hub.space import app; app.Demo.load(p.bundled_checkpoint())"
    done = without(code, *(name for name in WITHOUT if name != "matplotlib"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["accelerate", "datasets", "matplotlib", "pydantic"])
def test_training_names_its_extra(package):
    done = without("import hf_visual_perceiver.training.train", package)
    assert f"Expected {package} to be installed, from the extra `train`" in done.stderr
    assert "pip install 'hf-visual-perceiver[train]'" in done.stderr


@pytest.mark.parametrize("package", ["evaluate", "scipy", "onnxruntime", "matplotlib", "typer"])
def test_commands_name_their_extra(package):
    code = "sys.argv = ['visual-perceiver', 'info']; from visual_perceiver_launcher import main; main()"
    done = without(code, package)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert package in done.stderr
    assert "pip install 'hf-visual-perceiver[cli]'" in done.stderr


def test_the_citation_has_the_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert str(citation["version"]) == hf_visual_perceiver.__version__


def test_the_lowest_versions_are_those_of_pyproject():
    """tests/lowest.txt pins the first release of each lower bound, such as 77.0.1 for >=77."""
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)', (REPOSITORY / "pyproject.toml").read_text()))
    lines = (REPOSITORY / "tests" / "lowest.txt").read_text().splitlines()
    lowest = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert list(lowest) == sorted(bounds)
    for name, version in lowest.items():
        assert SpecifierSet(f"=={bounds[name]}.*").contains(version), name


def test_extras_and_version_are_those_of_the_code(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = email.message_from_bytes(archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))))
    assert metadata["Version"] == hf_visual_perceiver.__version__
    required = [requirement.partition(";") for requirement in metadata.get_all("Requires-Dist")]

    def packages(extra):
        own = [name for name, _, marker in required if (f'extra == "{extra}"' in marker if extra else not marker)]
        inner = (found for name in own for found in re.findall(r"hf-visual-perceiver\[(.*)\]", name))
        names = {re.split(r"[<>=\[ ]", name)[0] for name in own}
        return names.union(*(packages(other) for others in inner for other in others.split(",")))

    assert packages("") == {"torch", "torchvision", "transformers", "timm", "huggingface-hub", "safetensors"}
    for extra, names in EXTRAS.items():
        assert set(names) <= packages(extra)
        assert set(names) <= packages("all") <= packages("dev")
