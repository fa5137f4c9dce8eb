"""Publishing: the staged files, and every row of the fault table in docs/publishing.md against a local Hub server."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import File, Hub
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from support import PATIENCE, REPOSITORY, papers_form, small_config

from hf_visual_perceiver.cli import main as cli
from hf_visual_perceiver.hub import folder_check
from hf_visual_perceiver.hub import publish as publishing
from hf_visual_perceiver.hub.errors import HubError, hub_step
from hf_visual_perceiver.hub.folder_check import check_folder
from hf_visual_perceiver.hub.publish import prepare
from hf_visual_perceiver.hub.space.repository import space_files
from hf_visual_perceiver.inference.loading import load_config, load_model
from hf_visual_perceiver.modeling import VisualPerceiverForImageClassification
from hf_visual_perceiver.training.folder import save_folder


REPO = "somebody/perceiver"
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
---

# small

model = AutoModelForImageClassification.from_pretrained("small", trust_remote_code=True)

## Training

Not recorded.
"""


def save_small(folder: Path) -> Path:
    save_folder(VisualPerceiverForImageClassification(small_config()), folder, {"README.md": CARD})
    (folder / "examples").mkdir()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(folder / "examples" / "000_red.png")
    return folder


@pytest.fixture
def small(tmp_path):
    """A small checkpoint, quick to stage."""
    return save_small(tmp_path / "small")


def laid_out(folder, tmp_path, check=lambda stage: {}, **options):
    stage = tmp_path / "stage"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    return prepare(folder, REPO, stage, check=check, **options)


