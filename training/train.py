"""Train a Visual Perceiver: `accelerate launch training/train.py --config training/recipes/NAME.yaml`.

One process or many, CPU or GPU: accelerate decides. Everything random in a step is seeded from the recipe's seed and the
step, so that a resumed run is the run that was not interrupted.
"""

import functools
import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.nn import functional as F

from hf_visual_perceiver.modeling import VisualPerceiverForImageClassification
from hf_visual_perceiver.training.checkpointing import RunFolder
from hf_visual_perceiver.training.conditions import measurement_conditions
from hf_visual_perceiver.training.data import (
    AugmentedImages,
    BatchOrder,
    ImageDataset,
    load_images,
    normalise,
    pixels_of_size,
    seed_everything,
    training_transform,
)
from hf_visual_perceiver.training.folder import save_folder
from hf_visual_perceiver.training.recipe import Recipe, load_recipe
from hf_visual_perceiver.training.schedules import create_schedule


console = Console(stderr=True)


def train(recipe: Recipe, output_dir: str | Path, resume: bool = False, recipe_name: str = "recipe") -> Path:
    """Run a recipe to its end and write the Hub-ready model to `output_dir`/model.

    Args:
        recipe: What to do.
        output_dir: A new or empty folder, or with `resume` that of the run to continue.
        resume: Continue from the newest complete checkpoint.
        recipe_name: What to call the recipe on the model's card.

    Returns:
        The folder of the trained model.

    Raises:
        ValueError: If the recipe, the dataset and the folder do not fit together; nothing is then written.
        FloatingPointError: If the loss or a weight is not finite; the last good checkpoints stay.
    """
    run = RunFolder(output_dir)
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision,
        log_with=_tracker(recipe.tracker),
        project_dir=str(run.path),
        # The batches are dealt by BatchOrder, which accelerate would deal a second time.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=False),
    )
    # The main process judges for all: a late one would find what the first has begun to write.
    verdict: list[ValueError | None] = [None]
    if accelerator.is_main_process:
        try:
            run.check(recipe, resume)
        except ValueError as error:
            verdict = [error]
    broadcast_object_list(verdict)
    if verdict[0] is not None:
        raise verdict[0]
    if resume and run.model.exists() and recipe.steps in run.saved_steps():
        if accelerator.is_main_process:
            console.print(f"The run is finished; its model is in {run.model}.")
        return run.model

    data = load_images(recipe.dataset, recipe.split, recipe.cache_gib)
    if not recipe.validation < len(data):
        raise ValueError(f"Expected `validation` to be below the {len(data)} images, got {recipe.validation}.")
    first_validation = len(data) - recipe.validation
    training, validation = data.subset(slice(None, first_validation)), data.subset(slice(first_validation, None))
    order = BatchOrder(
        num_images=len(training),
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        repeats=recipe.augmentation.repeats,
        last_step=recipe.steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    model = create_model(recipe, data.label_names)
    schedule = create_schedule(recipe.queries, model.config.num_queries, recipe.seed)
    transform = training_transform(
        recipe.augmentation, model.config.image_height_width, model.config.timm_pretrained_cfg
    )
    criterion = create_criterion(recipe, len(data.label_names))
    optimizer = create_optimizer(model, recipe)
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
    # Everything above raises if the recipe does not fit; from here on the folder is written to.
    if accelerator.is_main_process:
        run.start(recipe)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("hf_visual_perceiver", config={"recipe": recipe_name, "seed": recipe.seed})
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = ModelEmaV3(accelerator.unwrap_model(model), decay=recipe.ema_decay) if recipe.ema_decay else None
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    first_step = run.restore(accelerator) if resume else 0
    if accelerator.is_main_process and resume:
        run.truncate_log(first_step)
        console.print(f"Resuming after step {first_step}.")

    order.first_step = first_step
    loader = torch.utils.data.DataLoader(
        AugmentedImages(training, transform, recipe.seed),
        batch_sampler=order,
        num_workers=recipe.workers,
        persistent_workers=recipe.workers > 0,
        pin_memory=accelerator.device.type == "cuda",
    )

    def evaluate(step: int) -> None:
        if len(validation) == 0:
            return
        network = ema.module if ema is not None else accelerator.unwrap_model(model)
        for K in recipe.evaluate_queries or [network.config.num_queries]:
            accuracy = validation_accuracy(network, validation, K, accelerator, recipe.batch_size)
            if accelerator.is_main_process:
                run.log({"step": step, "validation_accuracy": accuracy, "K": K})
                console.print(f"step {step}: validation accuracy {100 * accuracy:.2f} % with K = {K}")
            accelerator.log({f"validation_accuracy/K={K}": accuracy}, step=step)

    progress = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not accelerator.is_main_process,
    )
    with progress:
        task = progress.add_task("training", total=recipe.steps, completed=first_step, status="")
        model.train()
        began = shown = time.perf_counter()
        seen = 0
        for step, (images, labels) in enumerate(loader, start=first_step):
            scheduler.step_update(step)
            K = schedule(step)
            where = functools.partial(_whereabouts, run, step, K)
            # The processes share the mixing of a batch (NumPy) but not their dropped paths (torch).
            seed_everything(recipe.seed, step)
            torch.manual_seed(torch.initial_seed() % 2**32 + accelerator.process_index)
            images, labels = images.to(accelerator.device), labels.to(accelerator.device)
            with accelerator.autocast():
                loss = criterion(images, labels, functools.partial(logits_at, model, K))
            accelerator.backward(loss)
            if recipe.clip_gradient_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), recipe.clip_gradient_norm)
            optimizer.step()
            optimizer.zero_grad()
            done = step + 1
            if ema is not None:
                ema.update(accelerator.unwrap_model(model), step=done)

            seen += recipe.batch_size
            if done % recipe.log_every == 0 or done == recipe.steps:
                mean_loss = accelerator.reduce(loss.detach().float(), "mean").item()
                if not math.isfinite(mean_loss):
                    raise FloatingPointError(f"Expected a finite loss, got {mean_loss} {where()}.")
                rate = seen / (time.perf_counter() - began)
                began, seen = time.perf_counter(), 0
                entry = {"loss": mean_loss, "K": K, "learning_rate": optimizer.param_groups[0]["lr"]}
                accelerator.log({**entry, "images_per_second": rate}, step=done)
                if accelerator.is_main_process:
                    run.log({"step": done, **entry, "images_per_second": round(rate, 1)})
                status = f"loss {mean_loss:.3f}  K {K:<3d} {rate:,.0f} images/s"
                progress.update(task, status=status)
                if accelerator.is_main_process and not console.is_terminal and time.perf_counter() - shown > 60:
                    console.print(f"step {done}/{recipe.steps}  {status}")
                    shown = time.perf_counter()
            progress.update(task, completed=done)
            if done % recipe.save_every == 0 or done == recipe.steps:
                # A checkpoint that cannot be continued must not take the place of one that can.
                if not all_finite(accelerator, model):
                    raise FloatingPointError(f"Expected finite weights, got others {where()}.")
                run.save(accelerator, done, recipe.keep_checkpoints)
            if recipe.evaluate_every and done % recipe.evaluate_every == 0 and done != recipe.steps:
                evaluate(done)
                model.train()
                began, seen = time.perf_counter(), 0
        evaluate(recipe.steps)

    if accelerator.is_main_process:
        published = {**recipe.to_dict(), "dataset": recipe.dataset_name or recipe.dataset}
        facts = {
            "recipe_name": recipe_name,
            # With the dataset's public name: where it lies on this machine helps nobody.
            "recipe": published,
            "training_images": len(training),
            "epochs": recipe.steps * recipe.batch_size / len(training),
            "processes": accelerator.num_processes,
            "training_hours": run.hours(recipe.batch_size),
            "validation_accuracy": {
                entry["K"]: entry["validation_accuracy"]
                for entry in run.entries()
                if entry["step"] == recipe.steps and "validation_accuracy" in entry
            },
            "conditions": measurement_conditions(accelerator.device),
        }
        files = {
            "training.json": json.dumps(facts, indent=2) + "\n",
            "recipe.yaml": yaml.safe_dump(published, sort_keys=False),
        }
        save_folder(ema.module if ema is not None else accelerator.unwrap_model(model), run.model, files)
        console.print(f"The trained model is in {run.model}.")
    accelerator.end_training()
    return run.model


