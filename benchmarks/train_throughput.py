"""Training throughput of our steps, beside a network of the same size in a plain timm loop.

    python benchmarks/train_throughput.py --dataset PATH_OR_ID

Every round trains each contender for some steps in turn. Medians over the rounds are printed: images/s, MACs of the timed steps
per time relative to the plain loop ("work"), the share of the device's matmul peak measured in the same run, and the shares of a
step's parts. With `compile=true` our blocks are compiled; the plain loop is not.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from accelerate import Accelerator
from inference import timm_vit, vit_macs
from PIL import Image, ImageOps
from rich import box
from rich.console import Console
from rich.table import Table
from timm.data import Mixup, auto_augment, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

from hf_visual_perceiver.data.images import BatchOrder, ImageDataset, load_images
from hf_visual_perceiver.training.augmentation import BatchAugmentation
from hf_visual_perceiver.training.batches import ResidentBatches
from hf_visual_perceiver.training.factory import compile_blocks, create_model, create_optimizer
from hf_visual_perceiver.training.objective import Objective
from hf_visual_perceiver.training.recipe import Recipe, load_recipe
from hf_visual_perceiver.training.schedules import create_schedule, step_macs
from hf_visual_perceiver.training.step import forward_backward
from hf_visual_perceiver.utils.conditions import measurement_conditions
from hf_visual_perceiver.utils.console import run_command


MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
QUERIES = {
    "sandwich": {"schedule": "sandwich", "students": 2},
    "uniform": {"schedule": "uniform"},
    "K = 64": {"schedule": "fixed", "K": 64},
}
console = Console(width=150)


@dataclass
class Contender:
    """One way to train, one step at a time; the `parts` of a step are timed separately."""

    name: str
    macs_of: Callable[[int], float]  # a step's, of one image's forward
    parts: dict[str, Callable[[int], None]]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    macs: list[float] = field(default_factory=list)

    def run(self, steps: range, synchronise: Callable[[], None]) -> None:
        """Train, and record the mean seconds of each part of a step and the mean MACs of these steps."""
        spent = dict.fromkeys(self.parts, 0.0)
        for step in steps:
            for name, part in self.parts.items():
                began = time.perf_counter()
                part(step)
                synchronise()
                spent[name] += time.perf_counter() - began
        for name, seconds in spent.items():
            self.seconds.setdefault(name, []).append(seconds / len(steps))
        self.macs.append(statistics.mean(map(self.macs_of, steps)))

    def forget(self) -> None:
        """Discard the warm-up rounds."""
        self.seconds.clear()
        self.macs.clear()

    def totals(self) -> list[float]:
        """Seconds per step, for each round."""
        return [sum(round_) for round_ in zip(*self.seconds.values(), strict=True)]


def ours(name: str, recipe: Recipe, data: ImageDataset, accelerator: Accelerator) -> Contender:
    """The steps of `train`, split into parts."""
    device = accelerator.device
    network = create_model(recipe, data.label_names).to(device).train()
    schedule = create_schedule(recipe.budgets, network.config.ladder(), recipe.seed)
    if recipe.compile:
        compile_blocks(network)
    network.packs_passes = {"packed": True, "split": False}.get(recipe.trunk)
    model, optimizer = accelerator.prepare(Objective(network, recipe.students), create_optimizer(network, recipe))
    average = ModelEmaV3(network, decay=0.999)
    batches = iter(
        ResidentBatches(data, BatchOrder(len(data), recipe.batch_size, recipe.seed, last_step=10**6), device)
    )
    augment = BatchAugmentation(recipe.augmentation, len(data.label_names), MEAN, STD, recipe.seed)
    positions, batch = np.arange(recipe.batch_size), {}

    def augmentation(step: int) -> None:
        images, labels, *_ = next(batches)
        batch["x"], batch["y"] = augment(images, labels, step, positions, recipe.batch_size)

    def network_part(step: int) -> None:
        forward_backward(accelerator, model, batch["x"], batch["y"], schedule(step), schedule, recipe)

    def update(step: int) -> None:
        optimizer.step()
        optimizer.zero_grad()
        average.update(network, step=step)

    macs_of = partial(step_macs, network.config, schedule)
    return Contender(name, macs_of, {"data": augmentation, "network": network_part, "update": update})


def _posterize(image: Image.Image, bits: int, **kwargs: object) -> Image.Image:
    """timm's posterize, limited to at least 1 bit: at its strongest it uses 0 bits, an error since Pillow 13."""
    return ImageOps.posterize(image, min(max(bits, 1), 8))


auto_augment.NAME_TO_OP["PosterizeIncreasing"] = _posterize


class _Pictures(torch.utils.data.Dataset):
    """A dataset of PIL images, like timm's."""

    def __init__(self, data: ImageDataset):
        self.data, self.transform = data, None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple:
        return self.transform(Image.fromarray(self.data.images[index])), int(self.data.labels[index])


