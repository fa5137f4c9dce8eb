"""Publish a checkpoint's folder on the Hub: check it, upload it in one commit, and tag the commit."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import HfApi, RepoFile
from huggingface_hub.utils import validate_repo_id

from hf_visual_perceiver.evaluation.calibration import with_default
from hf_visual_perceiver.hub.errors import hub_step
from hf_visual_perceiver.hub.folder_check import check_folder
from hf_visual_perceiver.hub.page import hub_card, read_card
from hf_visual_perceiver.hub.space.demo import check_sliders
from hf_visual_perceiver.inference.loading import load_config
from hf_visual_perceiver.modeling import FAMILIES, handler


# Formats that can run code when they are loaded, or that hold weights in another format than safetensors.
UNSAFE = {".bin", ".ckpt", ".h5", ".joblib", ".msgpack", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
VERSION = re.compile(r"v(\d+)")


@dataclass(frozen=True)
class Plan:
    """The planned content of a repository: exactly the files in `stage`, with their sizes in bytes, in path order."""

    stage: Path
    sizes: dict[str, int]
    config: Any
    differences: dict[str, float]  # largest difference of a logit, by way of loading


@dataclass(frozen=True)
class Published:
    """A published checkpoint."""

    repo_id: str
    url: str
    commit: str
    tag: str
    changed: bool  # False if the repository already had the same content
    private: bool


def prepare(
    folder: Path,
    repo_id: str,
    stage: Path,
    *,
    budget: str | None = None,
    space: str | None = None,
    endpoint: str = "https://huggingface.co",
    check: Callable[[Path], dict[str, float]] = check_folder,
) -> Plan:
    """Stage the files to upload and check them; `folder` is not changed, and nothing leaves this machine.

    The stage links to the folder's files and has its own config.json (with the budget), README.md (see `hub_card`),
    and, unless the folder has them, handler.py and requirements.txt for Inference Endpoints.

    Args:
        folder: The checkpoint's folder.
        repo_id: Repository on the Hub, "namespace/name".
        stage: An empty folder for the staged files.
        budget: Default budget of the published config.json, such as "K=16"; None keeps the folder's.
        space: Id of a Space for the card to link to.
        endpoint: URL of the Hub.
        check: Called with the stage; raises a `ValueError` if the ways of loading it do not agree.

    Raises:
        ValueError: If the folder cannot be published as it is, an argument is not as described, or a Space cannot show
            the model.
    """
    for name in filter(None, (repo_id, space)):
        if name.count("/") != 1:
            raise ValueError(f"Expected an id of the form namespace/name, got {name!r}.")
        validate_repo_id(name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"Expected the folder of a checkpoint, with a config.json, got {str(folder)!r}.")
    files = list_files(folder)
    card = read_card(folder / "README.md")
    values = json.loads((folder / "config.json").read_text())
    if budget is not None:
        values = with_default(values, load_config(str(folder)).parse_budget(budget), str(folder / "config.json"))
    for name in files:
        if name not in ("config.json", "README.md"):
            _link(folder / name, stage / name)
    (stage / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    config = load_config(str(stage))
    if space is not None:
        check_sliders(config)
    (stage / "README.md").write_text(hub_card(card, folder, config, repo_id, f"{endpoint}/{repo_id}", space))
    if "handler.py" not in files:
        shutil.copyfile(handler.__file__, stage / "handler.py")
    if "requirements.txt" not in files:
        (stage / "requirements.txt").write_text(endpoint_requirements())
    sizes = {name: (stage / name).stat().st_size for name in list_files(stage)}
    return Plan(stage, sizes, config, check(stage))


def list_files(folder: Path) -> list[str]:
    """List a checkpoint's files to publish, as relative paths; hidden files and caches are left out.

    Raises:
        ValueError: If there are weights in an unsafe format, or a file contains an access token.
    """
    names = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        names += [(Path(place) / name).relative_to(folder).as_posix() for name in files if not name.startswith(".")]
    for name in names:
        path = folder / name
        if path.suffix.lower() in UNSAFE:
            raise ValueError(
                f"Expected only safetensors weights in {folder}, got {name}, which can contain code; remove it first."
            )
        if path.stat().st_size < 2**20 and TOKEN.search(path.read_bytes()):
            raise ValueError(f"Expected no access token in {folder}, got {name}, which seems to contain one.")
    return sorted(names)


def endpoint_requirements() -> str:
    """The requirements of an Inference Endpoint: this package's own requirement on transformers."""
    return "".join(f"{r}\n" for r in requires("hf-visual-perceiver") or [] if re.match(r"transformers\b", r))


