"""A campaign: runs in the order of their worth, moved on by any minute there is.

    python -m hf_visual_perceiver.training.campaign --max-minutes 30

continues the first run that is not finished, then the next; `--status` says how far each is. The file says what is to be
done (campaign.yaml), the runs' folders what has been done.
"""

import gc
import json
import logging
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from accelerate.state import AcceleratorState
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_visual_perceiver.training.carrying import PART_BYTES, carry_in, carry_out, list_carried
from hf_visual_perceiver.training.checkpointing import FREE_KEYS, RunFolder
from hf_visual_perceiver.training.console import run_command
from hf_visual_perceiver.training.recipe import Recipe, build, load_recipe
from hf_visual_perceiver.training.train import train


CAMPAIGN = Path(__file__).with_name("campaign.yaml")
CARRY_FILES = 8
console = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A run as the file has it."""

    name: str  # of its folder
    recipe: str  # a file, from the campaign's folder
    images: int  # the budget: images of all steps, seen with repetition
    seed: int = 0
    overrides: list[str] = field(default_factory=list)  # of the recipe, such as queries.K=16
    needs: dict[str, str] = field(default_factory=dict)  # key of the recipe -> name of the run whose model it takes


@dataclass(frozen=True)
class PlannedRun:
    """A run of a campaign, ready to go on.

    Attributes:
        name: Unique in the campaign.
        recipe: What it does.
        recipe_file: Where that comes from.
        overrides: What the campaign changes in the file, as on the command line.
        folder: Its state.
        needs: Key of the recipe to the name of the run whose model it takes.
        models: The same keys to those models' folders.
    """

    name: str
    recipe: Recipe
    recipe_file: Path
    overrides: list[str]
    folder: RunFolder
    needs: dict[str, str]
    models: dict[str, str]

    @property
    def finished(self) -> bool:
        """Whether its model is the one that the campaign asks for."""
        return (
            self.folder.finished(self.recipe.steps)
            and self.folder.recipe_file.exists()
            and not self.folder.changes(self.recipe)
        )

    @property
    def failed(self) -> bool:
        """Whether it ended in numbers that are not finite."""
        return self.folder.failure_file.exists()

    @property
    def steps_done(self) -> int:
        """Steps that would not have to be done again."""
        return self.recipe.steps if self.finished else max(self.folder.saved_steps(), default=0)

    @property
    def command(self) -> str:
        """The command that does the run alone."""
        parts = [
            "accelerate",
            "launch",
            "-m",
            "hf_visual_perceiver.training.train",
            "--config",
            _shown(self.recipe_file),
        ]
        parts += ["--output-dir", str(self.folder.path)]
        parts += ["--resume"] if self.folder.recipe_file.exists() else []
        return shlex.join([*parts, *self.overrides])

    def accuracies(self) -> dict[int, float]:
        """K to the validation accuracy that was measured last."""
        measured = [entry for entry in self.folder.entries() if "validation_accuracy" in entry]
        return {e["K"]: e["validation_accuracy"] for e in measured if e["step"] == measured[-1]["step"]}


def load_campaign(
    file: str | Path = CAMPAIGN,
    runs_dir: str | Path = "runs/campaign",
    datasets: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> list[PlannedRun]:
    """Read a campaign and check every run of it.

    Args:
        file: YAML with a list of `runs`; each has the keys of `Entry`.
        runs_dir: Where the runs' folders are.
        datasets: Where datasets lie, as PLACE for that of the first run, or as NAME=PLACE.
        overrides: For all recipes, of keys that do not change what is learned, such as `compile=false`.

    Raises:
        ValueError: If a key, a recipe, a dependency or a dataset does not fit; it names what was expected.
        FileNotFoundError: If there is no such file.

    Example:
        >>> [run.name for run in load_campaign()][:3]
        ['flagship', 'query_masking', 'fixed_64']
    """
    file, runs_dir = Path(file), Path(runs_dir)
    for override in overrides:
        if (key := override.partition("=")[0]) not in FREE_KEYS - {"dataset", "dataset_name"}:
            free = ", ".join(sorted(FREE_KEYS - {"dataset", "dataset_name"}))
            raise ValueError(
                f"Expected an override for all runs to be of {free}, got {key!r}: the others belong in {file}."
            )
    entries = _read_entries(file)
    _check_order(entries, file)
    models = {
        entry.name: {key: str(RunFolder(runs_dir / other).model) for key, other in entry.needs.items()}
        for entry in entries
    }
    # First as the files have them, for the datasets' names and the size of a batch.
    plain = {entry.name: _checked(entry, file, _overrides(entry, models[entry.name])) for entry in entries}
    places = _dataset_places(datasets, [recipe.dataset for recipe in plain.values()])
    runs = []
    for entry in entries:
        recipe, folder = plain[entry.name], RunFolder(runs_dir / entry.name)
        given = {"steps": entry.images // recipe.batch_size, "seed": entry.seed, **models[entry.name]}
        given |= {"dataset": places[recipe.dataset]} if recipe.dataset in places else {}
        changes = [*_overrides(entry, given), *overrides]
        recipe = _checked(entry, file, changes)
        path = file.parent / entry.recipe
        runs.append(PlannedRun(entry.name, recipe, path, changes, folder, entry.needs, models[entry.name]))
    return runs


def _read_entries(file: Path) -> list[Entry]:
    try:
        values = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"Expected {file} to be YAML: {error}") from error
    if not isinstance(values, dict) or set(values) != {"runs"} or not isinstance(values["runs"], list):
        given = ", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"Expected {file} to hold one key, `runs`, with a list, got {given}.")
    entries = []
    for number, item in enumerate(values["runs"], start=1):
        if not isinstance(item, dict):
            raise ValueError(f"Expected run {number} of {file} to hold keys and values, got {item!r}.")
        entry: Entry = build(Entry, item, f"run {number} of {file}")
        place = f"{entry.name} in {file}"
        if not re.fullmatch(r"[\w-]+", entry.name):
            raise ValueError(f"Expected names of letters, digits, _ and -, got {entry.name!r} in {file}.")
        for override in entry.overrides:
            if not isinstance(override, str):
                raise ValueError(f"Expected overrides such as queries.K=16 for {place}, got {override!r}.")
            key = override.partition("=")[0]
            if key in ("steps", "seed", "dataset", *entry.needs):
                raise ValueError(
                    f"Expected `images`, `seed`, `needs` and --dataset to say what {key} is, got the override {override!r} for {place}."
                )
        entries.append(entry)
    if not entries:
        raise ValueError(f"Expected at least one run in {file}, got none.")
    return entries


def _check_order(entries: list[Entry], file: Path) -> None:
    """Raise a `ValueError` unless names are unique and needs can be met."""
    names = [entry.name for entry in entries]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"Expected every name once in {file}, got {twice[0]} {names.count(twice[0])} times.")
    for entry in entries:
        for other in entry.needs.values():
            if other not in names:
                raise ValueError(
                    f"Expected {entry.name} to need runs among {', '.join(names)}, got {other!r} in {file}."
                )
    # What cannot be ordered by taking again and again what needs nothing that is left, waits for itself.
    left = {entry.name: set(entry.needs.values()) for entry in entries}
    while ready := [name for name, needs in left.items() if not needs & set(left)]:
        for name in ready:
            del left[name]
    if left:
        raise ValueError(f"Expected runs that do not wait for themselves, got {', '.join(left)} in {file}.")


def _checked(entry: Entry, file: Path, overrides: list[str]) -> Recipe:
    """The recipe of a run, with errors that name the run."""
    path = file.parent / entry.recipe
    try:
        if not path.is_file():
            raise ValueError(f"Expected `recipe` to be a file, got {path}.")
        recipe = load_recipe(path, overrides)
        if entry.images < recipe.batch_size:
            raise ValueError(f"Expected `images` to be at least a batch of {recipe.batch_size}, got {entry.images}.")
    except ValueError as error:
        raise ValueError(f"{entry.name} in {file}: {error}") from error
    return recipe


def _dataset_places(given: Sequence[str], names: list[str]) -> dict[str, str]:
    """Name of a dataset to where it lies."""
    places = {}
    for item in given:
        name, separator, place = item.partition("=")
        name, place = (name, place) if separator else (names[0], item)
        if name not in names or not place:
            raise ValueError(
                f"Expected --dataset PLACE or NAME=PLACE with a name among {', '.join(dict.fromkeys(names))}, got {item!r}."
            )
        places[name] = place
    return places


def _overrides(entry: Entry, given: Mapping[str, Any]) -> list[str]:
    """Those of a run, and more values, quoted where YAML would read something else."""
    plain = {key: str(value) for key, value in given.items()}
    return [
        *entry.overrides,
        *(f"{k}={plain[k] if yaml.safe_load(plain[k]) == given[k] else json.dumps(given[k])}" for k in given),
    ]


def _shown(path: Path) -> str:
    """Relative to the current folder, where it is below."""
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def waits_for(run: PlannedRun, runs: Sequence[PlannedRun]) -> list[str]:
    """The runs that have to be finished before this one can begin."""
    finished = {other.name for other in runs if other.finished}
    return [name for name in dict.fromkeys(run.needs.values()) if name not in finished]


def next_run(runs: Sequence[PlannedRun]) -> PlannedRun | None:
    """The first run that is not finished, has not failed and waits for none."""
    for run in runs:
        if not run.finished and not run.failed and not waits_for(run, runs):
            return run
    return None


def state_of(run: PlannedRun, runs: Sequence[PlannedRun]) -> str:
    """How a run stands, in some words."""
    if run.failed:
        report = json.loads(run.folder.failure_file.read_text())
        return f"failed at step {report['step']}: {report['problem']}"
    if run.folder.recipe_file.exists() and (changes := run.folder.changes(run.recipe)):
        return f"has another recipe: {', '.join(changes)}"
    if run.finished:
        return "finished"
    if waiting := waits_for(run, runs):
        return f"waits for {', '.join(waiting)}"
    begun = "to be continued" if run.steps_done else "not begun"
    return f"{begun}, next" if run is next_run(runs) else begun


def continue_campaign(
    runs: Sequence[PlannedRun],
    max_minutes: float | None = None,
    only: str | None = None,
    allow_recipe_change: bool = False,
    after: Callable[[PlannedRun], None] = lambda run: None,
) -> bool:
    """Train, run after run, until nothing is left that can be trained, or the time is over.

    A run that fails, with a loss or weight that is not finite, would most likely fail there again: it is left as it is, and
    the next one is done. It is tried again, from its last good checkpoint, when it is named by `only`.

    Args:
        runs: The campaign.
        max_minutes: Stop after this time with everything saved; None goes on to the end. SIGTERM stops likewise.
        only: Name of the one run to do, even if it failed before.
        allow_recipe_change: Continue runs although they were started with another recipe.
        after: Called after each run, whatever came of it.

    Returns:
        Whether every run that was done could be.

    Raises:
        ValueError: If `only` is no run of the campaign or has to wait, or a run cannot go on as it is; those after it
            are not begun.
        OSError: If a checkpoint cannot be written.
    """
    if max_minutes is not None and not max_minutes > 0:
        raise ValueError(f"Expected `--max-minutes` to be above 0, got {max_minutes}.")
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    processes, well = int(os.environ.get("WORLD_SIZE", "1")), True
    chosen = None if only is None else _run_named(only, runs)
    while (run := chosen or next_run(runs)) is not None:
        minutes = None if deadline is None else (deadline - time.monotonic()) / 60
        if minutes is not None and minutes <= 0:
            _say(f"{max_minutes:g} minutes are over; {run.name} is next.")
            break
        if run.finished:
            _say(f"{run.name} is finished; its model is in {run.folder.model}.")
            break
        _say(f"{run.name}: step {run.steps_done} of {run.recipe.steps}")
        stopped = False
        try:
            with fresh_process_state(processes):
                begun = run.folder.recipe_file.exists()
                stopped = None is train(
                    run.recipe, run.folder.path, begun, run.recipe_file.name, minutes, allow_recipe_change
                )
        except FloatingPointError as error:
            well = False
            _say(f"{run.name} failed: {error}. `--only {run.name}` tries again.")
        finally:
            after(run)
        if stopped or chosen is not None:
            break
        if processes > 1:
            _say("Several processes do one run at a time; the same command goes on with the next.")
            break
    else:
        _say("Nothing is left to train.")
        for run in runs:
            _say(f"{run.name}: {state_of(run, runs)}")
    return well


def _run_named(name: str, runs: Sequence[PlannedRun]) -> PlannedRun:
    found = {run.name: run for run in runs}
    if name not in found:
        raise ValueError(f"Expected --only to be one of {', '.join(found)}, got {name!r}.")
    if waiting := waits_for(found[name], runs):
        raise ValueError(f"Expected what {name} needs to be finished, got {', '.join(waiting)} unfinished.")
    return found[name]


@contextmanager
def fresh_process_state(processes: int) -> Iterator[None]:
    """What libraries keep for a process, anew for each run of it: accelerate its precision, torch what it compiled.

    With several processes nothing is reset, as the group of a run does not come back once it has ended.
    """
    try:
        yield
    finally:
        if processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)
            torch.compiler.reset()
            gc.collect()


def _say(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        console.print(message, markup=False, highlight=False, soft_wrap=True)


def status_table(runs: Sequence[PlannedRun]) -> Table:
    """How far each run is."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in ("run", "step", "of", "images (M)", "state", "last validation accuracy (%)"):
        table.add_column(header, justify="right" if header in ("step", "of", "images (M)") else "left", overflow="fold")
    for run in runs:
        accuracies = ", ".join(f"{100 * accuracy:.2f} (K = {K})" for K, accuracy in run.accuracies().items())
        images = [steps * run.recipe.batch_size / 1e6 for steps in (run.steps_done, run.recipe.steps)]
        table.add_row(
            run.name,
            f"{run.steps_done:,}",
            f"{run.recipe.steps:,}",
            f"{images[0]:,.1f} / {images[1]:,.1f}",
            escape(state_of(run, runs)),
            accuracies,
        )
    return table