def bundled(name: str) -> Path:
    """The checkpoint of another family in the repository."""
    return REPOSITORY / "checkpoints" / f"{name}_nano_cifar10"


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class TestLayout:
    def test_the_folder_stays_as_it_is(self, small, tmp_path):
        before = contents(small)
        plan = laid_out(small, tmp_path, budget="K=3, t=0.5")
        assert contents(small) == before
        assert set(plan.sizes) == set(before) | {"handler.py", "requirements.txt"}
        assert plan.sizes == {name: len(data) for name, data in contents(plan.stage).items()}
        # Weights are not copied: a large checkpoint needs no space twice.
        assert (plan.stage / "model.safetensors").is_symlink()
        config = json.loads((plan.stage / "config.json").read_text())
        for place in (config, config["model_args"]):  # transformers' and timm's
            assert (place["num_active_queries"], place["dqs_threshold"]) == (3, 0.5)
        assert load_model(str(plan.stage)).config.operating_point() == (3, 0.5)

    def test_without_an_operating_point_the_config_says_the_same(self, small, tmp_path):
        plan = laid_out(small, tmp_path)
        assert json.loads((plan.stage / "config.json").read_text()) == json.loads((small / "config.json").read_text())

    def test_a_point_replaces_the_whole_of_the_old_one(self, small, tmp_path):
        plan = laid_out(small, tmp_path, budget="t=0.5")
        shutil.copyfile(plan.stage / "config.json", small / "config.json")
        assert laid_out(small, tmp_path, budget="K=3").config.operating_point() == (3, None)

    def test_the_card_of_the_page(self, small, tmp_path):
        plan = laid_out(small, tmp_path, budget="K=3", space="somebody/demo")
        card = ModelCard.load(plan.stage / "README.md")
        url = f"https://huggingface.co/{REPO}"
        assert card.data.widget == [{"src": f"{url}/resolve/main/examples/000_red.png", "example_title": "red"}]
        assert f'from_pretrained("{REPO}"' in card.text
        assert "uses the budget K=3" in card.text
        assert "`num_active_queries=12` selects the full network" in card.text
        assert "https://huggingface.co/spaces/somebody/demo" in card.text
        assert "does not run models with their own code" in card.text
        assert card.text.index("## On the Hub") < card.text.index("## Training")
        # A folder fetched from the Hub and published again has the section once, and what it says is of now.
        shutil.copyfile(plan.stage / "README.md", small / "README.md")
        again = (laid_out(small, tmp_path).stage / "README.md").read_text()
        assert again.count("## On the Hub") == 1
        assert "uses the full network" in again
        assert "selects the full network" not in again
        assert "demo" not in again

    def test_the_bundled_card_reads_as_the_hub_reads_it(self, tmp_path):
        bundled = Path(papers_form())
        plan = laid_out(bundled, tmp_path)
        before, after = (ModelCard.load(folder / "README.md") for folder in (bundled, plan.stage))
        for key in ("pipeline_tag", "library_name", "license", "datasets", "metrics"):
            assert after.data.get(key) == before.data.get(key) is not None
        assert after.data.eval_results == before.data.eval_results
        assert len(after.data.eval_results) == 13
        assert (
            "visual_perceiver_nano_cifar10"
            not in after.text[after.text.index("## Use") : after.text.index("## On the Hub")]
        )
        assert f'timm.create_model("hf-hub:{REPO}"' in after.text
        assert [example["example_title"] for example in after.data.widget] == ["cat", "ship", "ship"]

    def test_the_whole_network_in_the_cards_code_stays_the_whole_one(self, tmp_path):
        for budget, arguments in (
            ("K=32", ", num_active_queries=64"),
            ("t=0.8", ', dqs_threshold=float("inf")'),
            ("K=32, t=0.8", ', num_active_queries=64, dqs_threshold=float("inf")'),
            ("K=64", ""),
            (None, ""),
        ):
            text = (laid_out(Path(papers_form()), tmp_path, budget=budget).stage / "README.md").read_text()
            assert f"full = model(**inputs{arguments}).logits" in text

    @pytest.mark.parametrize(
        ("name", "budget", "arguments"),
        [
            ("dvt", "p=0.7", 'exit_thresholds=[float("inf"), float("inf")]'),
            ("dvt", "exit=2", "max_exit=3"),
            ("lookupvit", "grid=5", "compressed_size=8"),
            ("perceiver", "i=2", "num_iterations=4"),
        ],
    )
    def test_the_whole_network_of_other_families(self, tmp_path, name, budget, arguments):
        plan = laid_out(bundled(name), tmp_path, budget=budget)
        text = (plan.stage / "README.md").read_text()
        assert f"full = model(**inputs, {arguments}).logits" in text
        assert f"uses the budget {budget} " in text
        assert f"`{arguments}` selects the full network" in text
        given = eval(f"dict({arguments})", {"float": float})
        assert plan.config.knobs_for(**given) == plan.config.resolve()

    def test_a_network_without_knobs(self, tmp_path):
        text = (laid_out(bundled("qna_vit"), tmp_path).stage / "README.md").read_text()
        assert "By default, this model uses the full network.\n" in text
        assert "`handler.py` serves the model:\n" in text

    @pytest.mark.parametrize(
        ("name", "knobs"),
        [
            ("dvt", "the knobs max_exit, exit_thresholds"),
            ("perceiver", "the knobs num_active_queries, num_iterations"),
            ("qna_vit", "no knobs"),
        ],
    )
    def test_a_space_that_could_not_start(self, tmp_path, name, knobs):
        with pytest.raises(ValueError, match=f"num_active_queries and dqs_threshold, .*, got one with {knobs}"):
            laid_out(bundled(name), tmp_path, space="somebody/demo")
        assert laid_out(bundled(name), tmp_path).sizes

    def test_the_endpoints_requirement_is_the_packages(self):
        assert publishing.endpoint_requirements().startswith("transformers")
        assert len(publishing.endpoint_requirements().splitlines()) == 1

    def test_hidden_files_and_caches_stay_here(self, small):
        for name in (".env", ".git/config", "__pycache__/x.pyc"):
            (small / name).parent.mkdir(exist_ok=True)
            (small / name).write_text("secret")
        assert set(publishing.list_files(small)) == set(contents(save_small(small.parent / "clean")))

    @pytest.mark.parametrize("text", ["16", "K=", "K=1.5", "dqs=0.8", "K=3,K=4", "K=3;t=1"])
    def test_texts_that_are_no_budget(self, small, tmp_path, text):
        with pytest.raises(ValueError, match="Expected"):
            laid_out(small, tmp_path, budget=text)


