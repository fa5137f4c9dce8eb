"""One training run: setup, training loop, checkpoints and the final model."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.distributed.tensor import DTensor

from hf_visual_perceiver.data.images import ImageDataset, normalise, pixels_of_size, seed_everything, share_of_batch
from hf_visual_perceiver.modeling import Budget, Pass
from hf_visual_perceiver.training.augmentation import BatchAugmentation
from hf_visual_perceiver.training.batches import fits_in_memory, open_data
from hf_visual_perceiver.training.checkpointing import RunFolder
from hf_visual_perceiver.training.curves import in_words, plot_curves, step_names
from hf_visual_perceiver.training.distributed import all_finite, gathered, keeps_state_apart, main_process_alone
from hf_visual_perceiver.training.factory import (
    Network,
    block_ends,
    compile_blocks,
    create_model,
    create_optimizer,
    input_facts,
    knobs_of,
    ladder_of,
    mean_macs,
)
from hf_visual_perceiver.training.folder import save_folder
from hf_visual_perceiver.training.initial import earlier_training, load_initial_stem, load_initial_weights
from hf_visual_perceiver.training.objective import Objective
from hf_visual_perceiver.training.recipe import Recipe, TeacherLoss
from hf_visual_perceiver.training.schedules import create_schedule, describe
from hf_visual_perceiver.training.state import apply_state, gather_state
from hf_visual_perceiver.training.step import check_batch, forward_backward
from hf_visual_perceiver.training.stopping import StopRequest, Stopwatch
from hf_visual_perceiver.training.teacher import FrozenTeacher, load_teacher
from hf_visual_perceiver.training.teacher_cache import (
    TeacherCache,
    cache_facts,
    create_cache,
    open_cache,
    view_augmentation,
)
from hf_visual_perceiver.utils.conditions import measurement_conditions


console = Console(stderr=True)


class TrainingRun:
    """A recipe's network, data, losses and state, on the processes and devices of an accelerator.

    The constructor checks that everything fits and writes nothing; `start` creates or resumes the run's folder, `loop`
    trains, and `finish` writes the model or reports how far the run got. Every process has to call each of them.

    Args:
        recipe: Recipe of the run.
        folder: Folder of the run.
        accelerator: Processes and devices to train on.
        recipe_name: Name of the recipe on the model's card.
        resume: Continue from the folder's newest complete checkpoint.

    Raises:
        ValueError: If the recipe, the dataset and the processes do not fit together.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        accelerator: Accelerator,
        recipe_name: str = "recipe",
        resume: bool = False,
    ):
        self.recipe, self.folder, self.accelerator = recipe, folder, accelerator
        self.recipe_name, self.resume = recipe_name, resume
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        self.apart = keeps_state_apart(accelerator)
        if (self.sharded or self.apart) and recipe.ema_decay is not None:
            raise ValueError(
                f"Expected `ema_decay` to be null with {accelerator.distributed_type.value}, which splits the weights or "
                f"holds them in half precision, got {recipe.ema_decay}."
            )
        self.source = open_data(recipe, accelerator.device, accelerator.process_index, accelerator.num_processes)
        self.network = create_model(recipe, self.source.label_names)
        self.size, self.preprocessing = input_facts(self.network)
        if recipe.augmentation.alternating_flip and not self.known_images():
            height, width = self.size
            raise ValueError(
                f"Expected decoded images of the network's size {height}x{width} with `augmentation.alternating_flip`, "
                "got others, which are resized anew at each use."
            )
        self.ladder = ladder_of(self.network)
        self.fresh: list[str] = []
        self.earlier: dict[str, Any] | None = None
        if recipe.initial_model is not None and not (resume and folder.saved_steps()):
            self.fresh = load_initial_weights(self.network, recipe.initial_model)
            self.earlier = earlier_training(recipe.initial_model)
        if recipe.initial_stem is not None and not (resume and folder.saved_steps()):
            load_initial_stem(self.network, recipe.initial_stem)
        self.schedule = create_schedule(
            recipe.budgets, self.ladder, recipe.seed, recipe.steps, block_ends(self.network)
        )
        check_batch(recipe, self.schedule, accelerator.num_processes)
        self.augment = BatchAugmentation(
            recipe.augmentation,
            len(self.source.label_names),
            self.preprocessing["mean"],
            self.preprocessing["std"],
            recipe.seed,
            num_images=0 if self.source.training is None else len(self.source.training),
        )
        self.teacher: FrozenTeacher | None = None
        if recipe.teacher is not None:
            teacher = load_teacher(recipe.teacher.model, self.source.label_names, self.size, self.preprocessing)
            self.teacher = teacher.to(accelerator.device)
        self.cache: TeacherCache | None = None
        self.cache_facts: dict[str, Any] | None = None
        if recipe.teacher is not None and recipe.teacher.cache is not None:
            self.cache_facts = self.facts_of_cache(recipe.teacher)
            if Path(recipe.teacher.cache).exists():
                self.cache = open_cache(recipe.teacher.cache, self.cache_facts, self.view_augmentation())
        self.objective = Objective(self.network, recipe.students, recipe.teacher, recipe.stem_loss)
        self.optimizer = create_optimizer(self.objective, recipe)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched="cosine",
            num_epochs=recipe.steps,
            warmup_epochs=recipe.warmup,
            min_lr=recipe.min_learning_rate,
            warmup_lr=recipe.warmup_learning_rate,
            step_on_epochs=False,
            updates_per_epoch=1,
        )
        self.done = 0  # number of finished steps

    def known_images(self) -> bool:
        """Whether the training images are decoded and of the network's size, so that each has an index and an epoch."""
        return self.source.training is not None and fits_in_memory(self.source.training, self.size)

    def facts_of_cache(self, loss: TeacherLoss) -> dict[str, Any]:
        """The facts that a cache of the teacher's logits has to match."""
        data = self.source.training
        if self.teacher is None or data is None or not self.known_images():
            raise ValueError("Expected decoded images of the network's size with `teacher.cache`, got others.")
        return cache_facts(self.teacher, self.recipe.augmentation, self.preprocessing, data, loss.views)

    def view_augmentation(self) -> BatchAugmentation:
        """The augmentation that makes the views of a cache."""
        assert self.source.training is not None, "facts_of_cache has looked"
        names, images = self.source.label_names, len(self.source.training)
        return view_augmentation(self.recipe.augmentation, len(names), self.preprocessing, images)

    def prepare_cache(self) -> None:
        """Compute the teacher's logits unless they are cached already; from here on the teacher is not run."""
        recipe, data = self.recipe, self.source.training
        if self.cache_facts is None or recipe.teacher is None or recipe.teacher.cache is None:
            return
        assert self.teacher is not None, "facts_of_cache has looked"
        assert data is not None, "facts_of_cache has looked"
        folder, facts, teacher = recipe.teacher.cache, self.cache_facts, self.teacher
        if self.cache is None:
            self.say(f"Computing the teacher's answers on {facts['views']} views of each image, once, for {folder}.")
            augment = self.view_augmentation()
            main_process_alone(
                self.accelerator, lambda: create_cache(folder, facts, augment, teacher, data, self.accelerator)
            )
            self.cache = open_cache(folder, facts, augment)
        self.teacher = None

    def say(self, message: str) -> None:
        """Print from the main process."""
        if self.accelerator.is_main_process:
            console.print(message, highlight=False, soft_wrap=True)

    def start(self) -> None:
        """Write the recipe to the folder, prepare the model for the devices, and restore the state of a resumed run."""
        recipe, accelerator = self.recipe, self.accelerator
        cores = (os.cpu_count() or 1) // accelerator.num_processes
        if accelerator.device.type == "cpu" and torch.get_num_threads() < cores:
            self.say(
                f"Each process uses {torch.get_num_threads()} of its {cores} cores; "
                f"`accelerate launch --num_cpu_threads_per_process {cores}` uses all."
            )
        if self.fresh:
            self.say(f"{recipe.initial_model} has other labels: the head begins with random weights.")
        self.prepare_cache()  # first: if it cannot be written, there is no half a run
        main_process_alone(accelerator, lambda: self.folder.start(recipe))
        accelerator.init_trackers("hf_visual_perceiver", config={"recipe": self.recipe_name, "seed": recipe.seed})
        if recipe.compile:
            compile_blocks(self.network)
        self.network.packs_passes = {"packed": True, "split": False}.get(recipe.trunk)
        if accelerator.state.deepspeed_plugin is not None:  # it reads this from a data loader, which we do not use
            batch = recipe.micro_batch_size or recipe.batch_size // accelerator.num_processes
            accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = batch
        if self.network.skips_parameters:
            accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.model, self.optimizer = accelerator.prepare(self.objective, self.optimizer)
        self.average = ModelEmaV3(self.network, decay=recipe.ema_decay) if recipe.ema_decay else None
        if self.resume:
            self.restore()
            if accelerator.is_main_process:
                self.folder.truncate_log(self.done)
            self.say(f"Resuming after step {self.done}.")
        self.batches = self.source.batches(self.done, self.size, self.preprocessing["interpolation"])

    def restore(self) -> None:
        """Restore the newest complete checkpoint, if there is one."""
        restored = self.folder.restore()
        if restored is None:
            return
        self.done, state, facts = restored
        if self.apart:
            self.accelerator.load_state(str(self.folder.apart(self.done)))
        else:
            apply_state(state, facts, self.model, self.optimizer, self.average and self.average.module)
        self.source.load_state_dict(facts["data"])
        self.earlier = facts.get("earlier_training")
        if self.accelerator.scaler is not None and facts["scaler"]:
            self.accelerator.scaler.load_state_dict(facts["scaler"])

    def save(self) -> None:
        """Write a checkpoint."""
        # A checkpoint that cannot be resumed must not replace one that can.
        if not all_finite(self.accelerator, self.network):
            self.fail("Expected finite weights, got others")
        state: dict[str, torch.Tensor] = {}
        facts: dict[str, Any] = {}
        if self.apart:
            self.accelerator.save_state(str(self.folder.apart(self.done)))
        else:
            state, facts = gather_state(self.model, self.optimizer, self.average and self.average.module)
        facts["earlier_training"] = self.earlier  # the initial model's folder may be missing where the run resumes
        facts["data"] = gather_object([self.batches.state_dict(self.done)])
        facts["scaler"] = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        keep = self.recipe.keep_checkpoints
        main_process_alone(self.accelerator, lambda: self.folder.save(state, facts, self.done, keep))

    def loop(self, stop: StopRequest) -> None:
        """Train until the recipe's last step, or until `stop` asks to stop; a checkpoint is saved in both cases."""
        recipe, accelerator = self.recipe, self.accelerator
        progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not accelerator.is_main_process,
        )
        positions = share_of_batch(recipe.batch_size, accelerator.process_index, accelerator.num_processes)
        with progress, stop:
            task = progress.add_task("training", total=recipe.steps, completed=self.done, status="")
            self.model.train()
            clock = Stopwatch()
            for batch in self.batches:
                step, stopping, taught = self.done, False, None
                if self.cache is not None:
                    assert batch.indices is not None, "the recipe has seen to it"
                    assert batch.epoch is not None, "likewise"
                    pixel_values, targets, taught = self.cache.batch(*batch)
                else:
                    pixel_values, targets = self.augment(
                        batch.images, batch.labels, step, positions, recipe.batch_size, batch.indices, batch.epoch
                    )
                passes = self.schedule(step)
                losses = self.update(step, pixel_values, targets, passes, taught)
                clock.count(recipe.batch_size)
                if self.done % recipe.log_every == 0 or self.done == recipe.steps:
                    # Only here does the host wait for the device, and do the processes agree on whether to stop.
                    report = accelerator.reduce(torch.cat([losses, stop.as_tensor(losses.device)]), "mean")
                    labelled, students, asked = report.tolist()
                    stopping = asked > 0
                    progress.update(task, status=self.log(labelled, students, passes, clock))
                    clock.restart()
                progress.update(task, completed=self.done)
                stopping = stopping or (accelerator.num_processes == 1 and stop.requested())
                if self.done % recipe.save_every == 0 or self.done == recipe.steps or stopping:
                    self.save()
                if stopping:
                    break
                if recipe.evaluate_every and self.done % recipe.evaluate_every == 0 and self.done != recipe.steps:
                    self.evaluate()
                    self.model.train()
                    clock.restart()

    def update(
        self,
        step: int,
        pixel_values: torch.Tensor,
        targets: torch.Tensor,
        passes: list[Pass],
        taught: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Do one step and return the (2,) losses of `Objective`; `taught` are a teacher's cached logits, if any."""
        recipe, accelerator = self.recipe, self.accelerator
        self.scheduler.step_update(step)
        # torch draws the dropped paths (stochastic depth), which differ between the processes.
        seed_everything(recipe.seed, step, accelerator.process_index)
        torch.manual_seed(torch.initial_seed())
        losses = forward_backward(
            accelerator,
            self.model,
            pixel_values,
            targets,
            passes,
            self.schedule,
            recipe,
            self.teacher,
            self.average,
            taught,
        )
        if recipe.clip_gradient_norm is not None:
            accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done = step + 1
        if self.average is not None:
            self.average.update(self.network, step=self.done)
        return losses

    def log(self, labelled: float, students: float, passes: list[Pass], clock: Stopwatch) -> str:
        """Log the losses of the last finished step; returns the text to show beside the progress bar."""
        entry: dict[str, Any] = {"loss": labelled + self.recipe.students.weight * students}
        if self.schedule.distils:
            entry |= {"full_loss": labelled, "student_loss": students}
        if not math.isfinite(entry["loss"]):
            self.fail(f"Expected a finite loss, got {entry['loss']}")
        entry |= {"K": describe(passes, knobs_of(self.network)), "learning_rate": self.optimizer.param_groups[0]["lr"]}
        entry |= {"images_per_second": round(clock.rate(), 1), "seconds": round(clock.seconds, 3)}
        scalars = {key: value for key, value in entry.items() if isinstance(value, (int, float))}
        self.accelerator.log(scalars, step=self.done)
        status = f"loss {entry['loss']:.3f}  {entry['K']}  {clock.rate():,.0f} images/s"
        if self.accelerator.is_main_process:
            self.folder.log({"step": self.done, **entry})
        if not console.is_terminal and clock.minute_passed():
            self.say(f"step {self.done}/{self.recipe.steps}  {status}")
        return status

    def published(self) -> Network:
        """The network that is evaluated and published: the averaged one, if there is one."""
        if self.average is not None:
            return self.average.module
        if self.sharded:
            return gathered(self.model, create_model(self.recipe, self.source.label_names))
        return self.network

    def evaluate(self) -> None:
        """Measure and log the accuracy on the validation images."""
        steps = self.recipe.evaluate_budgets or [len(self.ladder)]
        accuracies = validation_accuracy(
            self.published(),
            self.source.validation,
            {K: self.ladder[K - 1] for K in steps},
            self.accelerator,
            self.recipe.batch_size,
        )
        names = step_names(self.ladder, knobs_of(self.network))
        scalars = {f"validation_accuracy/{names[K]}": accuracy for K, accuracy in accuracies.items()}
        self.accelerator.log(scalars, step=self.done)
        if self.accelerator.is_main_process:
            for K, accuracy in accuracies.items():
                entry = {"step": self.done, "validation_accuracy": accuracy, "K": K, "budget": names[K]}
                self.folder.log(entry)
        line = ", ".join(f"{100 * accuracy:.2f} with {in_words(names[K])}" for K, accuracy in accuracies.items())
        self.say(f"step {self.done}: validation accuracy (%) {line}")

    def finish(self, reason: str) -> bool:
        """Draw the curves, and write the model if the run is finished, else report that it stopped for `reason`.

        Returns:
            Whether the run is finished.
        """
        finished = self.done == self.recipe.steps
        if finished:
            self.evaluate()
        final = self.published() if finished else self.network
        curves = self.folder.path / "curves.png"
        if self.accelerator.is_main_process:
            plot_curves(self.folder.entries(), curves)
            if finished:
                self.write_model(final)
        if finished:
            self.say(f"The trained model is in {self.folder.model}, the curves in {curves}.")
        else:
            self.say(
                f"Stopped after step {self.done} of {self.recipe.steps} ({reason}); --resume goes on. Curves: {curves}"
            )
        # What is left of earlier passes refers to the process group and keeps its threads alive. One that still has a
        # tensor to drop when Python exits aborts the process (pytorch/pytorch#190489).
        self.accelerator.free_memory()
        self.accelerator.end_training()
        return finished

    def write_model(self, model: Network) -> None:
        """Write the trained model and facts about its training to the run's `model` folder."""
        recipe, images = self.recipe, None if self.source.training is None else len(self.source.training)
        # With the dataset's public name: its path on this machine is of no use to others.
        values = {**recipe.to_dict(), "dataset": recipe.dataset_name or recipe.dataset}
        facts = {
            "recipe_name": self.recipe_name,
            "recipe": values,
            "training_images": images,
            "epochs": None if images is None else recipe.steps * recipe.batch_size / images,
            "processes": self.accelerator.num_processes,
            "training_hours": self.folder.hours(),
            "macs_per_image": mean_macs(model, self.schedule, recipe.steps),
            "validation_accuracy": {
                entry["K"]: entry["validation_accuracy"]
                for entry in self.folder.entries()
                if entry["step"] == recipe.steps and "validation_accuracy" in entry
            },
            "conditions": measurement_conditions(self.accelerator.device),
        }
        if self.earlier is not None:
            facts["earlier_training"] = self.earlier
        files = {
            "training.json": json.dumps(facts, indent=2) + "\n",
            "recipe.yaml": yaml.safe_dump(values, sort_keys=False),
        }
        save_folder(model, self.folder.model, files)

    def fail(self, problem: str) -> None:
        """Write a report about a failure in the last finished step, and raise.

        Raises:
            FloatingPointError: Always; the message names the problem, the step and the complete checkpoints.
        """
        step = self.done - 1
        report = {
            "step": step,
            "K": describe(self.schedule(step), knobs_of(self.network)),
            "problem": problem,
            "complete_checkpoints": self.folder.saved_steps(),
        }
        # If FSDP has sharded the weights, no process has all of them.
        split = any(isinstance(parameter, DTensor) for parameter in self.network.parameters())
        weights = None if split else self.network.state_dict()
        main_process_alone(self.accelerator, lambda: self.folder.write_failure(report, weights))
        raise FloatingPointError(
            f"{problem} at step {step} with {report['K']}; complete checkpoints: "
            f"{report['complete_checkpoints'] or 'none'}. Details: {self.folder.failure_file}"
        )


@torch.no_grad()
def validation_accuracy(
    model: Network,
    data: ImageDataset,
    budgets: dict[int, Budget],
    accelerator: Accelerator,
    batch_size: int,
) -> dict[int, float]:
    """Accuracy at each K of `budgets`; each process takes its share of the images. Empty if there are no images."""
    if len(data) == 0:
        return {}
    model.eval()
    size, cfg = input_facts(model)
    passes = [Pass(budget) for budget in budgets.values()]
    correct = torch.zeros(len(budgets), device=accelerator.device)
    for first in range(accelerator.process_index * batch_size, len(data), accelerator.num_processes * batch_size):
        indices = range(first, min(first + batch_size, len(data)))
        pixels = pixels_of_size(data, indices, size, cfg["interpolation"])
        images = normalise(pixels, cfg["mean"], cfg["std"]).to(accelerator.device)
        with accelerator.autocast():
            all_logits = torch.stack(model.forward_budgets(images, passes))
        labels = torch.from_numpy(data.labels[indices.start : indices.stop]).to(accelerator.device)
        correct += (all_logits.argmax(-1) == labels).sum(-1)
    accuracies = (accelerator.reduce(correct, "sum") / len(data)).tolist()
    return dict(zip(budgets, accuracies, strict=True))
