"""Train a Visual Perceiver: `accelerate launch training/train.py --config training/recipes/NAME.yaml`.

One process or many, CPU or GPU: accelerate decides. Everything random in a step is drawn from the recipe's seed and the
step, so that a run in pieces, on whatever devices, is one run.
"""

import json
import logging
import math
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, gather_object, parse_flag_from_env
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.distributed.tensor import DTensor

from hf_visual_perceiver.modeling import QuerySubset, VisualPerceiverForImageClassification
from hf_visual_perceiver.training.augmentation import BatchAugmentation
from hf_visual_perceiver.training.batches import TrainingData, open_data
from hf_visual_perceiver.training.checkpointing import RunFolder
from hf_visual_perceiver.training.conditions import cpu_computes_in_bf16, measurement_conditions
from hf_visual_perceiver.training.curves import plot_curves
from hf_visual_perceiver.training.data import (
    ImageDataset,
    normalise,
    pixels_of_size,
    seed_everything,
    share_of_batch,
)
from hf_visual_perceiver.training.distributed import all_finite, gathered, keeps_state_apart, main_process_alone
from hf_visual_perceiver.training.factory import (
    Network,
    compile_blocks,
    create_model,
    create_optimizer,
    input_facts,
    mean_macs,
)
from hf_visual_perceiver.training.folder import save_folder
from hf_visual_perceiver.training.initial import earlier_training, load_initial_weights
from hf_visual_perceiver.training.objective import Objective
from hf_visual_perceiver.training.recipe import Recipe, load_recipe
from hf_visual_perceiver.training.schedules import Schedule, create_schedule, describe
from hf_visual_perceiver.training.state import apply_state, gather_state
from hf_visual_perceiver.training.step import check_batch, forward_backward
from hf_visual_perceiver.training.stopping import StopRequest, Stopwatch
from hf_visual_perceiver.training.teacher import FrozenTeacher, load_teacher


console = Console(stderr=True)


