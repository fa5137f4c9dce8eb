"""One folder for every library: transformers with and without this package, and timm, give identical logits."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import PATIENCE, REPOSITORY, aligned, papers_form
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    pipeline,
)
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

from hf_visual_perceiver.data.image_processor import create_image_processor
from hf_visual_perceiver.inference.loading import load_model
from hf_visual_perceiver.modeling import VisualPerceiverConfig, VisualPerceiverForImageClassification
from hf_visual_perceiver.training.folder import save_folder


POINTS = [{}, {"num_active_queries": 7}, {"dqs_threshold": 0.8}, {"num_active_queries": 40, "dqs_threshold": 0.6}]

# Makes this package impossible to import, then loads the folder by its own code.
WITHOUT_PACKAGE = """
import copy, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hf_visual_perceiver", "timm"):
            raise ModuleNotFoundError(f"{name} is not to be found here")
sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
torch.set_num_threads(1)  # as the process that it is compared with
folder, points, out = sys.argv[1], eval(sys.argv[2]), sys.argv[3]
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model)
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "visual_perceiver"
base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
AutoImageProcessor.from_pretrained(folder)
x = torch.load(out + ".in", weights_only=True)
aligned, base = copy.deepcopy(model), copy.deepcopy(base)
with torch.no_grad():
    logits = [aligned(x, **p).logits for p in points]
    pooled = base(x).pooler_output
    assert torch.equal(aligned.head(pooled), logits[0])
# Saved again from the remote code, the folder must still be whole.
model.save_pretrained(out + ".again")
larger = AutoModelForImageClassification.from_pretrained(folder, image_size=48, trust_remote_code=True)
assert larger.visual_perceiver.embeddings.position_embeddings.shape == (1, 144, 96)
torch.save(logits, out)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, trained):
    return save_folder(trained, tmp_path_factory.mktemp("checkpoint") / "model", {"notes.txt": "hello"})


def test_a_fresh_model_maps_every_auto_class(model, tmp_path):
    model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForImageClassification"}


def test_contents(folder):
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "configuration_visual_perceiver.py",
        "conv_stem.py",
        "elastic.py",
        "engines.py",
        "family_config.py",
        "macs.py",
        "modeling_visual_perceiver.py",
        "optimized.py",
        "query_selection.py",
        "ragged.py",
        "spatial_init.py",
        "visual_perceiver_incremental.py",
        "visual_perceiver_layers.py",
        "visual_perceiver_network.py",
        "notes.txt",
    }
    config = json.loads((folder / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForImageClassification"}
    assert config["architecture"] == "visual_perceiver_nano_patch4_32"
    assert config["num_classes"] == 10
    assert "num_classes" not in config["model_args"]
    assert config["pretrained_cfg"]["label_names"][3] == "cat"


@pytest.mark.parametrize("name", ["configuration_visual_perceiver.py", "modeling_visual_perceiver.py"])
def test_what_the_code_needs_it_imports_itself(folder, name):
    # Older transformers copies what these two import, and not what that imports.
    needed = {Path(file).name for file in get_relative_import_files(folder / name)}
    assert {f"{module}.py" for module in get_relative_imports(folder / name)} >= needed - {name}


@torch.no_grad()
def test_identical_logits_everywhere(folder, trained, tmp_path):
    x = torch.randn(6, 3, 32, 32)
    hf = aligned(AutoModelForImageClassification.from_pretrained(folder).eval())
    assert type(hf) is VisualPerceiverForImageClassification
    assert type(AutoConfig.from_pretrained(folder)) is VisualPerceiverConfig
    assert AutoImageProcessor.from_pretrained(folder).size["height"] == 32
    in_timm = aligned(timm.create_model(f"local-dir:{folder}", pretrained=True).eval())
    out = tmp_path / "logits.pt"
    torch.save(x, f"{out}.in")
    subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, str(folder), repr(POINTS), str(out)], check=True, timeout=PATIENCE
    )
    remote = torch.load(out, weights_only=True)
    for point, logits in zip(POINTS, remote, strict=True):
        expected = trained(x, **point).logits
        assert torch.equal(hf(x, **point).logits, expected)
        assert torch.equal(in_timm(x, **point), expected)
        assert torch.equal(logits, expected)
    assert torch.equal(
        aligned(AutoModel.from_pretrained(folder).eval())(x).pooler_output, trained.visual_perceiver(x).pooler_output
    )
    again = aligned(AutoModelForImageClassification.from_pretrained(f"{out}.again").eval())
    assert torch.equal(again(x).logits, trained(x).logits)


