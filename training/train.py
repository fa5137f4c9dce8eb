"""Train a Visual Perceiver: `accelerate launch training/train.py --config training/recipes/NAME.yaml`.

accelerate decides on the number of processes and the device. All random numbers of a step are drawn from the recipe's
seed and the step, so that a resumed run continues with the same draws on every device.
"""

import logging
import os
from pathlib import Path
from typing import Annotated

from hf_visual_perceiver.utils.extras import require_extra


require_extra("train")

import torch
import typer
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import parse_flag_from_env

from hf_visual_perceiver.training.checkpointing import RunFolder
from hf_visual_perceiver.training.distributed import main_process_alone
from hf_visual_perceiver.training.recipe import Recipe, load_recipe
from hf_visual_perceiver.training.run import TrainingRun, console
from hf_visual_perceiver.training.stopping import StopRequest
from hf_visual_perceiver.utils.conditions import cpu_computes_in_bf16
from hf_visual_perceiver.utils.console import run_command


def train(
    recipe: Recipe,
    output_dir: str | Path,
    resume: bool = False,
    recipe_name: str = "recipe",
    max_minutes: float | None = None,
    allow_recipe_change: bool = False,
) -> Path | None:
    """Train by a recipe, to its end or for a limited time; at the end, write the Hub-ready model to `output_dir`/model.

    Args:
        recipe: Recipe of the run.
        output_dir: A new or empty folder; with `resume`, the folder of the run to continue.
        resume: Continue from the newest complete checkpoint.
        recipe_name: Name of the recipe on the model's card.
        max_minutes: Save a checkpoint and stop after this time; None runs to the end. SIGTERM does the same.
        allow_recipe_change: Resume although the recipe differs from that of the run.

    Returns:
        The folder of the trained model, or None if the run stopped before its end.

    Raises:
        ValueError: If the recipe, the dataset and the folder do not fit together; nothing is then written.
        FloatingPointError: If the loss or a weight is not finite; the last good checkpoints stay.
        OSError: If a checkpoint cannot be written, such as on a full disk; the last good checkpoints stay.
    """
    stop, folder = StopRequest(max_minutes), RunFolder(output_dir)
    # accelerate's state is not asked, as that would create it before the Accelerator configures it.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    slow_bf16 = recipe.mixed_precision == "bf16" and on_cpu and not cpu_computes_in_bf16()
    precision = "no" if slow_bf16 else recipe.mixed_precision
    accelerator = Accelerator(
        mixed_precision=precision, log_with=_tracker(recipe.tracker), project_dir=str(folder.path)
    )
    if slow_bf16 and accelerator.is_main_process:
        console.print("This CPU does not compute in bf16, which would be slow: float32 it is.")
    main_process_alone(accelerator, lambda: folder.check(recipe, resume, allow_recipe_change))
    if resume and folder.finished(recipe.steps):
        if accelerator.is_main_process:
            console.print(f"The run is finished; its model is in {folder.model}.")
        accelerator.end_training()
        return folder.model
    training = TrainingRun(recipe, folder, accelerator, recipe_name, resume)
    # All checks are done; from here on the folder is written to.
    training.start()
    training.loop(stop)
    return folder.model if training.finish(stop.reason()) else None


def _tracker(name: str | None) -> str | None:
    """Return the tracker, or print a message and return None if it is not installed."""
    if name is None or name in [str(getattr(t, "value", t)) for t in get_available_trackers()]:
        return name
    console.print(f"Tracker {name} is not installed; the run is logged to log.jsonl alone.")
    return None


def command(
    config: Annotated[Path, typer.Option(help="The recipe, a YAML file.", exists=True, dir_okay=False)],
    output_dir: Annotated[Path | None, typer.Option(help="Folder of the run; runs/RECIPE by default.")] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in the output folder, with its own recipe and any overrides."),
    ] = False,
    max_minutes: Annotated[
        float | None, typer.Option(help="Save the run and stop after this time; --resume continues it.")
    ] = None,
    allow_recipe_change: Annotated[
        bool,
        typer.Option(
            "--allow-recipe-change", help="Resume with the recipe of --config, even if it differs from the run's."
        ),
    ] = False,
    dataset: Annotated[str | None, typer.Option(help="Hub id, folder of parquet files, or imagefolder.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides of recipe keys, such as steps=100.")] = None,
) -> None:
    """Train a Visual Perceiver with a recipe."""
    folder, source = RunFolder(output_dir or Path("runs") / config.stem), config
    # The overrides that the run was started with need not be given again.
    if resume and not allow_recipe_change and folder.recipe_file.exists():
        source = folder.recipe_file
        if os.environ.get("RANK", "0") == "0":
            console.print(f"The recipe is the run's own, {source}.", markup=False, highlight=False, soft_wrap=True)
    recipe = load_recipe(source, [*(overrides or []), *([f"dataset={dataset}"] if dataset else [])])
    train(recipe, folder.path, resume, config.name, max_minutes, allow_recipe_change)


def main() -> None:
    """Entry point of the script."""
    logging.getLogger("datasets").setLevel(logging.ERROR)
    run_command(command, out_of_memory="a smaller micro_batch_size needs less")


if __name__ == "__main__":
    main()