def spoil(name, content):
    def change(folder):
        (folder / name).write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (spoil("optimizer.pt", b"x"), {}, "Expected only safetensors weights in .*, got optimizer.pt"),
        (spoil("pytorch_model.bin", b"x"), {}, "Expected only safetensors weights in .*, got pytorch_model.bin"),
        (spoil("notes.txt", b"login with hf_" + b"a" * 34), {}, "Expected no access token in .*, got notes.txt"),
        (lambda folder: (folder / "README.md").unlink(), {}, "Expected a model card at .*--write-card` writes one"),
        (spoil("README.md", b"---\nlicense: mit\n---\n"), {}, "Expected the metadata of .* to have `pipeline_tag`"),
        (spoil("README.md", b"---\nlicense: [mit\n---\n"), {}, "Cannot read the metadata of"),
        (
            spoil("README.md", CARD.replace("image-cl", "text-cl").encode()),
            {},
            "to be image-classification, got 'text-cl",
        ),
        (lambda folder: (folder / "config.json").unlink(), {}, "with a config.json"),
        (spoil("config.json", b'{"model_type": "vit"}'), {}, "Expected a model of type visual_perceiver"),
        (lambda folder: None, {"budget": "K=13"}, r"integer in \[1, 12\], got 13"),
        (lambda folder: None, {"budget": "t=-2"}, "at least -1, got -2"),
        (lambda folder: None, {"space": "demo"}, "form namespace/name, got 'demo'"),
    ],
)
def test_folders_that_are_not_fit(small, tmp_path, change, options, message):
    change(small)
    with pytest.raises(ValueError, match=message) as error:
        laid_out(small, tmp_path, **options)
    assert "a" * 34 not in str(error.value)


