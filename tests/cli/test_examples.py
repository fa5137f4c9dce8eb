"""Run the examples of the docstrings, the pages and the notebook."""

import doctest
import importlib
import json
import re
from pathlib import Path

import nbformat
import pytest
import timm
from nbclient import NotebookClient
from support import PATIENCE, REPOSITORY

from hf_visual_perceiver import ARCHITECTURES, count_macs
from hf_visual_perceiver.evaluation.evaluate import Evaluation
from hf_visual_perceiver.hub.card import evaluation_markdown
from hf_visual_perceiver.inference.loading import default_model


MODULES = sorted(
    f"hf_visual_perceiver.{'.'.join(path.relative_to(root).with_suffix('').parts)}"
    for root in (REPOSITORY / "hf_visual_perceiver", REPOSITORY)
    for path in root.rglob("*.py")
    if path.relative_to(REPOSITORY).parts[0] in ("hf_visual_perceiver", "modeling", "training")
    and (root == REPOSITORY) == (path.relative_to(REPOSITORY).parts[0] != "hf_visual_perceiver")
    and ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_the_readmes_numbers_are_the_measured_ones():
    readme = (REPOSITORY / "README.md").read_text()
    measured = Path(default_model()) / "evaluation.json"
    evaluation = Evaluation.from_dict(json.loads(measured.read_text()))
    assert evaluation.conditions["images"] == 10_000
    assert evaluation_markdown(evaluation) in readme
    for name in ARCHITECTURES:
        model = timm.create_model(name, device="meta")
        parameters, macs = sum(p.numel() for p in model.parameters()), count_macs(model.config)
        assert re.search(rf"`{name}` .* \| {parameters / 1e6:.2f} \| {macs / 1e6:,.1f} \|", readme), name


@pytest.mark.parametrize("name", ["README.md", "docs/perceiver.md", "docs/publishing.md"])
def test_pages(name, monkeypatch, tmp_path):
    """The code runs with the installed package, outside a checkout."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / name).read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), {})


def test_the_quickstart(tmp_path):
    notebook = nbformat.read(REPOSITORY / "docs" / "quickstart.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "outputs are not kept in git"
    NotebookClient(notebook, timeout=PATIENCE, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert "cat (" in printed