def train(
    recipe: Recipe,
    output_dir: str | Path,
    resume: bool = False,
    recipe_name: str = "recipe",
    max_minutes: float | None = None,
    allow_recipe_change: bool = False,
) -> Path | None:
    """Run a recipe, to its end or for some time, and at its end write the Hub-ready model to `output_dir`/model.

    Args:
        recipe: What to do.
        output_dir: A new or empty folder, or with `resume` that of the run to continue.
        resume: Continue from the newest complete checkpoint.
        recipe_name: What to call the recipe on the model's card.
        max_minutes: Stop after this time with everything saved; None runs to the end. SIGTERM stops a run likewise.
        allow_recipe_change: Resume although the recipe differs from that of the run.

    Returns:
        The folder of the trained model, or None if the run stopped before its end.

    Raises:
        ValueError: If the recipe, the dataset and the folder do not fit together; nothing is then written.
        FloatingPointError: If the loss or a weight is not finite; the last good checkpoints stay.
        OSError: If a checkpoint cannot be written, such as on a full disk; the last good checkpoints stay.
    """
    stop = StopRequest(max_minutes)
    run = RunFolder(output_dir)
    # Not by accelerate's state, which would then be made before the Accelerator says how.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    slow_bf16 = recipe.mixed_precision == "bf16" and on_cpu and not cpu_computes_in_bf16()
    precision = "no" if slow_bf16 else recipe.mixed_precision
    accelerator = Accelerator(mixed_precision=precision, log_with=_tracker(recipe.tracker), project_dir=str(run.path))
    if slow_bf16 and accelerator.is_main_process:
        console.print("This CPU does not compute in bf16, which would be slow: float32 it is.")
    main_process_alone(accelerator, lambda: run.check(recipe, resume, allow_recipe_change))
    if resume and run.finished(recipe.steps):
        if accelerator.is_main_process:
            console.print(f"The run is finished; its model is in {run.model}.")
        return run.model

    sharded, apart = accelerator.distributed_type == DistributedType.FSDP, keeps_state_apart(accelerator)
    if (sharded or apart) and recipe.ema_decay is not None:
        raise ValueError(
            f"Expected `ema_decay` to be null with {accelerator.distributed_type.value}, which splits the weights or holds "
            f"them in half precision, got {recipe.ema_decay}."
        )
    source = open_data(recipe, accelerator.device, accelerator.process_index, accelerator.num_processes)
    network = create_model(recipe, source.label_names)
    num_queries, size, preprocessing = input_facts(network)
    fresh: list[str] = []
    earlier: dict[str, Any] | None = None
    if recipe.initial_model is not None and not (resume and run.saved_steps()):
        assert isinstance(network, VisualPerceiverForImageClassification)  # the recipe has seen to it
        fresh = load_initial_weights(network, recipe.initial_model)
        earlier = earlier_training(recipe.initial_model)
    schedule = create_schedule(recipe.queries, num_queries, recipe.seed, recipe.steps)
    check_batch(recipe, schedule, accelerator.num_processes)
    augment = BatchAugmentation(
        recipe.augmentation,
        len(source.label_names),
        preprocessing["mean"],
        preprocessing["std"],
        recipe.seed,
    )
    teacher: FrozenTeacher | None = None
    if recipe.teacher is not None:
        teacher = load_teacher(recipe.teacher.model, source.label_names, size, preprocessing).to(accelerator.device)
    optimizer = create_optimizer(network, recipe)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=recipe.steps,
        warmup_epochs=recipe.warmup_steps,
        min_lr=recipe.min_learning_rate,
        warmup_lr=recipe.warmup_learning_rate,
        step_on_epochs=False,
        updates_per_epoch=1,
    )

    cores = (os.cpu_count() or 1) // accelerator.num_processes
    if accelerator.device.type == "cpu" and torch.get_num_threads() < cores and accelerator.is_main_process:
        console.print(
            f"Each process uses {torch.get_num_threads()} of its {cores} cores; "
            f"`accelerate launch --num_cpu_threads_per_process {cores}` uses all."
        )
    if fresh and accelerator.is_main_process:
        console.print(f"{recipe.initial_model} has other labels: the head begins with random weights.")
    # Everything above raises if the recipe does not fit; from here on the folder is written to.
    main_process_alone(accelerator, lambda: run.start(recipe))
    accelerator.init_trackers("hf_visual_perceiver", config={"recipe": recipe_name, "seed": recipe.seed})
    if recipe.compile:
        compile_blocks(network)
    packed = recipe.trunk == "packed" or (recipe.trunk == "auto" and accelerator.device.type == "cuda")
    objective = Objective(network, recipe.students, recipe.teacher, packed)
    if accelerator.state.deepspeed_plugin is not None:  # which asks a data loader, of which there is none
        batch = recipe.micro_batch_size or recipe.batch_size // accelerator.num_processes
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = batch
    model, optimizer = accelerator.prepare(objective, optimizer)
    average = ModelEmaV3(network, decay=recipe.ema_decay) if recipe.ema_decay else None

    def published() -> Network:
        """The network that is evaluated and published: the average, if there is one."""
        if average is not None:
            return average.module
        return gathered(model, create_model(recipe, source.label_names)) if sharded else network

    first_step = 0
    if resume and (restored := run.restore()) is not None:
        first_step, state, facts = restored
        if apart:
            accelerator.load_state(str(run.apart(first_step)))
        else:
            apply_state(state, facts, model, optimizer, average and average.module)
        source.load_state_dict(facts["data"])
        earlier = facts.get("earlier_training")
        if accelerator.scaler is not None and facts["scaler"]:
            accelerator.scaler.load_state_dict(facts["scaler"])
    if accelerator.is_main_process and resume:
        run.truncate_log(first_step)
        console.print(f"Resuming after step {first_step}.")
    batches = source.batches(first_step, size, preprocessing["interpolation"])
    positions = share_of_batch(recipe.batch_size, accelerator.process_index, accelerator.num_processes)

    def save(step: int) -> None:
        if apart:
            accelerator.save_state(str(run.apart(step)))
        state, facts = ({}, {}) if apart else gather_state(model, optimizer, average and average.module)
        facts["earlier_training"] = earlier  # kept here, as a run may go on where the folder it began with is not
        facts["data"] = gather_object([batches.state_dict(step)])
        facts["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        main_process_alone(accelerator, lambda: run.save(state, facts, step, recipe.keep_checkpoints))

    def evaluate(step: int) -> None:
        budgets = recipe.evaluate_queries or [num_queries]
        accuracies = validation_accuracy(published(), source.validation, budgets, accelerator, recipe.batch_size)
        accelerator.log({f"validation_accuracy/K={K}": accuracy for K, accuracy in accuracies.items()}, step=step)
        if accelerator.is_main_process:
            for K, accuracy in accuracies.items():
                run.log({"step": step, "validation_accuracy": accuracy, "K": K})
            line = ", ".join(f"{100 * accuracy:.2f} with K = {K}" for K, accuracy in accuracies.items())
            console.print(f"step {step}: validation accuracy (%) {line}", highlight=False)

    progress = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not accelerator.is_main_process,
    )
    done = first_step
    with progress, stop:
        task = progress.add_task("training", total=recipe.steps, completed=first_step, status="")
        model.train()
        clock = Stopwatch()
        for step, (images, labels) in enumerate(batches, start=first_step):
            scheduler.step_update(step)
            subsets = schedule(step)
            pixel_values, targets = augment(images, labels, step, positions, recipe.batch_size)
            # Drawn by torch: dropped paths, which differ between the processes.
            seed_everything(recipe.seed, step, accelerator.process_index)
            torch.manual_seed(torch.initial_seed())
            losses = forward_backward(
                accelerator, model, pixel_values, targets, subsets, schedule, recipe, teacher, average
            )
            if recipe.clip_gradient_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), recipe.clip_gradient_norm)
            optimizer.step()
            optimizer.zero_grad()
            done = step + 1
            if average is not None:
                average.update(network, step=done)

            clock.count(recipe.batch_size)
            stopping = False
            if done % recipe.log_every == 0 or done == recipe.steps:
                # The one place where the host waits for the device, and where the processes agree on stopping.
                report = accelerator.reduce(torch.cat([losses, stop.as_tensor(losses.device)]), "mean").tolist()
                stopping = report.pop() > 0
                entry: dict[str, Any] = {"loss": report[0] + recipe.students.weight * report[1]}
                if schedule.distils:
                    entry |= {"full_loss": report[0], "student_loss": report[1]}
                if not math.isfinite(entry["loss"]):
                    _fail(accelerator, run, f"Expected a finite loss, got {entry['loss']}", step, subsets, network)
                entry |= {"K": describe(subsets), "learning_rate": optimizer.param_groups[0]["lr"]}
                entry |= {"images_per_second": round(clock.rate(), 1), "seconds": round(clock.seconds, 3)}
                scalars = {key: value for key, value in entry.items() if isinstance(value, (int, float))}
                accelerator.log(scalars, step=done)
                status = f"loss {entry['loss']:.3f}  K {entry['K']}  {clock.rate():,.0f} images/s"
                progress.update(task, status=status)
                if accelerator.is_main_process:
                    run.log({"step": done, **entry})
                    if not console.is_terminal and clock.minute_passed():
                        console.print(f"step {done}/{recipe.steps}  {status}", highlight=False)
                clock.restart()
            progress.update(task, completed=done)
            stopping = stopping or (accelerator.num_processes == 1 and stop.requested())
            if done % recipe.save_every == 0 or done == recipe.steps or stopping:
                # A checkpoint that cannot be continued must not take the place of one that can.
                if not all_finite(accelerator, network):
                    _fail(accelerator, run, "Expected finite weights, got others", step, subsets, network)
                save(done)
            if stopping:
                break
            if recipe.evaluate_every and done % recipe.evaluate_every == 0 and done != recipe.steps:
                evaluate(done)
                model.train()
                clock.restart()
    finished = done == recipe.steps
    if finished:
        evaluate(done)
    final = published() if finished else network
    if accelerator.is_main_process:
        curves = run.path / "curves.png"
        plot_curves(run.entries(), curves)
        if finished:
            write_model(recipe, recipe_name, run, final, source, schedule, accelerator, earlier)
            console.print(f"The trained model is in {run.model}, the curves in {curves}.", soft_wrap=True)
        else:
            console.print(
                f"Stopped after step {done} of {recipe.steps} ({stop.reason()}); --resume goes on. Curves: {curves}",
                soft_wrap=True,
            )
    accelerator.end_training()
    return run.model if finished else None