def upload(
    plan: Plan,
    repo_id: str,
    *,
    private: bool = False,
    revision: str = "main",
    tag: str | None = None,
    api: HfApi | None = None,
) -> Published:
    """Create the repository if needed, upload the plan's files in one commit, and tag it.

    After any failure the branch holds either all of the new files or none, and the same call can be repeated. Weights
    and code of an earlier publication that are not in the plan are removed in the same commit; other files of the
    repository stay.

    Args:
        plan: Plan from `prepare`.
        repo_id: Repository on the Hub, "namespace/name".
        private: Create a private repository.
        revision: Branch to commit to; created from main if it does not exist.
        tag: Tag for the commit; by default the next free one of v1, v2, ...
        api: Hub client with the endpoint and token to use; by default those of huggingface_hub.

    Raises:
        ValueError: If the repository holds another model, is public although `private` is asked for, or the tag is taken.
        HubError: If a step fails.
    """
    api = api or HfApi()
    state = "Nothing was uploaded. Run the same command to try again."
    with hub_step(f"preparing {repo_id}", state, api):
        api.whoami()
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        info, refs = api.model_info(repo_id), api.list_repo_refs(repo_id)
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    branches = {ref.name: ref.target_commit for ref in refs.branches}
    if private and not info.private:
        raise ValueError(
            f"Expected {repo_id} to be private, but it is there and public. Its settings page changes that."
        )
    if revision in tags:
        raise ValueError(f"Expected a branch of {repo_id} to commit to, got its tag {revision}.")
    with hub_step(f"looking at {repo_id}", state, api):
        if revision not in branches:
            api.create_branch(repo_id, branch=revision)
        head = branches.get(revision, branches.get("main", info.sha or ""))
        entries = api.list_repo_tree(repo_id, recursive=True, revision=head)
        there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        model = _model_there(api, repo_id, head, there, plan.stage.parent)
    if model is not None:
        raise ValueError(f"Expected {repo_id} to be new or to hold one of our models; the name is taken by {model}.")
    gone = [name for name in there if name not in plan.sizes and _is_weights_or_code(name)]
    changed = bool(gone) or any(name not in there or not _same(plan.stage / name, there[name]) for name in plan.sizes)
    tag = tag or _next_tag(tags, None if changed else head)
    if tag in tags and (changed or tags[tag] != head):
        raise ValueError(f"Expected a free tag, but {tag} of {repo_id} is there, at {tags[tag][:7]}.")

    commit = head
    if changed:
        state = "The branch holds all of the new files or none. Run the same command to continue."
        with hub_step(f"uploading to {repo_id}", state, api):
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=plan.stage,
                delete_patterns=gone,
                commit_message=f"Publish {tag}",
                revision=revision,
                parent_commit=head,  # somebody else's commit in between is not overwritten
            ).oid
    if tag not in tags:
        state = f"Commit {commit[:7]} is there, without its tag. Run the same command to add it."
        with hub_step(f"tagging {repo_id}", state, api):
            api.create_tag(repo_id, tag=tag, revision=commit)
    return Published(repo_id, f"{api.endpoint}/{repo_id}", commit, tag, changed, bool(info.private))


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source.resolve())
    except OSError:  # Windows may not allow symbolic links
        shutil.copyfile(source, target)


def _model_there(api: HfApi, repo_id: str, commit: str, there: dict[str, RepoFile], scratch: Path) -> str | None:
    """Describe the foreign content of a repository; None if it is empty or holds one of our models."""
    if not set(there) - {".gitattributes", "README.md"}:
        return None
    if "config.json" not in there:
        return "files without a config.json"
    path = api.hf_hub_download(repo_id, "config.json", revision=commit, local_dir=scratch / "there")
    config = json.loads(Path(path).read_text())
    kind = str(config.get("model_type") or config.get("architecture"))
    return None if kind.startswith(tuple(FAMILIES)) else f"a model of type {kind}"


def _same(path: Path, entry: RepoFile) -> bool:
    with path.open("rb") as file:
        return is_on_hub(file, path.stat().st_size, entry)


def is_on_hub(file: BinaryIO, size: int, entry: RepoFile) -> bool:
    """Whether a file has the same content as one on the Hub, compared by git's hash, or by sha256 for LFS files."""
    if size != entry.size:
        return False
    digest = hashlib.sha1(b"blob %d\0" % entry.size) if entry.lfs is None else hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest() == (entry.blob_id if entry.lfs is None else entry.lfs.sha256)


def _is_weights_or_code(name: str) -> bool:
    suffix = Path(name).suffix.lower()
    return suffix in UNSAFE | {".safetensors", ".py"} or name.endswith(".safetensors.index.json")


def _next_tag(tags: dict[str, str], commit: str | None) -> str:
    """The newest tag of the commit if it has one, or else the next free one of v1, v2, ..."""
    versions = {name: int(match[1]) for name in tags if (match := VERSION.fullmatch(name))}
    at_commit = [name for name, target in tags.items() if target == commit]
    if at_commit:
        return max(at_commit, key=lambda name: versions.get(name, 0))
    return f"v{max(versions.values(), default=0) + 1}"