def plain_timm(recipe: Recipe, data: ImageDataset, accelerator: Accelerator, workers: int) -> Contender:
    """timm's ViT of the same width, depth and number of tokens, with timm's loader, augmentation, mixing and averaging."""
    device, config, a = accelerator.device, recipe.model_config(num_labels=len(data.label_names)), recipe.augmentation
    model = timm_vit(config, config.drop_path_rate).to(device)
    optimizer = create_optimizer_v2(
        model, opt=recipe.optimizer, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    average = ModelEmaV3(model, decay=0.999)
    loader = create_loader(
        _Pictures(data),
        input_size=(3, 32, 32),
        batch_size=recipe.batch_size,
        is_training=True,
        re_prob=a.random_erasing,
        auto_augment=a.auto_augment,
        hflip=a.horizontal_flip,
        mean=MEAN,
        std=STD,
        num_workers=workers,
        device=device,
        persistent_workers=workers > 0,
    )
    mixup = Mixup(a.mixup, a.cutmix, label_smoothing=a.label_smoothing, num_classes=len(data.label_names))
    mixes = bool(a.mixup or a.cutmix)
    criterion = SoftTargetCrossEntropy() if mixes else torch.nn.CrossEntropyLoss(label_smoothing=a.label_smoothing)
    batch: dict = {}

    def forever():
        while True:
            yield from loader

    batches = forever()

    def load(step: int) -> None:
        batch["x"], batch["y"] = next(batches)
        if mixes:
            batch["x"], batch["y"] = mixup(batch["x"], batch["y"])

    def network_part(step: int) -> None:
        with accelerator.autocast():
            loss = criterion(model(batch["x"]), batch["y"])
        loss.backward()

    def update(step: int) -> None:
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step=step)

    macs, parts = vit_macs(config), {"data": load, "network": network_part, "update": update}
    return Contender("timm's ViT, plain loop", lambda step: macs, parts)


def matmul_peak(device: torch.device, dtype: torch.dtype, synchronise: Callable[[], None]) -> float:
    """The highest multiply-accumulates/s of a square matrix product."""
    best = 0.0
    for size in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(10):
            began = time.perf_counter()
            a @ b
            synchronise()
            best = max(best, size**3 / (time.perf_counter() - began))
    return best


def main(
    dataset: Annotated[str, typer.Option(help="CIFAR-10: Hub id or folder of parquet files.")] = "uoft-cs/cifar10",
    recipe: Annotated[Path, typer.Option()] = Path("training/recipes/cifar10_sandwich.yaml"),
    rounds: Annotated[int, typer.Option(help="Rounds, after those to warm up.")] = 5,
    warmups: Annotated[int, typer.Option(help="Rounds to warm up; compiling takes several.")] = 1,
    steps: Annotated[int, typer.Option(help="Steps of each contender in a round.")] = 2,
    workers: Annotated[int, typer.Option(help="Loader processes of the plain loop.")] = 2,
    overrides: Annotated[list[str] | None, typer.Argument(help="Keys of the recipe.")] = None,
) -> None:
    """Measure and print."""
    given = [f"dataset={dataset}", *(overrides or [])]
    recipes = {name: load_recipe(recipe, [f"budgets={queries}", *given]) for name, queries in QUERIES.items()}
    base = recipes["sandwich"]
    accelerator = Accelerator(mixed_precision=base.mixed_precision)
    cuda = accelerator.device.type == "cuda"
    synchronise = torch.cuda.synchronize if cuda else (lambda: None)
    data = load_images(dataset, base.split)
    contenders = [plain_timm(base, data, accelerator, workers)]
    contenders += [ours(name, each, data, accelerator) for name, each in recipes.items()]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(base.mixed_precision, torch.float32)
    peaks = []
    for number in range(warmups + rounds):
        if number == warmups:
            for contender in contenders:
                contender.forget()
        peaks.append(matmul_peak(accelerator.device, dtype, synchronise))
        for contender in contenders:
            contender.run(range(number * steps, (number + 1) * steps), synchronise)
    peak = statistics.median(peaks[warmups:])

    plain = contenders[0]
    table = Table(box=box.SIMPLE_HEAD, title=f"batch {base.batch_size}, {base.mixed_precision}", title_justify="left")
    for header in (
        "training",
        "MACs (M)",
        "images/s",
        "relative",
        "work, relative",
        "of matmul peak",
        "data",
        "network",
        "update",
    ):
        table.add_column(header, justify="left" if header == "training" else "right", no_wrap=True)
    for contender in contenders:
        totals, others = contender.totals(), plain.totals()
        speed = [b / a for a, b in zip(totals, others, strict=True)]
        work = [s * m / n for s, m, n in zip(speed, contender.macs, plain.macs, strict=True)]
        achieved = [3 * m * base.batch_size / a for m, a in zip(contender.macs, totals, strict=True)]
        shares = [statistics.median(seconds) / statistics.median(totals) for seconds in contender.seconds.values()]
        table.add_row(
            contender.name,
            f"{statistics.mean(contender.macs) / 1e6:.1f}",
            f"{base.batch_size / statistics.median(totals):,.0f}",
            f"{statistics.median(speed):.2f}",
            f"{statistics.median(work):.2f}",
            f"{statistics.median(achieved) / peak:.1%}",
            *(f"{share:.1%}" for share in shares),
        )
    console.print(table)
    console.print(f"matmul peak {2 * peak / 1e12:.3f} TFLOP/s ({dtype}); a step counts three times its forward's MACs")
    facts = measurement_conditions(accelerator.device, recipe=recipe.name, overrides=" ".join(overrides or []) or None)
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()), highlight=False)


if __name__ == "__main__":
    run_command(main)
