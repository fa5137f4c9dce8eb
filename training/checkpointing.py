"""A run's folder. Writes are atomic, and a run resumes from its newest complete checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

from hf_visual_perceiver.training.recipe import Recipe, recipe_from_dict
from hf_visual_perceiver.training.state import read_state, write_state
from hf_visual_perceiver.utils.files import folder_written_aside, write_json, write_text, written_aside


# Keys of a recipe that do not change what is learned: data location, compute settings, logging and checkpoints.
FREE_KEYS = frozenset(
    {
        "dataset",
        "dataset_name",
        "cache_gib",
        "workers",
        "unreadable",
        "attention",
        "micro_batch_size",
        "trunk",
        "compile",
        "tracker",
        "log_every",
        "save_every",
        "keep_checkpoints",
    }
)


class RunFolder:
    """The folder of a run: recipe.yaml, log.jsonl, checkpoints/step_N, curves.png, and model/ once it is finished."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.yaml"
        self.log_file = self.path / "log.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.failure_file = self.path / "failure.json"
        self.failure_weights = self.path / "failure.safetensors"

    def check(self, recipe: Recipe, resume: bool, allow_recipe_change: bool = False) -> None:
        """Raise a `ValueError` if the folder cannot take this run; writes nothing.

        A folder that holds something else is rejected, and one that holds a run is accepted only with `resume`. A run
        resumes only with its own recipe, unless `allow_recipe_change` is set.
        """
        if not self.recipe_file.exists():
            if resume:
                raise ValueError(f"Expected a run to resume in {self.path}, found none.")
            if self.path.exists() and any(self.path.iterdir()):
                raise ValueError(f"Expected {self.path} to be empty or new; it holds something else.")
            return
        if not resume:
            raise ValueError(f"{self.path} already holds a run: continue it with --resume, or choose another folder.")
        if (changes := self.changes(recipe)) and not allow_recipe_change:
            raise ValueError(
                f"Expected the recipe that {self.path} was started with; these keys differ: {', '.join(changes)}. --allow-recipe-change continues with the new ones."
            )

    def changes(self, recipe: Recipe) -> list[str]:
        """List the keys that affect learning and differ from the run's own recipe, each as "key (old -> new)"."""
        before = recipe_from_dict(yaml.safe_load(self.recipe_file.read_text()), str(self.recipe_file))
        # A warm-up given as a share of the steps equals one given as the same number of steps.
        old, new = ({**r.to_dict(), "warmup_steps": r.warmup} for r in (before, recipe))
        differing = [key for key in new if key not in FREE_KEYS and new[key] != old[key]]
        return [f"{key} ({old[key]!r} -> {new[key]!r})" for key in differing]

    def finished(self, steps: int) -> bool:
        """Whether `model` was trained for `steps` steps; an extended run keeps its previous model until the end."""
        facts = self.model / "training.json"
        return facts.is_file() and json.loads(facts.read_text())["recipe"]["steps"] == steps

    def start(self, recipe: Recipe) -> None:
        """Create the folder, and remove partial files that a killed process may have left."""
        self.path.mkdir(parents=True, exist_ok=True)
        # Written first, because a folder without it is not recognised as a run.
        write_text(self.recipe_file, yaml.safe_dump(recipe.to_dict(), sort_keys=False))
        self.checkpoints.mkdir(exist_ok=True)
        for file in (self.failure_file, self.failure_weights):
            file.unlink(missing_ok=True)
        for leftover in (*self.checkpoints.glob(".*"), *self.path.glob(".model.*")):
            shutil.rmtree(leftover, ignore_errors=True)

    def saved_steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(int(p.name.removeprefix("step_")) for p in self.checkpoints.glob("step_*"))

    def save(self, state: dict[str, torch.Tensor], facts: dict[str, Any], step: int, keep: int) -> None:
        """Save the state after `step` steps, and delete all but the last `keep` checkpoints.

        Raises:
            OSError: If the checkpoint cannot be written, such as on a full disk; earlier checkpoints stay.
        """
        final = self.checkpoints / f"step_{step}"
        if final.exists():
            return
        try:
            with folder_written_aside(final) as aside:
                write_state(aside, state, facts)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"Cannot save step {step} in {self.path}: {error}. Complete checkpoints: {self.saved_steps() or 'none'}"
            ) from error
        for old in self.saved_steps()[:-keep]:
            for folder in (self.checkpoints / f"step_{old}", self.apart(old)):
                shutil.rmtree(folder, ignore_errors=True)

    def apart(self, step: int) -> Path:
        """Folder of a state that the optimiser writes itself (DeepSpeed); complete if that step's checkpoint exists."""
        return self.path / "apart" / f"step_{step}"

    def restore(self) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None:
        """Read the newest complete checkpoint: its step, state and facts; None if there is none."""
        steps = self.saved_steps()
        return (steps[-1], *read_state(self.checkpoints / f"step_{steps[-1]}")) if steps else None

    def truncate_log(self, step: int) -> None:
        """Remove log entries after `step`, which are about to be repeated."""
        if self.log_file.exists():
            lines = [line for line in self.log_file.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            write_text(self.log_file, "".join(line + "\n" for line in kept))

    def entries(self) -> list[dict[str, Any]]:
        """The log's entries, oldest first."""
        return [json.loads(line) for line in self.log_file.read_text().splitlines()] if self.log_file.exists() else []

    def hours(self) -> float:
        """Hours spent on training steps according to the log, over all resumptions."""
        return sum(entry.get("seconds", 0.0) for entry in self.entries()) / 3600

    def write_failure(self, report: dict[str, Any], weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write a report on a failed run, with its last logged steps and weights; it stays until the run resumes."""
        if weights is not None:
            with written_aside(self.failure_weights) as aside:
                save_file({name: value.contiguous() for name, value in weights.items()}, aside)
            report = {**report, "weights": self.failure_weights.name}
        write_json(self.failure_file, {**report, "log": self.entries()[-20:]})

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line to the log."""
        with self.log_file.open("a") as file:
            file.write(json.dumps(entry) + "\n")
