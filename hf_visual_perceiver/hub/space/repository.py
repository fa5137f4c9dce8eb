"""Publish the app as a Space on the Hub: collect its files, and upload them in one commit."""

import io
import json
import re
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile
from huggingface_hub.errors import RepositoryNotFoundError

from hf_visual_perceiver.hub.errors import hub_step
from hf_visual_perceiver.hub.publish import is_on_hub
from hf_visual_perceiver.modeling import handler
from hf_visual_perceiver.training import folder as training_folder


# The versions that the app is tested with.
GRADIO, PYTHON = "6.31.0", "3.12"
PACKAGE = "hf_visual_perceiver"
SOURCES = {".py", ".css"}
GRAPHS = "graphs"  # folder of the ONNX graphs that the app runs
RUNTIME = r"(matplotlib|onnx|onnxscript|onnxruntime)\b"
ELSEWHERE = {"checkpoints", "model_cards"}  # not needed by the app
# The files of a new Space.
FRESH = {".gitattributes", "README.md"}


@dataclass(frozen=True)
class PublishedSpace:
    """A published Space."""

    space: str
    url: str
    commit: str
    changed: bool  # False if the Space already had the same content
    private: bool


def space_files(repo_id: str, revision: str, license: str = "apache-2.0") -> dict[str, bytes]:
    """Collect the files of a Space that shows a checkpoint, as contents by path.

    These are app.py, with the model's repository and revision; README.md, whose metadata configure the Space;
    requirements.txt, with this package's dependencies, ONNX Runtime and the packages that export graphs for it; and the
    sources of this package as they run here, since it may not be on a package index.

    Args:
        repo_id: Hub id of the model.
        revision: Commit of the model; the Space always shows this one.
        license: License of the model.

    Example:
        >>> files = space_files("somebody/perceiver", "v1")
        >>> "hf_visual_perceiver/hub/space/demo.py" in files
        True
    """
    app = f'''"""Demo of {repo_id}. Written by `visual-perceiver publish --space`."""

from {PACKAGE}.hub.space.app import build_app, launch
from {PACKAGE}.hub.space.demo import Demo


demo = build_app(Demo.load({json.dumps(repo_id)}, revision={json.dumps(revision)}))

if __name__ == "__main__":
    launch(demo)
'''
    texts = {"README.md": _readme(repo_id, license), "app.py": app, "requirements.txt": _requirements()}
    return {**{name: text.encode() for name, text in texts.items()}, **_sources()}


def _readme(repo_id: str, license: str) -> str:
    metadata = {
        "title": repo_id.split("/")[1],
        "emoji": "🔎",
        "colorFrom": "yellow",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "python_version": PYTHON,
        "app_file": "app.py",
        "short_description": "Image classifier with adjustable compute",
        "license": license,
        "models": [repo_id],
        "tags": ["vision", "perceiver", "adaptive-computation", "dynamic-query-selection"],
    }
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---

Demo of [{repo_id}](https://huggingface.co/{repo_id}): sliders for K and t show how the answer and its cost change.

`{PACKAGE}/` contains the package that published the Space. The model's own code is not run.
"""


def _requirements() -> str:
    wanted = [
        line for line in requires("hf-visual-perceiver") or [] if "extra ==" not in line or re.match(RUNTIME, line)
    ]
    names = dict.fromkeys(line.partition(";")[0].strip() if "extra ==" in line else line for line in wanted)
    return "".join(f"{name}\n" for name in names)


def _sources() -> dict[str, bytes]:
    """This package's files, laid out as in a wheel; in a checkout, two of its folders are in other places."""
    files = {}
    folders = {
        "": Path(__file__).parents[2],
        "modeling": Path(handler.__file__).parent,
        "training": Path(training_folder.__file__).parent,
    }
    for name, folder in folders.items():
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            skipped = inside.parts[0] in ELSEWHERE or any(
                part.startswith((".", "__pycache__")) for part in inside.parts
            )
            if (path.suffix in SOURCES or (path.is_file() and GRAPHS in inside.parts)) and not skipped:
                files[(Path(PACKAGE, name) / inside).as_posix()] = path.read_bytes()
    return files


def check_space(space: str, private: bool, api: HfApi) -> None:
    """Check, before anything is sent, that a Space of this name can be created or updated.

    Args:
        space: Id of the Space, "namespace/name".
        private: Whether the Space has to be private.
        api: Hub client with the endpoint and token to use.

    Raises:
        ValueError: If the Space exists and shows something else, or is public although `private` is set.
        HubError: If the Hub cannot be reached.
    """
    state = "Nothing was sent. Run the same command to try again."
    with hub_step("logging in", state, api):
        api.whoami()
    with hub_step(f"looking at the Space {space}", state, api):
        try:
            info = api.space_info(space)
        except RepositoryNotFoundError:
            return
        entries = api.list_repo_tree(space, repo_type="space", recursive=True, revision=info.sha)
        there = {entry.path for entry in entries if isinstance(entry, RepoFile)}
    if there - FRESH and not there & {f"{PACKAGE}/space/app.py", f"{PACKAGE}/hub/space/app.py"}:
        raise ValueError(
            f"Expected the Space {space} to be new or to show a Visual Perceiver; the name is taken by another one."
        )
    if private and not info.private:
        raise ValueError(
            f"Expected the Space {space} to be private, but it is there and public. Its settings page changes that."
        )


def upload_space(
    files: dict[str, bytes], space: str, message: str, state: str, *, private: bool, api: HfApi
) -> PublishedSpace:
    """Create the Space if needed, and upload these files in one commit.

    Sources of an earlier publication that are not in `files` are removed in the same commit; other files stay.

    Args:
        files: Files from `space_files`.
        space: Id of the Space, "namespace/name".
        message: Commit message.
        state: The state of the Hub if this fails, and what to do then, for the error message.
        private: Create a private Space.
        api: Hub client with the endpoint and token to use.

    Raises:
        HubError: If a step fails. The Space then holds either all of the new files or none.
    """
    with hub_step(f"creating the Space {space}", state, api):
        api.create_repo(space, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True)
    with hub_step(f"looking at the Space {space}", state, api):
        info = api.space_info(space)
        entries = api.list_repo_tree(space, repo_type="space", recursive=True, revision=info.sha)
        there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    new = [n for n, data in files.items() if n not in there or not is_on_hub(io.BytesIO(data), len(data), there[n])]
    gone = [name for name in there if name.startswith(f"{PACKAGE}/") and name not in files]
    commit = info.sha or ""
    if new or gone:
        with hub_step(f"committing to the Space {space}", state, api):
            commit = api.create_commit(
                space,
                [*(CommitOperationAdd(n, files[n]) for n in new), *(CommitOperationDelete(n) for n in gone)],
                commit_message=message,
                repo_type="space",
                parent_commit=info.sha,  # somebody else's commit in between is not overwritten
            ).oid
    return PublishedSpace(space, f"{api.endpoint}/spaces/{space}", commit, bool(new or gone), bool(info.private))