def restore_runs(runs: Sequence[PlannedRun], folder: Path, allow_recipe_change: bool = False) -> list[str]:
    """Carry in each run that is further in `folder` than here; returns their names.

    Raises:
        ValueError: If there is no such folder, or `carry_in` cannot take a run.
    """
    if not folder.is_dir():
        raise ValueError(f"Expected --carry-in to be a folder, got {folder}.")
    furthest = {carried.run: carried for carried in list_carried(folder)}  # the furthest of a run comes last
    restored = []
    for run in runs:
        here = math.inf if run.finished else run.steps_done
        if run.name in furthest and furthest[run.name].step > here:
            carry_in(furthest[run.name], run.folder, run.recipe, run.models, allow_recipe_change)
            restored.append(run.name)
    return restored


def command(
    campaign: Annotated[Path, typer.Option(help="The runs, a YAML file.", exists=True, dir_okay=False)] = CAMPAIGN,
    runs_dir: Annotated[Path, typer.Option(help="Where the runs' folders are.")] = Path("runs/campaign"),
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop after this time with everything saved; the same command goes on.")
    ] = None,
    only: Annotated[str | None, typer.Option(help="Do this run alone, even if it failed before.")] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="PLACE of the first run's dataset, or NAME=PLACE; repeat for several. By default the Hub."),
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="Say how far each run is, and train nothing.")] = False,
    carry_in_from: Annotated[
        Path | None, typer.Option("--carry-in", help="First take the runs that are further in this folder.")
    ] = None,
    carry_out_to: Annotated[
        Path | None, typer.Option("--carry-out", help="Write what this call trained to this folder, in small files.")
    ] = None,
    carry_files: Annotated[
        int, typer.Option(min=1, help=f"Most files in the --carry-out folder, each of at most {PART_BYTES / 1e6:g} MB.")
    ] = CARRY_FILES,
    allow_recipe_change: Annotated[
        bool, typer.Option("--allow-recipe-change", help="Continue runs whose recipe differs from the campaign's.")
    ] = False,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="For all recipes: keys that change nothing learned, as compile=false.")
    ] = None,
) -> None:
    """Continue the first run of a campaign that is not finished, then the next, as long as there is time."""
    main_process = os.environ.get("RANK", "0") == "0"

    def carry(run: PlannedRun) -> None:
        if carry_out_to is not None and main_process:
            files = carry_out(run.folder, run.name, run.recipe.steps, carry_out_to, carry_files)
            _say(f"{run.name}: {len(files)} files for {carry_out_to}")

    runs = load_campaign(campaign, runs_dir, dataset or [], overrides or [])
    if carry_in_from is not None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("Expected --carry-in to be given to one process: with --status, before the others begin.")
        restored = restore_runs(runs, carry_in_from, allow_recipe_change)
        _say(f"Carried in: {', '.join(restored) or 'nothing that is further than here'}.")
    if status:
        if main_process:
            out = Console(width=None if sys.stdout.isatty() else 120)
            out.print(status_table(runs))
            for run in runs:
                out.print(f"{run.name}: {run.command}", markup=False, highlight=False, soft_wrap=True)
        return
    well = continue_campaign(runs, max_minutes, only, allow_recipe_change, carry)
    if not well:
        raise SystemExit(1)


def main() -> None:
    """Entry point of the script."""
    logging.getLogger("datasets").setLevel(logging.ERROR)
    run_command(command, out_of_memory="a smaller micro_batch_size needs less")


if __name__ == "__main__":
    main()
