"""Make upstream's test folders importable as `upstream_transformers` and `upstream_timm`.

All are called `tests`, like ours, so they are renamed. The adapters are only collected if `run.py` has fetched the
sources.
"""

import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


SOURCES = {name: os.environ.get(f"UPSTREAM_{name.upper()}") for name in ("transformers", "timm")}

# What transformers' common tests import from folders that its source distribution leaves out. The configuration values
# are arguments of every config, each unlike its default.
STAND_INS: dict[str, dict[str, Any]] = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "output_attentions": True,
            "dtype": "float16",
            "chunk_size_feed_forward": 5,
            "architectures": ["VisualPerceiverModel"],
            "id2label": {0: "label"},
            "label2id": {"label": 0},
            "problem_type": "regression",
        }
    },
}


def register_package(name: str, folder: Path) -> None:
    """Make `folder` importable as the package `name`."""
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    pytest.register_assert_rewrite(name)
    sys.modules[name] = module_from_spec(spec)


if not all(SOURCES.values()):
    collect_ignore_glob = ["test_*.py"]
else:
    for project, root in SOURCES.items():
        register_package(f"upstream_{project}", Path(root, "tests"))
    tests = Path(SOURCES["transformers"], "tests")
    # Upstream executes it, but the archive holds nothing except `test_*.py`.
    (tests / "__init__.py").touch()
    for path, names in STAND_INS.items():
        if not Path(tests, *path.split(".")).with_suffix(".py").exists():
            module = ModuleType(f"upstream_transformers.{path}")
            vars(module).update(names)
            sys.modules[module.__name__] = module