def test_hub_ids(folder, trained, tmp_path):
    # A Hub cache as huggingface_hub lays it out, read offline in a process of its own.
    repository = tmp_path / "hub" / "models--somebody--perceiver"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot.symlink_to(folder)
    x = torch.randn(2, 3, 32, 32)
    torch.save((x, trained(x).logits), tmp_path / "expected.pt")
    code = (
        "import copy, sys, timm, torch, hf_visual_perceiver; from transformers import AutoModelForImageClassification;"
        "torch.set_num_threads(1); x, expected = torch.load(sys.argv[1], weights_only=True);"
        "a = copy.deepcopy(timm.create_model('hf-hub:somebody/perceiver', pretrained=True).eval())(x);"
        "b = copy.deepcopy(AutoModelForImageClassification.from_pretrained('somebody/perceiver').eval())(x).logits;"
        "assert torch.equal(a, expected) and torch.equal(b, expected)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "expected.pt")], check=True, timeout=PATIENCE, env=environment
    )


@pytest.mark.parametrize("size", [64, [48, 40]], ids=str)
def test_another_image_size(folder, trained, size, tmp_path):
    """Positions are resampled at loading, as in timm and in the forward pass."""
    height, width = [size, size] if isinstance(size, int) else size
    x = torch.randn(2, 3, height, width)
    expected = trained(x, interpolate_pos_encoding=True).logits
    model = AutoModelForImageClassification.from_pretrained(folder, image_size=size).eval()
    torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-5)
    base = AutoModel.from_pretrained(folder, image_size=size).eval()
    torch.testing.assert_close(base(x).pooler_output, model.visual_perceiver(x).pooler_output)
    network = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=size).eval()
    torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-5)
    again = load_model(str(save_folder(model, tmp_path / "again")))
    torch.testing.assert_close(again(x).logits, expected, rtol=0, atol=1e-5)
    # A config of the user's own does not say which size the checkpoint has.
    own = VisualPerceiverConfig.from_architecture("visual_perceiver_nano_patch4_32", image_size=size, num_labels=10)
    model = VisualPerceiverForImageClassification.from_pretrained(folder, config=own).eval()
    torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-5)


def test_another_image_size_with_other_labels_and_fewer_queries(folder, trained):
    model = AutoModelForImageClassification.from_pretrained(
        folder, image_size=48, num_queries=10, num_labels=3, ignore_mismatched_sizes=True, dtype=torch.bfloat16
    )
    assert model.head.weight.shape == (3, 96)
    coarse = AutoModelForImageClassification.from_pretrained(folder, patch_size=8, ignore_mismatched_sizes=True)
    assert coarse.config.num_patches == 16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model, x = model.float().eval(), torch.randn(2, 3, 48, 48)
    expected = trained.visual_perceiver(x, num_active_queries=10, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(model.visual_perceiver(x).pooler_output, expected, rtol=0.1, atol=0.1)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # of the head
        AutoModelForImageClassification.from_pretrained(folder, image_size=48, num_labels=3)


def test_a_grid_that_the_config_does_not_name(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 40, 40]
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"Expected position embeddings of a 10x10 grid, .* got 64 of them"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "copy", image_size=64)


def test_pipeline(folder, cifar10):
    from hf_visual_perceiver.data.images import load_images

    classifier = pipeline("image-classification", model=str(folder))
    answers = classifier(load_images(cifar10, "test").image(0), top_k=3)
    assert len(answers) == 3
    assert answers[0]["label"] in AutoConfig.from_pretrained(folder).label2id


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK"])
def test_the_processor_takes_images_of_every_mode(folder, mode):
    image = Image.open(REPOSITORY / "docs" / "cat.png").convert("L").convert(mode)
    for name in (folder, papers_form()):
        processor = AutoImageProcessor.from_pretrained(name)
        pixels, expected = (
            processor(images=x, return_tensors="pt")["pixel_values"] for x in (image, image.convert("RGB"))
        )
        assert pixels.shape == (1, 3, 32, 32)
        assert torch.equal(pixels, expected)


