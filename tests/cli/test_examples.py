"""Run the examples of the docstrings, the pages and the notebook."""

import doctest
import importlib
import json
import re
from pathlib import Path

import nbformat
import pytest
import timm
import typer
from nbclient import NotebookClient
from support import PATIENCE, REPOSITORY

from hf_visual_perceiver import ARCHITECTURES, count_macs
from hf_visual_perceiver.cli.main import app
from hf_visual_perceiver.evaluation.evaluate import Evaluation
from hf_visual_perceiver.inference.loading import default_model
from hf_visual_perceiver.modeling import FAMILIES


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
    line = next(line for line in readme.splitlines() if line.startswith(f"| {measured.parent.name} | fixed |"))
    accuracies = {evaluation.name(row.budget): row.accuracy for row in evaluation.rows}
    cells = re.findall(r"\| ([\d.]+) \((\S+?)\)", line)
    assert len(cells) == 7
    for accuracy, budget in cells:
        assert float(accuracy) == round(100 * accuracies[budget], 2), budget
    for name in ARCHITECTURES:
        model = timm.create_model(name, device="meta")
        parameters, macs = sum(p.numel() for p in model.parameters()), count_macs(model.config)
        assert re.search(rf"`{name}` .* \| {parameters / 1e6:.2f} \| {macs / 1e6:,.1f} \|", readme), name
    rows = re.findall(r"\| `(\w+)` \| [^|]+ \| [^|]+ \| `(\w+)` \| ([\d.]+) \| ([\d.]+)(?: to ([\d.]+))? \|", readme)
    assert len(rows) == 6
    for family, name, size, least, most in rows:
        model = timm.create_model(name, num_classes=10, device="meta")
        costs = [model.config.count_macs(budget) for budget in model.config.budgets()]
        assert model.config.model_type == family
        assert float(size) == round(sum(p.numel() for p in model.parameters()) / 1e6, 2), name
        assert (float(least), float(most or least)) == (round(min(costs) / 1e6, 1), round(max(costs) / 1e6, 1)), name


@pytest.mark.parametrize("name", ["README.md", "docs/families.md", "docs/perceiver.md", "docs/publishing.md"])
def test_pages(name, monkeypatch, tmp_path):
    """The code runs with the installed package, outside a checkout."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / name).read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), {})


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the table after a heading of a page in docs/, without the code marks."""
    text = (REPOSITORY / "docs" / page).read_text().partition(heading)[2]
    lines = re.search(r"(?:^\|.*\n)+", text, flags=re.M)[0].splitlines()[2:]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]


def test_the_pages_knobs_are_the_configs():
    names = {name: family.config for name, family in FAMILIES.items()}
    titles = {config.title: name for name, config in names.items()} | {"Perceiver, Perceiver IO": "iterative_perceiver"}
    found = {name: {} for name in names}
    for title, short, knob, _ in rows_of("command_line.md", "## Knobs"):
        found[titles[title]] |= {} if short == "none" else {short: knob}
    assert found == {name: dict(config.knobs) for name, config in names.items()}
    answers = {titles[title]: (knobs, key) for title, knobs, key in rows_of("publishing.md", "what the image used:")}
    assert answers == {
        name: (", ".join(config.knobs.values()) or "none", f"{config.unit}_used") for name, config in names.items()
    }


def test_the_reference_has_every_family():
    text = (REPOSITORY / "docs" / "api.md").read_text()
    for family in FAMILIES.values():
        for kind in (family.config, family.model, family.classifier):
            assert f"::: hf_visual_perceiver.modeling.{kind.__name__}\n" in text


def test_help_names_knobs_of_other_families():
    commands = typer.main.get_command(app).commands
    for command, option in (("evaluate", "budget"), ("attention-maps", "budget"), ("calibrate", "search")):
        (parameter,) = (p for p in commands[command].params if p.name == option)
        assert "K=16" in parameter.help or '"K"' in parameter.help
        assert "grid" in parameter.help


def test_the_quickstart(tmp_path):
    notebook = nbformat.read(REPOSITORY / "docs" / "quickstart.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "outputs are not kept in git"
    NotebookClient(notebook, timeout=PATIENCE, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert "cat (" in printed