def _whereabouts(run: RunFolder, step: int, K: int) -> str:
    return f"at step {step} with K = {K}; complete checkpoints: {run.saved_steps() or 'none'}"


@torch.no_grad()
def all_finite(accelerator: Accelerator, model: torch.nn.Module) -> bool:
    """Whether every weight of every process is finite."""
    finite = torch.stack([p.isfinite().all() for p in model.parameters()]).all()
    return accelerator.reduce(finite.float(), "sum").item() == accelerator.num_processes


def logits_at(model: torch.nn.Module, K: int, images: torch.Tensor) -> torch.Tensor:
    """The network's answer with its first K queries: (B, C, H, W) -> (B, labels)."""
    return model(images, num_active_queries=K).logits


def create_model(recipe: Recipe, label_names: list[str]) -> VisualPerceiverForImageClassification:
    """The recipe's model with seeded weights, for these labels."""
    seed_everything(recipe.seed)
    config = recipe.model_config(
        id2label=dict(enumerate(label_names)), label2id={name: i for i, name in enumerate(label_names)}
    )
    model = VisualPerceiverForImageClassification(config)
    if recipe.attention is not None:
        try:
            model.set_attn_implementation(recipe.attention)
        except (ImportError, ValueError) as error:
            raise ValueError(f"Cannot use `attention` {recipe.attention!r}: {error}") from error
        if model.config._attn_implementation != recipe.attention:  # older transformers only warn
            raise ValueError(f"Cannot use `attention` {recipe.attention!r}: transformers does not know it.")
    return model


