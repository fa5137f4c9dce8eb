"""A run's folder: saved so that nothing is ever half-written, resumed so that nothing is lost."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from .files import write_text
from .recipe import Recipe, recipe_from_dict


class RunFolder:
    """The folder of one run: recipe.yaml, log.jsonl, checkpoints/step_N, and model/ once it is finished."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.yaml"
        self.log_file = self.path / "log.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"

    def check(self, recipe: Recipe, resume: bool) -> None:
        """Raise a `ValueError` if the folder cannot take this run; writes nothing.

        A folder that holds another run, or anything else, is left alone; a run resumes only with its own recipe.
        """
        if not self.recipe_file.exists():
            if resume:
                raise ValueError(f"Expected a run to resume in {self.path}, found none.")
            if self.path.exists() and any(self.path.iterdir()):
                raise ValueError(f"Expected {self.path} to be empty or new; it holds something else.")
            return
        if not resume:
            raise ValueError(f"{self.path} already holds a run: continue it with --resume, or choose another folder.")
        old = recipe_from_dict(yaml.safe_load(self.recipe_file.read_text()), str(self.recipe_file)).to_dict()
        new = recipe.to_dict()
        # Where the data lies and what is shown does not change what is learned.
        free = {
            "dataset",
            "dataset_name",
            "workers",
            "cache_gib",
            "tracker",
            "log_every",
            "save_every",
            "keep_checkpoints",
        }
        differing = [key for key in new if key not in free and new[key] != old[key]]
        if differing:
            changes = ", ".join(f"{key} ({old[key]!r} -> {new[key]!r})" for key in differing)
            raise ValueError(f"Expected the recipe that {self.path} was started with; these keys differ: {changes}.")

    def start(self, recipe: Recipe) -> None:
        """Create the folder, and clear what a killed process may have left half-done."""
        self.path.mkdir(parents=True, exist_ok=True)
        # First, because a folder without it is not taken for a run.
        write_text(self.recipe_file, yaml.safe_dump(recipe.to_dict(), sort_keys=False))
        self.checkpoints.mkdir(exist_ok=True)
        for leftover in (*self.checkpoints.glob(".*"), *self.path.glob(".model.*")):
            shutil.rmtree(leftover, ignore_errors=True)

    def saved_steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(int(p.name.removeprefix("step_")) for p in self.checkpoints.glob("step_*"))

    def save(self, accelerator: Accelerator, step: int, keep: int) -> None:
        """Save the state of every process after `step` steps; older checkpoints than the last `keep` go."""
        final = self.checkpoints / f"step_{step}"
        if final.exists():
            return
        aside = self.checkpoints / f".step_{step}.tmp"
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(aside))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            os.replace(aside, final)
            for old in self.saved_steps()[:-keep]:
                shutil.rmtree(self.checkpoints / f"step_{old}", ignore_errors=True)
        accelerator.wait_for_everyone()

    def restore(self, accelerator: Accelerator) -> int:
        """Load the newest complete checkpoint; returns its step, 0 if there is none."""
        steps = self.saved_steps()
        if not steps:
            return 0
        accelerator.load_state(str(self.checkpoints / f"step_{steps[-1]}"))
        return steps[-1]

    def truncate_log(self, step: int) -> None:
        """Forget logged steps after `step`: they are about to be done again."""
        if self.log_file.exists():
            lines = [line for line in self.log_file.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            write_text(self.log_file, "".join(line + "\n" for line in kept))

    def entries(self) -> list[dict[str, Any]]:
        """What was logged, oldest first."""
        return [json.loads(line) for line in self.log_file.read_text().splitlines()] if self.log_file.exists() else []

    def hours(self, batch_size: int) -> float:
        """Time spent on training steps, over all resumptions, by the log's throughput."""
        hours, before = 0.0, 0
        for entry in self.entries():
            if "images_per_second" in entry:
                hours += (entry["step"] - before) * batch_size / entry["images_per_second"] / 3600
                before = entry["step"]
        return hours

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line to the log."""
        with self.log_file.open("a") as file:
            file.write(json.dumps(entry) + "\n")
