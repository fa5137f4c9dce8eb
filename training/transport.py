"""A run in a small form, to carry to another machine: `python -m hf_visual_perceiver.training.transport RUN TARGET`.

Weights, averaged weights and the optimiser's moments are rounded to bfloat16, half the bytes, and split in files under
15 MB. The target is a run's folder like any other, and `--resume` continues it.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .checkpointing import RunFolder
from .console import run_command
from .files import folder_written_aside
from .state import lighter, write_state


MAX_SHARD_SIZE = "14MB"


def write_transport(run: str | Path, target: str | Path, max_shard_size: str = MAX_SHARD_SIZE) -> list[Path]:
    """Write the newest checkpoint of `run`, with its recipe and log, to `target` in the small form.

    Args:
        run: A run's folder.
        target: A folder that is new.
        max_shard_size: Largest file, such as "14MB".

    Returns:
        The files of `target`.

    Raises:
        ValueError: If `run` has no complete checkpoint or one in files of DeepSpeed's own, or `target` exists.
    """
    source, target = RunFolder(run), Path(target)
    if not source.recipe_file.exists():
        raise ValueError(f"Expected a run's folder, got {run}.")
    restored = source.restore()
    if restored is None:
        raise ValueError(f"Expected a complete checkpoint in {run}, found none.")
    if target.exists():
        raise ValueError(f"Expected {target} to be new; it exists.")
    step, state, facts = restored
    if source.apart(step).exists():
        raise ValueError(f"Expected a state in safetensors, got one that DeepSpeed keeps in {source.apart(step)}.")
    with folder_written_aside(target) as aside:
        new = RunFolder(aside)
        checkpoint = new.checkpoints / f"step_{step}"
        checkpoint.mkdir(parents=True)
        write_state(checkpoint, lighter(state), facts, max_shard_size)
        for file in (source.recipe_file, source.log_file):
            if file.exists():
                (aside / file.name).write_bytes(file.read_bytes())
    return sorted(path for path in target.rglob("*") if path.is_file())


def command(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    target: Annotated[Path, typer.Argument(help="New folder for its small form.")],
) -> None:
    """Write a run's newest checkpoint in a small form, to be continued elsewhere with --resume."""
    console = Console()
    for file in write_transport(run, target):
        console.print(f"{file.stat().st_size / 1e6:8.2f} MB  {file}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_command(command)