def create_optimizer(model: VisualPerceiverForImageClassification, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimiser of that name; biases, norms, positions and queries are not decayed, as timm does for its models."""
    spared = {name for name, _ in model.named_parameters() if name.endswith(("queries", "position_embeddings"))}
    groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=spared)
    try:
        return create_optimizer_v2(groups, opt=recipe.optimizer, lr=recipe.learning_rate, weight_decay=0.0)
    except (ValueError, KeyError, AssertionError) as error:
        raise ValueError(
            f"Expected `optimizer` to be a name of timm's optimisers, got {recipe.optimizer!r}."
        ) from error


def create_criterion(
    recipe: Recipe, num_labels: int
) -> Callable[[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]], torch.Tensor]:
    """The loss of a batch as a function of images, labels and the network; mixes the images where the recipe says so."""
    a = recipe.augmentation
    if not (a.mixup or a.cutmix):
        return lambda images, labels, network: F.cross_entropy(
            network(images).float(), labels, label_smoothing=a.label_smoothing
        )
    mixup = Mixup(
        mixup_alpha=a.mixup,
        cutmix_alpha=a.cutmix,
        prob=a.mixup_probability,
        switch_prob=a.mixup_switch,
        label_smoothing=a.label_smoothing,
        num_classes=num_labels,
    )
    cross_entropy = SoftTargetCrossEntropy()

    def criterion(images: torch.Tensor, labels: torch.Tensor, network: Callable) -> torch.Tensor:
        images, targets = mixup(images, labels)
        return cross_entropy(network(images).float(), targets)

    return criterion


@torch.no_grad()
def validation_accuracy(
    model: VisualPerceiverForImageClassification, data: ImageDataset, K: int, accelerator: Accelerator, batch_size: int
) -> float:
    """Accuracy at the first K queries, each process taking its share of the images."""
    model.eval()
    size, cfg = model.config.image_height_width, model.config.timm_pretrained_cfg
    correct = torch.zeros((), device=accelerator.device)
    for first in range(accelerator.process_index * batch_size, len(data), accelerator.num_processes * batch_size):
        indices = range(first, min(first + batch_size, len(data)))
        pixels = pixels_of_size(data, indices, size, cfg["interpolation"])
        images = normalise(pixels, cfg["mean"], cfg["std"]).to(accelerator.device)
        with accelerator.autocast():
            logits = model(images, num_active_queries=K).logits
        labels = torch.from_numpy(data.labels[indices.start : indices.stop]).to(accelerator.device)
        correct += (logits.argmax(-1) == labels).sum()
    return (accelerator.reduce(correct, "sum") / len(data)).item()


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
    dataset: Annotated[str | None, typer.Option(help="Hub id, folder of parquet files, or imagefolder.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Keys of the recipe, such as steps=100.")] = None,
) -> None:
    """Train a Visual Perceiver by a recipe."""
    try:
        recipe = load_recipe(config, [*(overrides or []), *([f"dataset={dataset}"] if dataset else [])])
        train(recipe, output_dir or Path("runs") / config.stem, resume, config.name)
    except (ValueError, OSError, FloatingPointError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


def main() -> None:
    """Entry point of the script."""
    logging.getLogger("datasets").setLevel(logging.ERROR)
    typer.run(command)


if __name__ == "__main__":
    main()