def write_model(
    recipe: Recipe,
    recipe_name: str,
    run: RunFolder,
    model: Network,
    source: TrainingData,
    schedule: Schedule,
    accelerator: Accelerator,
    earlier: dict[str, Any] | None = None,
) -> None:
    """Write the trained model with the facts of its training to the run's `model` folder."""
    # With the dataset's public name: where it lies on this machine helps nobody.
    values = {**recipe.to_dict(), "dataset": recipe.dataset_name or recipe.dataset}
    entries = run.entries()
    facts = {
        "recipe_name": recipe_name,
        "recipe": values,
        "training_images": None if source.training is None else len(source.training),
        "epochs": None if source.training is None else recipe.steps * recipe.batch_size / len(source.training),
        "processes": accelerator.num_processes,
        "training_hours": run.hours(),
        "macs_per_image": mean_macs(model, schedule, recipe.steps),
        "validation_accuracy": {
            entry["K"]: entry["validation_accuracy"]
            for entry in entries
            if entry["step"] == recipe.steps and "validation_accuracy" in entry
        },
        "conditions": measurement_conditions(accelerator.device),
    }
    if earlier is not None:
        facts["earlier_training"] = earlier
    files = {
        "training.json": json.dumps(facts, indent=2) + "\n",
        "recipe.yaml": yaml.safe_dump(values, sort_keys=False),
    }
    save_folder(model, run.model, files)


