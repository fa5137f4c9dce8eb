"""Runs on their way between machines: a few files of limited size for each run, and a run from such files.

A run that is not finished travels in the form for transport (transport.py), a finished one as its model, bit for bit: enough
to evaluate, publish and teach, not to train longer. Both are a zip file, which has a checksum for each of its files, cut
in parts named NAME.stepN.partIofM or NAME.finished.partIofM.
"""

import math
import re
import tempfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from .checkpointing import RunFolder
from .files import folder_written_aside, write_text, written_aside
from .recipe import Recipe
from .transport import write_transport


PART_BYTES = 14_000_000
PART_NAME = re.compile(r"(?P<run>[\w-]+)\.(?:step(?P<step>\d+)|finished)\.part(?P<part>\d+)of(?P<count>\d+)")


@dataclass(frozen=True)
class Carried:
    """The state of a run in a folder of parts.

    Attributes:
        run: The run's name.
        step: Steps done; infinite if the run is finished.
        parts: The files by number, from 1.
        count: How many there should be.
    """

    run: str
    step: float
    parts: dict[int, Path]
    count: int


def carry_out(
    run: RunFolder, name: str, steps: int, folder: str | Path, max_files: int, part_bytes: int = PART_BYTES
) -> list[Path]:
    """Write the state of a run as parts, which take the place of the run's earlier ones.

    Args:
        run: The run.
        name: What to call it.
        steps: Of the whole run.
        folder: Where the parts go.
        max_files: How many files `folder` may hold in all; beyond that nothing is written.
        part_bytes: Largest size of a part.

    Returns:
        The parts; none if the run has nothing saved.

    Raises:
        ValueError: If there would be too many files; those of before are then still there.
    """
    finished, saved = run.finished(steps), run.saved_steps()
    if not finished and not saved:
        return []
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder) as work:
        source, archive = run.path, Path(work) / "state.zip"
        if finished:
            files = [path for path in run.model.rglob("*") if path.is_file()]
        else:
            source = Path(work) / "light"
            files = write_transport(run.path, source)
        # What says how far a run is, and what became of it, travels with both.
        kept = (run.recipe_file, run.log_file, run.failure_file)
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as bundle:
            for path in files:
                bundle.write(path, path.relative_to(source))
            for path in kept:
                if path.is_file() and str(path.relative_to(run.path)) not in bundle.namelist():
                    bundle.write(path, path.relative_to(run.path))
        count = -(-archive.stat().st_size // part_bytes)
        old = [part for carried in list_carried(folder) if carried.run == name for part in carried.parts.values()]
        others = [path for path in folder.iterdir() if path.is_file() and path not in old]
        if len(others) + count > max_files:
            raise ValueError(
                f"Expected at most {max_files} files in {folder}, got {len(others)} and {count} more of {name}."
            )
        stage = "finished" if finished else f"step{saved[-1]}"
        parts = [folder / f"{name}.{stage}.part{i}of{count}" for i in range(1, count + 1)]
        with archive.open("rb") as whole:
            for part in parts:
                with written_aside(part) as aside:
                    aside.write_bytes(whole.read(part_bytes))
    for path in set(old) - set(parts):
        path.unlink()
    return parts


def list_carried(folder: str | Path) -> list[Carried]:
    """What a folder of parts holds, complete or not, the furthest last; other files are left out."""
    groups: dict[tuple[str, float, int], dict[int, Path]] = defaultdict(dict)
    for path in Path(folder).iterdir():
        if match := PART_NAME.fullmatch(path.name):
            step = math.inf if match["step"] is None else int(match["step"])
            groups[match["run"], step, int(match["count"])][int(match["part"])] = path
    return [Carried(run, step, groups[run, step, count], count) for run, step, count in sorted(groups)]


def carry_in(
    carried: Carried,
    run: RunFolder,
    recipe: Recipe,
    places: Mapping[str, str] | None = None,
    allow_recipe_change: bool = False,
) -> None:
    """Make a run's folder of its parts; it takes the place of what is there.

    Args:
        carried: The parts.
        run: Where to.
        recipe: What the run is expected to do.
        places: Keys of the recipe, such as `teacher.model`, whose values are folders of the machine that the run is on.
        allow_recipe_change: Take it although it was started with another recipe.

    Raises:
        ValueError: If parts are missing or damaged, or the run, or the one that is there, was started with another recipe;
            what is there then stays.
    """
    if missing := [i for i in range(1, carried.count + 1) if i not in carried.parts]:
        raise ValueError(
            f"Expected {carried.count} parts of {carried.run} beside {next(iter(carried.parts.values()))}, got "
            f"{len(carried.parts)}: part {missing[0]} is missing."
        )
    if run.recipe_file.exists():
        run.check(recipe, True, allow_recipe_change)
    with folder_written_aside(run.path) as aside, tempfile.TemporaryFile() as archive:
        for i in range(1, carried.count + 1):
            archive.write(carried.parts[i].read_bytes())
        try:
            with zipfile.ZipFile(archive) as bundle:
                bundle.extractall(aside)  # compares the checksums
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(
                f"Expected the parts of {carried.run} as they were written, got damage: {error}"
            ) from error
        new = RunFolder(aside)
        values = yaml.safe_load(new.recipe_file.read_text())
        for key, place in (places or {}).items():
            *groups, last = key.split(".")
            group = values
            for name in groups:
                group = group[name]
            group[last] = place
        write_text(new.recipe_file, yaml.safe_dump(values, sort_keys=False))
        new.check(recipe, True, allow_recipe_change)
