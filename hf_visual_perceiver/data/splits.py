"""Splits of a dataset: the files that belong to a split, and parts of splits such as `train[-5000:]`."""

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets


SPLIT = re.compile(r"([^\[\]]+)(?:\[(-?\d+)?:(-?\d+)?\])?")
# Folder names of splits, as in the `datasets` library.
SYNONYMS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def parse_split(split: str) -> tuple[str, slice]:
    """Parse a split into its name and the slice of its images.

    Raises:
        ValueError: If it is neither a name nor a name with a slice in brackets.

    Example:
        >>> parse_split("train[-5000:]")
        ('train', slice(-5000, None, None))
        >>> parse_split("test")
        ('test', slice(None, None, None))
    """
    match = SPLIT.fullmatch(split)
    if match is None:
        raise ValueError(f'Expected a split such as "test", "train[:10000]" or "train[-5000:]", got {split!r}.')
    name, start, stop = match.groups()
    return name, slice(start and int(start), stop and int(stop))


def open_split(dataset: str, split: str, streaming: bool = False) -> Any:
    """Open a split, or a part of one, with the `datasets` library.

    In a folder, a split is the first of these that exists:

    1. a subfolder with the split's name: the parquet files in it, or else its images;
    2. parquet files in the folder or in its subfolder `data` that are named after the split, with or without a number,
       such as `test.parquet` or `test-00000-of-00001.parquet`;
    3. a subfolder with a synonymous name, such as `val` for `validation`, or one deeper in the folder;
    4. for `train`, all images.

    Folders with a metadata file, or with parquet files elsewhere, are left to `datasets`.

    Args:
        dataset: A folder, a single parquet file (which is used for any split), or a Hub id.
        split: The name of a split or of a part of it, see `parse_split`; for a Hub id, whatever `datasets` accepts.
        streaming: Return a `datasets.IterableDataset`; only for a whole split in parquet files or on the Hub.

    Raises:
        ValueError: If there is no such split.
        FileNotFoundError: If `dataset` looks like a path and does not exist.
    """
    path = Path(dataset)
    if not path.exists():
        if path.is_absolute() or dataset.startswith(".") or dataset.count("/") > 1:
            raise FileNotFoundError(f"Expected a dataset, got {dataset}, which does not exist.")
        return datasets.load_dataset(dataset, split=split, streaming=streaming)
    name, part = parse_split(split)
    if streaming and part != slice(None):
        raise ValueError(f"Expected a whole split to stream, got {split!r}.")
    found = [path] if path.is_file() else _find_split(path, name)
    if found is None:
        whole = datasets.load_dataset(str(path), split=name, streaming=streaming)
    elif isinstance(found, list):
        files = [_pattern(file) for file in found]
        whole = datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming)
    elif streaming:
        raise ValueError(f"Expected parquet files to stream from in {found}, got none.")
    else:
        whole = _load_imagefolder(found)
    if part == slice(None):
        return whole
    chosen = range(len(whole))[part]
    if not chosen:
        raise ValueError(f"Expected images in {split} of {dataset}, which has {len(whole):,} in {name}.")
    return whole.select(chosen)


def _find_split(path: Path, name: str) -> Path | list[Path] | None:
    """Find the imagefolder or the parquet files of a split; None leaves it to `datasets`."""
    if any(file.stem == "metadata" and file.is_file() for file in path.iterdir()):
        return None
    if (path / name).is_dir():
        return _parquet_or_images(path / name)
    called = re.compile(rf"{re.escape(name)}([-_.]?\d.*)?\.parquet")
    for folder in (path, path / "data"):
        there = sorted(folder.glob("*.parquet"))
        if files := [file for file in there if called.fullmatch(file.name)]:
            return files
        if there:
            expected = f"parquet files named {name}.parquet or {name}-0....parquet"
            raise ValueError(f"Expected {expected} in {folder}, got {_listed(there, folder)}.")
    own = {name, *SYNONYMS.get(name, ())}
    folders, parquet = _search(path, own.union(*SYNONYMS.values()))
    if parquet:
        return None
    found = [folder for folder in folders if folder.name in own]
    if len(found) > 1:
        raise ValueError(f"Expected one folder {name} in {path}, got {_listed(found, path)}.")
    if found:
        return _parquet_or_images(found[0])
    if folders:
        raise ValueError(f"Expected a folder {name} in {path}, got {_listed(folders, path)}.")
    if name != "train":
        raise ValueError(f"Expected a folder {name} in {path}, got no split folders; all images are in train.")
    return path


def _search(path: Path, names: set[str]) -> tuple[list[Path], bool]:
    """Find the outermost folders with these names, and whether there are parquet files outside of them."""
    found, parquet = [], False
    for folder, inside, files in os.walk(path):
        found += [Path(folder, name) for name in inside if name in names]
        inside[:] = [name for name in inside if name not in names and not name.startswith(".")]
        parquet = parquet or any(file.endswith(".parquet") for file in files)
    return found, parquet


def _parquet_or_images(folder: Path) -> Path | list[Path]:
    return sorted(file for file in folder.rglob("*.parquet") if file.stem != "metadata") or folder


def _load_imagefolder(folder: Path) -> datasets.Dataset:
    try:
        table = datasets.load_dataset("imagefolder", data_files=f"{_pattern(folder)}/**", split="train")
    except FileNotFoundError:
        table = None
    # `datasets` drops the labels if there is a single class, or if the class folders are not siblings.
    if table is None or list(table.features) == ["image"]:
        folders = {file.parent for file in folder.rglob("*") if file.is_file()} - {folder}
        raise ValueError(
            f"Expected images in at least two folders of {folder}, one for each class, got {_listed(folders, folder)}."
        )
    return table


def _pattern(path: Path) -> str:
    """Escape a path, so that `datasets` takes it literally and not as a glob pattern."""
    return glob.escape(str(path.absolute()))


def _listed(paths: Iterable[Path], folder: Path) -> str:
    return ", ".join(sorted(str(path.relative_to(folder)) for path in paths)[:10]) or "none"