def _fail(
    accelerator: Accelerator,
    run: RunFolder,
    problem: str,
    step: int,
    subsets: list[QuerySubset],
    network: Network,
) -> None:
    """Keep what is known about a run that went wrong, and stop."""
    report = {"step": step, "K": describe(subsets), "problem": problem, "complete_checkpoints": run.saved_steps()}
    # Of weights that FSDP has split no process has all.
    split = any(isinstance(parameter, DTensor) for parameter in network.parameters())
    main_process_alone(accelerator, lambda: run.write_failure(report, None if split else network.state_dict()))
    raise FloatingPointError(
        f"{problem} at step {step} with K = {report['K']}; complete checkpoints: "
        f"{report['complete_checkpoints'] or 'none'}. Details: {run.failure_file}"
    )


@torch.no_grad()
def validation_accuracy(
    model: Network,
    data: ImageDataset,
    budgets: list[int],
    accelerator: Accelerator,
    batch_size: int,
) -> dict[int, float]:
    """Accuracy at each K of `budgets`, each process taking its share of the images; empty without images."""
    if len(data) == 0:
        return {}
    model.eval()
    _, size, cfg = input_facts(model)
    subsets = [QuerySubset(K) for K in budgets]
    correct = torch.zeros(len(budgets), device=accelerator.device)
    for first in range(accelerator.process_index * batch_size, len(data), accelerator.num_processes * batch_size):
        indices = range(first, min(first + batch_size, len(data)))
        pixels = pixels_of_size(data, indices, size, cfg["interpolation"])
        images = normalise(pixels, cfg["mean"], cfg["std"]).to(accelerator.device)
        with accelerator.autocast():
            all_logits = torch.stack(model.forward_subsets(images, subsets, together=False))
        labels = torch.from_numpy(data.labels[indices.start : indices.stop]).to(accelerator.device)
        correct += (all_logits.argmax(-1) == labels).sum(-1)
    accuracies = (accelerator.reduce(correct, "sum") / len(data)).tolist()
    return dict(zip(budgets, accuracies, strict=True))


def _tracker(name: str | None) -> str | None:
    """The tracker, or None with a message when it is not installed."""
    if name is None or name in [str(getattr(t, "value", t)) for t in get_available_trackers()]:
        return name
    console.print(f"Tracker {name} is not installed; the run is logged to log.jsonl alone.")
    return None


def command(
    config: Annotated[Path, typer.Option(help="The recipe, a YAML file.", exists=True, dir_okay=False)],
    output_dir: Annotated[Path | None, typer.Option(help="Folder of the run; runs/RECIPE by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop after this time with everything saved; --resume goes on.")
    ] = None,
    allow_recipe_change: Annotated[
        bool, typer.Option("--allow-recipe-change", help="Resume with a recipe that differs from the run's.")
    ] = False,
    dataset: Annotated[str | None, typer.Option(help="Hub id, folder of parquet files, or imagefolder.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Keys of the recipe, such as steps=100.")] = None,
) -> None:
    """Train a Visual Perceiver by a recipe."""
    try:
        recipe = load_recipe(config, [*(overrides or []), *([f"dataset={dataset}"] if dataset else [])])
        folder = output_dir or Path("runs") / config.stem
        train(recipe, folder, resume, config.name, max_minutes, allow_recipe_change)
    except (ValueError, OSError, FloatingPointError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


def main() -> None:
    """Entry point of the script."""
    logging.getLogger("datasets").setLevel(logging.ERROR)
    typer.run(command)


if __name__ == "__main__":
    main()
