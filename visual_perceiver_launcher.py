"""Starts `visual-perceiver` before torch is imported, so that --help and mistakes are answered at once.

Importing hf_visual_perceiver registers its models with transformers and timm, which takes seconds. This module lies beside
the package for that reason: it lets the command line be imported while the package's own __init__ still has to run, which
`cli` sees to when a command begins its work.
"""

import sys
from importlib.util import find_spec, module_from_spec


PACKAGE = "hf_visual_perceiver"


def main() -> None:
    """Run the command."""
    if PACKAGE not in sys.modules:
        spec = find_spec(PACKAGE)
        assert spec is not None, "they are installed together"
        sys.modules[PACKAGE] = module_from_spec(spec)
    try:
        from hf_visual_perceiver.cli.main import main as run
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}; the extra `cli` brings it: pip install 'hf-visual-perceiver[cli]'")

    run()