def test_only_models_of_three_channels_take_rgb():
    assert create_image_processor(VisualPerceiverConfig()).do_convert_rgb
    assert not create_image_processor(VisualPerceiverConfig(num_channels=1)).do_convert_rgb


def test_timm_exports_what_transformers_loads(folder, tmp_path):
    model = aligned(timm.create_model(f"local-dir:{folder}", pretrained=True).eval())
    state = {f"visual_perceiver.{k}" if not k.startswith("head") else k: v for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    x = torch.randn(2, 3, 32, 32)
    again = aligned(AutoModelForImageClassification.from_pretrained(tmp_path).eval())
    assert torch.equal(again(x).logits, model(x))
    # And without the prefix, as timm itself saves.
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = aligned(AutoModelForImageClassification.from_pretrained(tmp_path).eval())
    assert torch.equal(again(x).logits, model(x))


def test_new_labels_replace_old_ones(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder, num_labels=3)
    model = AutoModelForImageClassification.from_pretrained(folder, config=config, ignore_mismatched_sizes=True)
    save_folder(model, tmp_path / "m")
    saved = json.loads((tmp_path / "m" / "config.json").read_text())
    assert saved["num_classes"] == 3
    assert "label_names" not in saved["pretrained_cfg"]


def test_a_failing_save_leaves_the_old_folder(trained, tmp_path):
    folder = save_folder(trained, tmp_path / "model")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(TypeError):
        save_folder(trained, folder, {"bad.txt": 3})
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    assert load_model(str(folder)).config.num_labels == 10


class TestBadFolders:
    def copy(self, folder, tmp_path, **replaced):
        for path in folder.iterdir():
            (tmp_path / path.name).write_bytes(replaced.get(path.stem, path.read_bytes()))
        return str(tmp_path)

    def test_truncated_weights(self, folder, tmp_path):
        half = (folder / "model.safetensors").read_bytes()[:100_000]
        with pytest.raises(ValueError, match="Cannot read the weights of"):
            load_model(self.copy(folder, tmp_path, model=half))

    def test_weights_of_another_network(self, folder, tmp_path):
        config = json.loads((folder / "config.json").read_text())
        config["hidden_size"] = 48
        with pytest.raises(ValueError, match=r"Expected .* of shape .*48.* as its config.json says, got .*96"):
            load_model(self.copy(folder, tmp_path, config=json.dumps(config).encode()))

    def test_missing_weights(self, folder, tmp_path):
        copy = self.copy(folder, tmp_path)
        weights = load_file(f"{copy}/model.safetensors")
        del weights["head.bias"]
        save_file(weights, f"{copy}/model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"1 are missing, such as head.bias"):
            load_model(copy)

    def test_weights_that_have_no_place(self, folder, tmp_path):
        config = json.loads((folder / "config.json").read_text())
        config["num_hidden_layers"] = 4
        with pytest.raises(ValueError, match=r"are not part of the model, such as visual_perceiver.layers.4"):
            load_model(self.copy(folder, tmp_path, config=json.dumps(config).encode()))

    @pytest.mark.parametrize(("key", "value"), [("hidden_size", "wide"), ("hidden_act", "gelo"), ("dqs_threshold", -3)])
    def test_broken_configs(self, folder, tmp_path, key, value):
        config = {**json.loads((folder / "config.json").read_text()), key: value}
        with pytest.raises(ValueError, match=key):
            load_model(self.copy(folder, tmp_path, config=json.dumps(config).encode()))

    def test_a_folder_of_something_else_is_not_replaced(self, trained, tmp_path):
        (tmp_path / "thesis.tex").write_text("precious")
        with pytest.raises(ValueError, match="holds something else"):
            save_folder(trained, tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]

    def test_another_model_type(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "vit"}')
        with pytest.raises(ValueError, match=r"type visual_perceiver.* in .*, got 'vit'"):
            load_model(str(tmp_path))

    def test_nothing_there(self, tmp_path):
        with pytest.raises(ValueError, match="folder or Hub id"):
            load_model(str(tmp_path / "absent"))

    def test_dtype(self, folder):
        with pytest.raises(ValueError, match="float32, bfloat16 or float16, got 'int8'"):
            load_model(str(folder), dtype="int8")
