"""Examples run: those of the docstrings, and those of the README."""

import doctest
import importlib
import json
import re
from pathlib import Path

import pytest
import timm
from support import REPOSITORY

from hf_visual_perceiver import ARCHITECTURES, count_macs
from hf_visual_perceiver.card import evaluation_markdown
from hf_visual_perceiver.evaluation import Evaluation
from hf_visual_perceiver.loading import default_model


MODULES = [
    "hf_visual_perceiver.adaptive_pipeline",
    "hf_visual_perceiver.hub_page",
    "hf_visual_perceiver.loading",
    "hf_visual_perceiver.corruptions",
    "hf_visual_perceiver.difficulty",
    "hf_visual_perceiver.confusion",
    "hf_visual_perceiver.export",
    "hf_visual_perceiver.export_check",
    "hf_visual_perceiver.attention_maps",
    "hf_visual_perceiver.calibration",
    "hf_visual_perceiver.cascade",
    "hf_visual_perceiver.metrics",
    "hf_visual_perceiver.retrieval",
    "hf_visual_perceiver.robustness",
    "hf_visual_perceiver.tables",
    "hf_visual_perceiver.modeling.attention_groups",
    "hf_visual_perceiver.modeling.configuration_visual_perceiver",
    "hf_visual_perceiver.modeling.handler",
    "hf_visual_perceiver.modeling.macs",
    "hf_visual_perceiver.modeling.modeling_visual_perceiver",
    "hf_visual_perceiver.modeling.query_selection",
    "hf_visual_perceiver.modeling.ragged",
    "hf_visual_perceiver.modeling.timm_visual_perceiver",
    "hf_visual_perceiver.publishing",
    "hf_visual_perceiver.space.demo",
    "hf_visual_perceiver.space.draw",
    "hf_visual_perceiver.space.repository",
    "hf_visual_perceiver.predictor",
    "hf_visual_perceiver.training.initial",
    "hf_visual_perceiver.training.schedules",
    "hf_visual_perceiver.training.splits",
    "hf_visual_perceiver.timing",
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
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


def test_readme(monkeypatch, tmp_path):
    """Its code needs the installed package, and no checkout."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
