"""Run the test suites of transformers and timm on this package's models.

The wheels contain no tests, so the source distributions of the installed versions are downloaded. Then pytest runs on the
adapters beside this file. Paths in the pytest arguments are relative to this folder:

    python tests/upstream/run.py test_timm_models.py -k forward_fx
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest


HERE = Path(__file__).resolve().parent
PROJECTS = ("transformers", "timm")


def fetch(project: str, cache: Path) -> Path:
    """The unpacked source distribution of the installed version of `project`, downloaded unless it is in `cache`.

    Raises:
        RuntimeError: If pip cannot download it, with pip's reason in one line.
    """
    name = f"{project}-{version(project)}"
    root = cache / name
    if root.is_dir():
        return root
    cache.mkdir(parents=True, exist_ok=True)
    # Unpacked aside and renamed, so that an interrupted run leaves no half of a folder behind.
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", project]
        command += ["--dest", folder, f"{project}=={version(project)}"]
        process = subprocess.run(command, capture_output=True, text=True)
        archive = Path(folder, f"{name}.tar.gz")
        if process.returncode or not archive.exists():
            lines = process.stderr.splitlines() or [f"pip left no {archive.name}"]
            reason = ([line for line in lines if line.startswith("ERROR: ")] or lines)[-1]
            raise RuntimeError(reason.removeprefix("ERROR: "))
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        os.rename(Path(folder, name), root)
    return root


def main() -> int:
    """Fetch, then test; the exit status is pytest's, or 1 if a download failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=HERE.parents[1] / ".upstream", help="where the sources are kept")
    arguments, pytest_arguments = parser.parse_known_args()
    for project in PROJECTS:
        try:
            root = fetch(project, arguments.cache.resolve())
        except (RuntimeError, OSError, tarfile.TarError) as error:
            print(f"Could not download the tests of {project}: {error}", file=sys.stderr)
            return 1
        # By way of the environment, as pytest-xdist and some upstream tests start processes of their own.
        os.environ[f"UPSTREAM_{project.upper()}"] = str(root)
    # The folder of `pytest.ini`: the ids of the tests, by which upstream reruns some, are relative to it.
    os.chdir(HERE)
    return int(pytest.main(pytest_arguments))


if __name__ == "__main__":
    sys.exit(main())
