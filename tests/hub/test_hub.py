"""Publish to a local Hub server and load from it, each user in a separate process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from hub_server import Hub
from huggingface_hub import ModelCard
from PIL import Image
from support import PATIENCE, papers_form

from hf_visual_perceiver.inference.loading import load_model


REPO, PUSHED, IN_TIMM = "somebody/perceiver", "somebody/pushed", "somebody/in-timm"

PUBLISHER = """
import sys, timm, torch
from pathlib import Path
from tempfile import TemporaryDirectory
torch.set_num_threads(1)
from hf_visual_perceiver.cli import main as cli
from hf_visual_perceiver.inference import loading
from hf_visual_perceiver.hub import publish as publishing
from hf_visual_perceiver.data.image_processor import create_image_processor
folder, repo, pushed, in_timm = sys.argv[1:5]
sys.argv = ["visual-perceiver", "publish", folder, repo, "--budget", "K=16"]
try:
    cli.main()
except SystemExit as stop:
    assert not stop.code, stop.code
# A second version, without checking it again.
with TemporaryDirectory() as stage:
    plan = publishing.prepare(Path(folder), repo, Path(stage), budget="t=0.8", check=lambda stage: {})
    assert publishing.upload(plan, repo).tag == "v2"
model = loading.load_model(folder)
model.push_to_hub(pushed)
create_image_processor(model.config).push_to_hub(pushed)
model = timm.create_model(f"local-dir:{folder}", pretrained=True)
timm.models.push_to_hf_hub(model, in_timm, safe_serialization=True)
"""

STRANGER = """
import base64, hashlib, importlib.util, json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hf_visual_perceiver", "timm"):
            raise ModuleNotFoundError(f"{name} is not to be found here")
sys.meta_path.insert(0, Blocker())
import torch
from huggingface_hub import snapshot_download
from pathlib import Path
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
torch.set_num_threads(1)
repo, pushed, commit, picture, out = sys.argv[1:]
x = torch.load(out + ".in", weights_only=True)
found = {}
load = AutoModelForImageClassification.from_pretrained
with torch.no_grad():
    for revision in ("main", "v1", "v2", commit):
        model = load(repo, revision=revision, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules")
        found[revision] = model(x).logits
        found[revision + " full"] = model(x, num_active_queries=64, dqs_threshold=1.0).logits
    base = AutoModel.from_pretrained(repo, trust_remote_code=True).eval()
    found["base"] = base(x).pooler_output
    found["pushed"] = load(pushed, trust_remote_code=True).eval()(x).logits
assert AutoImageProcessor.from_pretrained(repo).size["height"] == 32
image = Image.open(picture)
answers = {"pipeline": pipeline("image-classification", model=repo, trust_remote_code=True)(image)}
folder = snapshot_download(repo, revision="v1")
answers["files"] = sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())
answers["weights"] = hashlib.sha256(Path(folder, "model.safetensors").read_bytes()).hexdigest()

# As the Inference Endpoints' toolkit does.
spec = importlib.util.spec_from_file_location("handler.EndpointHandler", Path(folder, "handler.py"))
sys.path.insert(0, folder)
handler = importlib.util.module_from_spec(spec)
sys.modules["handler.EndpointHandler"] = handler
spec.loader.exec_module(handler)
endpoint = handler.EndpointHandler(folder)
text = base64.b64encode(Path(picture).read_bytes()).decode()
for name, parameters in {"default": {}, "k": {"num_active_queries": 5}, "t": {"num_active_queries": 64, "dqs_threshold": 0.8}}.items():
    answers["endpoint " + name] = endpoint({"inputs": text, "parameters": {**parameters, "top_k": 2}})

try:
    load(repo, revision="v1")
except ValueError as error:
    answers["untrusting"] = str(error)
torch.save(found, out)
Path(out + ".json").write_text(json.dumps(answers))
"""

OFFLINE = """
import sys, torch
from transformers import AutoModelForImageClassification
torch.set_num_threads(1)
repo, out = sys.argv[1:]
x = torch.load(out + ".in", weights_only=True)
found = {}
with torch.no_grad():
    for revision in ("main", "v1"):
        model = AutoModelForImageClassification.from_pretrained(repo, revision=revision, trust_remote_code=True).eval()
        found[revision] = model(x).logits
torch.save(found, out + ".offline")
"""

COLLEAGUE = """
import json, sys, timm, torch
import hf_visual_perceiver
from pathlib import Path
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
torch.set_num_threads(1)
repo, in_timm, picture, out = sys.argv[1:]
x = torch.load(out + ".in", weights_only=True)
names = {"main": f"hf-hub:{repo}", "v1": f"hf-hub:{repo}@v1", "pushed": f"hf-hub:{in_timm}"}
with torch.no_grad():
    found = {name: timm.create_model(place, pretrained=True).eval()(x) for name, place in names.items()}
    found["transformers"] = AutoModelForImageClassification.from_pretrained(repo).eval()(x).logits