class TestCheck:
    """The bundled checkpoint passes in tests/hub/test_hub.py."""

    @pytest.mark.parametrize("name", ["dvt", "lookupvit", "perceiver_io", "qna_vit"])
    def test_every_family(self, tmp_path, name):
        differences = laid_out(bundled(name), tmp_path, check=check_folder).differences
        assert len(differences) == 2
        assert max(differences.values()) < 1e-4

    def test_other_weights_of_the_model_without_a_head_are_found(self, stage):
        spoiled = """
def spoiled(*arguments, load=VisualPerceiverModel.from_pretrained, **options):
    model = load(*arguments, **options)
    torch.nn.init.zeros_(next(model.parameters()))
    return model


VisualPerceiverModel.from_pretrained = spoiled
"""
        self.change(stage, "modeling_visual_perceiver.py", lambda text: f"{text}{spoiled}")
        with pytest.raises(ValueError, match="AutoModel and AutoModelForImageClassification to load the same weights"):
            check_folder(stage)

    @pytest.fixture
    def stage(self, small, tmp_path):
        return laid_out(small, tmp_path).stage

    def change(self, stage, name, change):
        text = (stage / name).read_text()
        (stage / name).unlink()  # a link to the user's folder
        (stage / name).write_text(change(text))

    def test_broken_code_is_found_and_sees_no_token(self, stage, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        seen = "import os; raise RuntimeError(f'found {[v for v in os.environ.values() if v.startswith(chr(104) + chr(102) + chr(95))]}')"
        self.change(stage, "modeling_visual_perceiver.py", lambda text: f"{text}\n{seen}\n")
        with pytest.raises(
            ValueError, match=r"Without this package, transformers cannot load .*: RuntimeError: found \[\]"
        ):
            check_folder(stage)

    def test_other_logits_are_found(self, stage, monkeypatch):
        def other(folder, pixels, points, timeout):
            return [torch.zeros(4, 5) for _ in points]

        monkeypatch.setattr(folder_check, "_logits_without_package", other)
        with pytest.raises(
            ValueError, match=r"loaded by transformers, without this package, got a difference of .* at its defaults"
        ):
            check_folder(stage)
        monkeypatch.setattr(folder_check, "_logits_without_package", lambda *a: [torch.zeros(4, 3)] * 4)
        with pytest.raises(ValueError, match="a difference of inf"):
            check_folder(stage)

    def test_what_timm_cannot_load_is_found(self, stage, monkeypatch):
        model = load_model(str(stage))

        def same(folder, pixels, points, timeout):
            return [model(pixels, **point).logits.detach() for point in points]

        monkeypatch.setattr(folder_check, "_logits_without_package", same)
        assert check_folder(stage)["timm"] < 1e-5
        self.change(stage, "config.json", lambda text: text.replace("visual_perceiver_tiny_patch4_32", "resnet18"))
        with pytest.raises(ValueError, match=r"timm cannot load|when loaded by timm"):
            check_folder(stage)

    def test_the_command_says_it_in_one_line(self, hub, small, publish, monkeypatch):
        def check(stage):
            raise ValueError("Without this package, transformers cannot load it: ImportError")

        monkeypatch.setattr(publishing, "prepare", partial(prepare, check=check))
        code, _, err = publish(small)
        assert code == 1
        assert err == "error: Without this package, transformers cannot load it: ImportError\n"
        assert hub.requests == []


# The fault table.


@pytest.fixture(scope="module")
def running():
    with Hub() as hub:
        yield hub


@pytest.fixture
def hub(running, monkeypatch, tmp_path):
    """An empty local Hub; huggingface_hub uses it, without waiting between retries."""
    running.reset()
    for name, value in {
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_TOKEN_PATH": str(tmp_path / "none"),
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    return running


@pytest.fixture
def publish(hub, monkeypatch, capsys):
    """Run the command in this process, without the folder check; return its exit status and output."""
    monkeypatch.setattr(publishing, "prepare", partial(prepare, check=lambda stage: {"timm": 0.0}))

    def command(folder, *options, repo=REPO, token="writer", endpoint=None):
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda **kw: HfApi(endpoint=endpoint or hub.url, token=token))
        monkeypatch.setattr("sys.argv", ["visual-perceiver", "publish", str(folder), repo, *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return stop.value.code, printed.out, printed.err

    return command


def test_publishing(hub, small, publish):
    code, out, err = publish(small, "--budget", "K=3")
    assert (code, err) == (0, "")
    repository = hub.repositories[REPO]
    # One commit on the initial one, with everything, and its tag.
    assert [c.title for c in repository.commits.values()] == ["initial commit", "Publish v1"]
    assert repository.tags == {"v1": repository.branches["main"]}
    assert not repository.private
    files = repository.files()
    here = contents(small)
    assert set(files) == set(here) | {"handler.py", "requirements.txt", ".gitattributes"}
    assert {name for name in here if files[name] != here[name]} == {"config.json", "README.md"}
    assert files["handler.py"] == (REPOSITORY / "modeling" / "handler.py").read_bytes()
    for line in (f"{hub.url}/{REPO}", f'"{REPO}", revision="v1", trust_remote_code=True', f'"hf-hub:{REPO}@v1"'):
        assert line in out
    assert re.search(r"model\.safetensors +\d+\.\d kB", out)
    assert "Default budget: K=3" in out

    # The same again changes nothing; something new is the next version, and what it dropped is gone.
    code, out, _ = publish(small, "--budget", "K=3")
    assert code == 0
    assert "Nothing changed since v1" in out
    assert len(repository.commits) == 2
    (small / "helper.py").write_text("")
    publish(small)
    (small / "helper.py").unlink()
    repository.branches["main"] = repository.commit(
        "main", {**repository.commits[repository.branches["main"]].files, "demo.gif": File(b"x", False)}, "by hand"
    )
    assert publish(small)[0] == 0
    assert list(repository.tags) == ["v1", "v2", "v3"]
    assert "helper.py" in repository.files("v2")
    assert "helper.py" not in repository.files()
    assert "demo.gif" in repository.files()  # not ours to remove


def test_private_on_a_branch_with_a_tag(hub, small, publish):
    code, out, _ = publish(small, "--private", "--revision", "trial", "--tag", "first")
    assert code == 0
    repository = hub.repositories[REPO]
    assert repository.private
    assert ", private)" in out
    assert set(repository.files("main")) == {".gitattributes"}
    assert repository.tags == {"first": repository.branches["trial"]}
    assert "model.safetensors" in repository.files("first")


def test_a_dry_run_contacts_nobody(hub, small, publish):
    code, out, err = publish(small, "--dry-run")
    assert (code, err, hub.requests) == (0, "", [])
    assert "model.safetensors" in out
    assert "nothing was sent" in out


@pytest.mark.parametrize(
    "repo_id", ["perceiver", "../../etc/passwd", "../etc", "a/b/c", "a/..", "a/.", "a/b--c/", "/a", "a/b\n"]
)
def test_ids_that_lead_elsewhere(hub, small, publish, tmp_path, monkeypatch, repo_id):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    before = contents(tmp_path)
    code, _, err = publish(small, repo=repo_id)
    assert code == 1
    assert re.match(r"error: Expected an id of the form namespace/name|error: Repo id must", err), err
    assert hub.requests == []
    assert contents(tmp_path) == before


UPLOAD = ("PUT", "/lfs/")
COMMIT = ("POST", "/commit/")
TAG = ("POST", "/tag/")

# Name in the table of docs/publishing.md: (faults, options of the command, what is printed, whether a commit is made).
FAULTS = {
    "No token": ([], {"token": None}, "Token is required", False),
    "Token not accepted (401)": ([], {"token": "stale"}, "Invalid user token", False),
    "No right to write there (403)": ([], {"token": "reader"}, "403 Forbidden", False),
    "Name reserved by somebody (409)": (
        [("POST", "/repos/create", {"status": 409, "times": 1, "reply": {"url": "HUB/" + REPO}})],
        {},
        "Repository Not Found",
        False,
    ),
    "The Hub fails (500) before the upload": (
        [("POST", "/repos/create", {"status": 500})],
        {},
        "as the test asked (while preparing",
        False,
    ),
    "The Hub fails (500) in the upload": ([(*UPLOAD, {"status": 500})], {}, "500 Internal Server Error", False),
    "The Hub fails (500) at the commit": ([(*COMMIT, {"status": 500})], {}, "500 Internal Server Error", False),
    "Too many requests (429)": ([(*COMMIT, {"status": 429})], {}, "429 Too Many Requests", False),
    "Connection cut in the middle of the weights": ([(*UPLOAD, {"drop": True})], {}, "(while uploading", False),
    "Weights damaged on the way (checksum)": ([(*UPLOAD, {"corrupt": True})], {}, "BadDigest", False),
    "Connection cut before the commit": ([(*COMMIT, {"drop": True})], {}, "all of the new files or none", False),
    "Connection cut after the commit": ([(*COMMIT, {"drop_after": True})], {}, "all of the new files or none", True),
    "The Hub fails (500) at the tag": ([(*TAG, {"status": 500})], {}, "is there, without its tag", True),
    "No Hub to be reached": (
        [],
        {"endpoint": "http://127.0.0.1:9"},
        "Connection refused",
        False,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(hub, small, publish, fault):
    faults, options, message, committed = FAULTS[fault]
    for method, path, what in faults:
        hub.fail(method, path, **what)
        hub.faults[-1].reply = {k: v.replace("HUB", hub.url) for k, v in hub.faults[-1].reply.items()}
    code, _, err = publish(small, **options)
    assert code == 1
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert message in err
    assert "the same command" in err
    assert "signature" not in err
    # Whole or not at all.
    repository = hub.repositories.get(REPO)
    if committed:
        assert set(repository.files()) >= set(contents(small))
    else:
        assert repository is None or set(repository.files()) == {".gitattributes"}
    if repository is not None:
        assert repository.tags == {}
    # And it can be repeated.
    hub.faults.clear()
    code, _, err = publish(small)
    assert (code, err) == (0, "")
    repository = hub.repositories[REPO]
    assert set(repository.files("v1")) >= set(contents(small))
    assert len(repository.commits) == 2
    assert repository.tags == {"v1": repository.branches["main"]}


def test_a_short_interruption_is_bridged(hub, small, publish):
    hub.fail(*UPLOAD, drop=True, times=1)
    hub.fail("POST", "/objects/batch", status=503, times=2)
    hub.fail("POST", "/preupload/", status=429, times=1)
    hub.fail("POST", "/commit/", delay=0.3)
    assert publish(small)[0] == 0
    assert set(hub.repositories[REPO].files("v1")) >= set(contents(small))


def test_the_name_is_taken_by_another_model(hub, small, publish):
    publish(small)
    repository = hub.repositories[REPO]
    repository.commit("main", {"config.json": File(b'{"model_type": "vit"}', False)}, "a ViT")
    code, _, err = publish(small)
    assert code == 1
    assert "the name is taken by a model of type vit" in err
    assert set(repository.files()) == {"config.json"}
    repository.commit("main", {"thesis.tex": File(b"precious", False)}, "a thesis")
    assert "taken by files without a config.json" in publish(small)[2]
    assert repository.files() == {"thesis.tex": b"precious"}


def test_there_but_public(hub, small, publish):
    publish(small)
    code, _, err = publish(small, "--private")
    assert code == 1
    assert "to be private, but it is there and public" in err
    assert len(hub.repositories[REPO].commits) == 2


def test_the_tag_is_taken(hub, small, publish):
    publish(small, "--tag", "release")
    assert "Nothing changed since release" in publish(small)[1]
    (small / "notes.txt").write_text("new")
    code, _, err = publish(small, "--tag", "release")
    assert code == 1
    assert "Expected a free tag, but release of somebody/perceiver is there" in err
    assert (
        "a branch of somebody/perceiver to commit to, got its tag release" in publish(small, "--revision", "release")[2]
    )
    assert len(hub.repositories[REPO].commits) == 2


def test_somebody_commits_meanwhile(hub, small, publish, monkeypatch):
    original = HfApi.preupload_lfs_files

    def meanwhile(self, *arguments, **options):
        original(self, *arguments, **options)
        if len(hub.repositories[REPO].commits) == 1:  # create_commit calls this again
            hub.repositories[REPO].commit("main", {".gitattributes": File(b"", False)}, "theirs")

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "preupload_lfs_files", meanwhile)
        code, _, err = publish(small)
    assert code == 1
    assert "412 Precondition Failed" in err
    assert [c.title for c in hub.repositories[REPO].commits.values()] == ["initial commit", "theirs"]
    assert publish(small)[0] == 0


@pytest.mark.parametrize(
    ("method", "state"), [("preupload_lfs_files", "all of the new files or none"), ("create_tag", "without its tag")]
)
def test_interrupted(hub, small, publish, monkeypatch, method, state):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, method, interrupt)
        code, _, err = publish(small)
    assert code == 130
    assert err.startswith("error: interrupted while ")
    assert state in err
    assert len(err.strip().splitlines()) == 1
    assert publish(small)[0] == 0
    assert set(hub.repositories[REPO].files("v1")) >= set(contents(small))


def test_a_real_ctrl_c(hub, small, tmp_path):
    """Send SIGINT during the upload of the weights, then run the command again."""
    code = (
        "import sys; from functools import partial; from hf_visual_perceiver.cli import main as cli; from hf_visual_perceiver.hub import publish as c;"
        # Where the tests run in a shell's background, SIGINT is ignored, also by the processes they start.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "c.prepare = partial(c.prepare, check=lambda stage: {}); sys.argv = ['visual-perceiver', *sys.argv[1:]]; cli.main()"
    )
    hub.fail(*UPLOAD, delay=5)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "writer", "HF_HUB_DISABLE_XET": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "publish", small, REPO],
        env={**environment, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not any(request.startswith("PUT") for request in hub.requests):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith(
        "error: interrupted while uploading to somebody/perceiver. The branch holds all of the new files or none"
    )
    assert "Traceback" not in err
    assert set(hub.repositories[REPO].files()) == {".gitattributes"}
    assert not list(tmp_path.glob("visual-perceiver-*"))


def test_the_disk_is_full(hub, small, publish, monkeypatch, tmp_path):
    def full(self, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = sorted(p.name for p in tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        code, _, err = publish(small)
    assert code == 1
    assert err.startswith("error: [Errno 28] No space left on device")
    assert len(err.strip().splitlines()) == 1
    assert hub.requests == []
    assert sorted(p.name for p in tmp_path.iterdir()) == before  # what was laid out is gone
    assert publish(small)[0] == 0


# The Space, which comes after the model.

SPACE = "somebody/demo"
SPACE_COMMIT = ("POST", "^/api/spaces/.*/commit/")

# Name in the table: (fault, Space, what is printed, whether the model is there, whether the Space's files are).
SPACE_FAULTS = {
    "Space: the Hub fails (500) before anything": (
        ("GET", "^/api/spaces/", {"status": 500}),
        SPACE,
        "as the test asked (while looking at the Space",
        False,
        False,
    ),
    "Space: no right to write there (403)": (None, "another/demo", "403 Forbidden", True, False),
    "Space: the Hub fails (500) when it is created": (
        ("POST", "/repos/create", {"status": 500, "skip": 1}),  # the first is the model's
        SPACE,
        "as the test asked (while creating the Space",
        True,
        False,
    ),
    "Space: the Hub fails (500) at its commit": (
        (*SPACE_COMMIT, {"status": 500}),
        SPACE,
        "500 Internal Server Error",
        True,
        False,
    ),
    "Space: too many requests (429)": ((*SPACE_COMMIT, {"status": 429}), SPACE, "429 Too Many Requests", True, False),
    "Space: connection cut before its commit": (
        (*SPACE_COMMIT, {"drop": True}),
        SPACE,
        "(while committing to the Space",
        True,
        False,
    ),
    "Space: connection cut after its commit": (
        (*SPACE_COMMIT, {"drop_after": True}),
        SPACE,
        "(while committing to the Space",
        True,
        True,
    ),
}


class TestSpace:
    def test_it_shows_the_published_commit(self, hub, small, publish):
        code, out, err = publish(small, "--space", SPACE)
        assert (code, err) == (0, "")
        space, model = hub.repositories[f"spaces/{SPACE}"], hub.repositories[REPO]
        assert (space.sdk, space.private) == ("gradio", False)
        assert [c.title for c in space.commits.values()] == ["initial commit", "Show v1"]
        # The very commit, so that another version of the model does not change the Space unasked.
        expected = space_files(REPO, model.branches["main"])
        assert {name: data for name, data in space.files().items() if name != ".gitattributes"} == expected
        assert f"/spaces/{SPACE})" in model.files()["README.md"].decode()
        assert f"{hub.url}/spaces/{SPACE}" in out
        assert re.search(r"hf_visual_perceiver/ +[\d.]+ [kM]B", out)
        assert [r.split("/")[2] for r in hub.requests if "/commit/" in r] == ["models", "spaces"]

        # The same again changes nothing.
        assert "Nothing changed in the Space" in publish(small, "--space", SPACE)[1]
        assert len(space.commits) == 2
        # A new version of the model is shown. Sources that are gone go, what is not ours stays.
        old = {"hf_visual_perceiver/old.py": File(b"", False), "notes.md": File(b"mine", False)}
        space.commit("main", {**space.commits[space.branches["main"]].files, **old}, "by hand")
        (small / "notes.txt").write_text("new")
        assert publish(small, "--space", SPACE)[0] == 0
        assert json.dumps(model.tags["v2"]) in space.files()["app.py"].decode()
        assert "hf_visual_perceiver/old.py" not in space.files()
        assert space.files()["notes.md"] == b"mine"

    def test_a_dry_run_shows_it_and_contacts_nobody(self, hub, small, publish):
        code, out, _ = publish(small, "--space", SPACE, "--dry-run")
        assert (code, hub.requests) == (0, [])
        assert f"to the Space {SPACE}" in out

    def test_both_are_private(self, hub, small, publish):
        _, out, _ = publish(small, "--space", SPACE, "--private")
        assert hub.repositories[REPO].private
        assert hub.repositories[f"spaces/{SPACE}"].private
        assert "secret HF_TOKEN" in out

    @pytest.mark.parametrize("fault", SPACE_FAULTS)
    def test_faults(self, hub, small, publish, fault):
        what, space, message, published, shown = SPACE_FAULTS[fault]
        if what:
            hub.fail(what[0], what[1], **what[2])
        code, out, err = publish(small, "--space", space)
        assert code == 1
        assert err.startswith("error: ")
        assert len(err.strip().splitlines()) == 1
        assert message in err
        assert ("is published" if published else "Nothing was sent.") in err
        assert "the same command" in err
        assert ("Published v1" in out) == published
        self.check(hub, small, space, published, shown)
        # And it can be repeated.
        hub.faults.clear()
        assert publish(small, "--space", SPACE)[0] == 0
        self.check(hub, small, SPACE, True, True)
        assert len(hub.repositories[f"spaces/{SPACE}"].commits) == 2

    def check(self, hub, small, space, published, shown):
        """Check that the model is published with its tag or not at all, and the same for the Space."""
        if published:
            assert set(hub.repositories[REPO].files("v1")) >= set(contents(small))
        else:
            assert REPO not in hub.repositories
        repository = hub.repositories.get(f"spaces/{space}")
        files = set() if repository is None else set(repository.files()) - {".gitattributes"}
        assert files == (set(space_files(REPO, "")) if shown else set())

    def test_the_name_is_taken_by_another_space(self, hub, small, publish):
        HfApi(endpoint=hub.url, token="writer").create_repo(SPACE, repo_type="space", space_sdk="gradio")
        space = hub.repositories[f"spaces/{SPACE}"]
        space.commit("main", {"app.py": File(b"print('precious')", False)}, "mine")
        code, _, err = publish(small, "--space", SPACE)
        assert code == 1
        assert "the name is taken by another one" in err
        assert space.files() == {"app.py": b"print('precious')"}
        assert REPO not in hub.repositories  # found out before anything was sent
        # One that was made on the Hub's page and holds nothing yet is taken over.
        space.commit("main", {"README.md": File(b"new", False), ".gitattributes": File(b"", False)}, "fresh")
        assert publish(small, "--space", SPACE)[0] == 0

    def test_there_but_public(self, hub, small, publish):
        HfApi(endpoint=hub.url, token="writer").create_repo(SPACE, repo_type="space", space_sdk="gradio")
        code, _, err = publish(small, "--space", SPACE, "--private")
        assert code == 1
        assert f"Expected the Space {SPACE} to be private, but it is there and public" in err
        assert REPO not in hub.repositories

    def test_somebody_commits_meanwhile(self, hub, small, publish, monkeypatch):
        original = HfApi.create_commit

        def meanwhile(self, repo_id, *arguments, **options):
            if repo_id == SPACE:
                hub.repositories[f"spaces/{SPACE}"].commit("main", {"README.md": File(b"", False)}, "theirs")
            return original(self, repo_id, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(HfApi, "create_commit", meanwhile)
            code, _, err = publish(small, "--space", SPACE)
        assert code == 1
        assert "412 Precondition Failed" in err
        assert hub.repositories[f"spaces/{SPACE}"].files() == {"README.md": b""}
        assert publish(small, "--space", SPACE)[0] == 0

    def test_interrupted(self, hub, small, publish, monkeypatch):
        original = HfApi.create_commit

        def interrupt(self, repo_id, *arguments, **options):
            if repo_id == SPACE:
                raise KeyboardInterrupt
            return original(self, repo_id, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(HfApi, "create_commit", interrupt)
            code, _, err = publish(small, "--space", SPACE)
        assert code == 130
        assert err.startswith(f"error: interrupted while committing to the Space {SPACE}. {REPO} is published")
        self.check(hub, small, SPACE, True, False)
        assert publish(small, "--space", SPACE)[0] == 0


def test_a_token_is_never_printed(hub, small, publish):
    hub.users = {**Hub.users, "hf_verysecret": "somebody"}
    hub.fail(*COMMIT, status=400, message="bad request by hf_verysecret")
    code, out, err = publish(small, token="hf_verysecret")
    assert code == 1
    assert "bad request by ***" in err
    hub.faults.clear()
    code, more, _ = publish(small, token="hf_verysecret")
    assert code == 0
    assert "hf_verysecret" not in out + err + more
    assert not any(b"hf_verysecret" in data for data in hub.repositories[REPO].files().values())


def test_the_table_in_the_documentation_has_these_rows():
    lines = (REPOSITORY / "docs" / "publishing.md").read_text().split("## When it fails")[1].splitlines()
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:]
    others = [
        "Name taken by another model",
        "`--private`, but there and public",
        "Tag taken",
        "Somebody commits meanwhile",
        "Interrupted (Ctrl-C)",
        "Disk full",
        "Connection cut for a moment, slow Hub",
        "Folder not fit: pickles, a token in a file, no card",
        "Folder does not load everywhere alike",
        "Space: name taken by another one",
        "Space: `--private`, but there and public",
        "Space: somebody commits meanwhile",
        "Space: interrupted (Ctrl-C)",
    ]
    assert sorted(rows) == sorted([*FAULTS, *SPACE_FAULTS, *others])


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (ValueError("first\nsecond"), r"first second \(while trying\)\. Nothing was sent"),
        (KeyError(), r"KeyError \(while"),
        (OSError("cannot read 'https://host/file?signature=abc'"), r"cannot read 'https://host/file' \(while"),
        (OSError("bad token hf_verysecret"), r"bad token \*\*\* \(while"),
    ],
)
def test_reasons_are_one_line_each(reason, message):
    # As huggingface_hub wraps what happens in its upload threads.
    wrapped = RuntimeError("Error while uploading")
    wrapped.__cause__ = reason
    for error in (reason, wrapped):
        with (
            pytest.raises(HubError, match=message),
            hub_step("trying", "Nothing was sent.", HfApi(token="hf_verysecret")),
        ):
            raise error


def test_the_loopback_hub_is_reached_from_this_machine_alone(hub):
    assert hub.server.server_address[0] == "127.0.0.1"


def test_a_config_is_read_without_weights(small):
    (small / "model.safetensors").unlink()
    assert load_config(str(small)).num_queries == 12
