"""Examples run: those of the docstrings, and those of the README."""

import doctest
import importlib
import re

import pytest
from support import REPOSITORY


MODULES = [
    "hf_visual_perceiver.metrics",
    "hf_visual_perceiver.modeling.configuration_visual_perceiver",
    "hf_visual_perceiver.modeling.macs",
    "hf_visual_perceiver.modeling.modeling_visual_perceiver",
    "hf_visual_perceiver.modeling.query_selection",
    "hf_visual_perceiver.modeling.ragged",
    "hf_visual_perceiver.modeling.timm_visual_perceiver",
    "hf_visual_perceiver.training.schedules",
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_readme(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