classifier = pipeline("adaptive-image-classification", model=repo)
answers = {"default": classifier(Image.open(picture)), "k": classifier(Image.open(picture), num_active_queries=5, dqs_threshold=1.0)}
torch.save(found, out + ".timm")
Path(out + ".timm.json").write_text(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Results of publishing, and of loading without the package (online and offline) and with it."""
    place = tmp_path_factory.mktemp("hub")
    out, picture = str(place / "logits"), str(place / "cat.png")
    Image.open(Path(__file__).parents[2] / "docs" / "cat.png").convert("RGB").resize((48, 40)).save(picture)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    torch.save(x, out + ".in")
    with Hub() as hub:
        # Tokens and caches of the user who runs the tests are not for them.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}

        def process(code, *arguments, **more):
            return subprocess.run(
                [sys.executable, "-c", code, *arguments],
                env={**environment, **more},
                cwd=place,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                stdin=subprocess.DEVNULL,
            )

        def succeed(*arguments, **more):
            result = process(*arguments, **more)
            assert result.returncode == 0, result.stdout + result.stderr
            return result

        home = str(place / "stranger")
        published = succeed(
            PUBLISHER, papers_form(), REPO, PUSHED, IN_TIMM, HF_TOKEN="writer", HF_HOME=str(place / "publisher")
        )
        repository = hub.repositories[REPO]
        first = repository.tags["v1"]
        succeed(STRANGER, REPO, PUSHED, first, picture, out, HF_HOME=home)
        succeed(COLLEAGUE, REPO, IN_TIMM, picture, out, HF_HOME=str(place / "colleague"))
        requests = len(hub.requests)
        succeed(OFFLINE, REPO, out, HF_HOME=home, HF_HUB_OFFLINE="1")
        assert len(hub.requests) == requests
    load = torch.load
    return {
        "x": x,
        "hub": hub,
        "first": first,
        "published": published,
        "picture": picture,
        "stranger": load(out, weights_only=True),
        "offline": load(out + ".offline", weights_only=True),
        "timm": load(out + ".timm", weights_only=True),
        "answers": json.loads(Path(out + ".json").read_text()),
        "adaptive": json.loads(Path(out + ".timm.json").read_text()),
    }


@pytest.fixture(scope="module")
def local(story):
    """Logits of the local folder, at the published budget and with all queries."""
    model, x = load_model(papers_form()), story["x"]
    with torch.no_grad():
        first = model(x, num_active_queries=16).logits
        second = model(x, dqs_threshold=0.8)
        return {"v1": first, "main": second.logits, "v2": second.logits, "full": model(x).logits, "model": model}


def test_what_the_publisher_sees(story):
    out, repository = story["published"].stdout, story["hub"].repositories[REPO]
    assert "Largest logit difference" in out
    assert "without this package (0)" in out
    assert f"Published v1 (commit {story['first'][:7]}): {story['hub'].url}/{REPO}" in out
    assert [c.title for c in repository.commits.values()] == ["initial commit", "Publish v1", "Publish v2"]
    assert list(repository.tags) == ["v1", "v2"]
    assert "writer" not in story["published"].stdout + story["published"].stderr  # the token


def test_a_stranger_has_the_same_logits_bit_for_bit(story, local):
    found = story["stranger"]
    for revision in ("v1", "v2", "main"):
        assert torch.equal(found[revision], local[revision]), revision
        assert torch.equal(found[f"{revision} full"], local["full"])
    assert torch.equal(found[story["first"]], local["v1"])
    assert not torch.equal(local["v1"], local["main"])
    assert torch.equal(local["model"].head(found["base"]), local["main"])


def test_nothing_trusts_code_by_itself(story):
    assert "trust_remote_code" in story["answers"]["untrusting"]


def test_the_cache_works_without_a_network(story, local):
    assert torch.equal(story["offline"]["main"], local["main"])
    assert torch.equal(story["offline"]["v1"], local["v1"])


def test_timm_and_transformers_with_the_package(story, local):
    from_folder = timm.create_model(f"local-dir:{papers_form()}", pretrained=True).eval()
    with torch.no_grad():
        expected = from_folder(story["x"], num_active_queries=16), from_folder(story["x"], dqs_threshold=0.8)
    assert torch.equal(story["timm"]["v1"], expected[0])
    assert torch.equal(story["timm"]["main"], expected[1])
    assert torch.equal(story["timm"]["transformers"], local["main"])
    # timm copies the weights, transformers maps the file: rounding may depend on where they lie in memory.
    assert torch.allclose(story["timm"]["main"], local["main"], atol=1e-5)


def test_push_to_hub_of_both_libraries(story, local):
    assert torch.equal(story["stranger"]["pushed"], local["full"])
    assert torch.allclose(story["timm"]["pushed"], local["full"], atol=1e-5)
    for repo in (PUSHED, IN_TIMM):
        names = set(story["hub"].repositories[repo].files())
        assert "model.safetensors" in names
        assert not any(name.endswith((".bin", ".pt")) for name in names)


def test_the_snapshot_is_what_was_published(story):
    repository = story["hub"].repositories[REPO]
    assert story["answers"]["files"] == sorted(repository.files("v1"))
    weights = Path(papers_form(), "model.safetensors").read_bytes()
    assert repository.files("v1")["model.safetensors"] == weights
    assert story["answers"]["weights"] in story["hub"].blobs
    card = ModelCard(repository.files()["README.md"].decode())
    assert card.data.pipeline_tag == "image-classification"
    assert f'from_pretrained("{REPO}"' in card.text


def test_pipelines(story):
    stock, adaptive = story["answers"]["pipeline"], story["adaptive"]
    assert len(stock) == 5
    assert [a["label"] for a in stock] == [a["label"] for a in adaptive["default"]]
    assert [a["score"] for a in stock] == pytest.approx([a["score"] for a in adaptive["default"]], abs=1e-5)
    assert {a["queries_used"] for a in adaptive["k"]} == {5}
    assert adaptive["default"][0]["queries_used"] < 64  # the published threshold


def test_the_endpoint(story):
    answers = story["answers"]
    assert len(answers["endpoint default"]) == 2
    assert answers["endpoint default"][0]["queries_used"] == 16  # v1's operating point
    assert answers["endpoint k"][0]["queries_used"] == 5
    assert answers["endpoint t"][0]["queries_used"] < 64
    assert answers["endpoint t"][0]["label"] == answers["pipeline"][0]["label"]
    assert answers["endpoint t"][0]["score"] == pytest.approx(answers["pipeline"][0]["score"], abs=1e-5)
