"""Atomic writing of files and folders: they are written under a temporary name, then renamed."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar


T = TypeVar("T")


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file to write; it replaces `path` when the block ends, and is removed if the block fails."""
    path = Path(path)
    # The suffix is kept, because libraries choose the format by it.
    aside = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with written_aside(path) as aside:
        aside.write_text(text)


def write_json(path: str | Path, values: Any) -> None:
    """Write plain values as JSON, atomically."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path, convert: Callable[[Any], T]) -> T:
    """Read a JSON file and return `convert` of its values.

    Raises:
        ValueError: If the file is not valid JSON, or `convert` rejects its values.
    """
    try:
        return convert(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        reason = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"Expected {path} to be a valid file of this package: {reason}.") from error


@contextmanager
def folder_written_aside(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; it replaces `path` when the block ends, and is removed if the block fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new, old = work / "new", work / "old"
        new.mkdir()
        yield new
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_writable(path: Path) -> None:
    """Raise a `ValueError` unless a file of this name can be created."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"Expected a file name in an existing folder, got {str(path)!r}.")


def check_picture(path: Path) -> None:
    """Raise a `ValueError` unless the file's name ends in .png, .svg or .pdf."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"Expected a plot's file to end in .png, .svg or .pdf, got {path.name!r}.")
