"""What training on ImageNet-1k would take on many GPUs: arithmetic from named assumptions; nothing here is measured.

python -m hf_visual_perceiver.training.scaling
"""

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Annotated

import torch
import typer

from hf_visual_perceiver.modeling import VisualPerceiverConfig, VisualPerceiverForImageClassification, count_macs
from hf_visual_perceiver.modeling.macs import count_trunk_macs
from hf_visual_perceiver.training.console import run_command


IMAGES = 1_281_167  # training images of ImageNet-1k
BASE_BATCH, BASE_LEARNING_RATE = 512, 5e-4  # DeiT's; its rate grows linearly with the batch
PLANS = [
    (name, gpus)
    for name in ("visual_perceiver_tiny_patch16_224", "visual_perceiver_small_patch16_224")
    for gpus in (8, 64, 512)
]


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the arithmetic takes for granted."""

    peak_tflops: float = 989.0  # of one GPU; NVIDIA's figure for an H100 SXM, dense bf16
    utilisation: float = 0.05  # of that peak; the arithmetic of so narrow networks waits for memory
    dollars_per_gpu_hour: float = 2.5
    gpus_per_node: int = 8
    images_per_gpu: int = 128  # of a step, as long as the global batch stays below the next number
    largest_batch: int = 8192  # images of a step beyond which more of them save no steps
    epochs: int = 300
    students: int = 2
    kilobytes_per_image: float = 110.0  # a JPEG of ImageNet
    decodes_per_core: float = 150.0  # images that one core decodes and crops in a second

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"Expected `{field.name}` to be above 0, got {getattr(self, field.name)!r}.")
        if self.utilisation > 1:
            raise ValueError(f"Expected `utilisation` to be at most 1, got {self.utilisation!r}.")


@dataclass(frozen=True)
class Plan:
    """One network on a number of GPUs. The step's time is that of its arithmetic alone, as if all else were hidden."""

    architecture: str
    gpus: int
    assumptions: Assumptions

    @cached_property
    def config(self) -> VisualPerceiverConfig:
        return VisualPerceiverConfig.from_architecture(self.architecture, num_labels=1000)

    @cached_property
    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in VisualPerceiverForImageClassification(self.config).parameters())

    @cached_property
    def macs_per_image(self) -> float:
        """Forward multiply-accumulates of a sandwich step: all Q queries, and the trunk again for each student."""
        return count_macs(self.config) + self.assumptions.students * student_macs(self.config)

    @property
    def batch_size(self) -> int:
        return min(self.gpus * self.assumptions.images_per_gpu, self.assumptions.largest_batch)

    @property
    def steps(self) -> int:
        return self.assumptions.epochs * (IMAGES // self.batch_size)

    @property
    def step_seconds(self) -> float:
        # Forward and backward are three forwards, and a multiply-accumulate is two operations.
        operations = 3 * 2 * self.macs_per_image * self.batch_size / self.gpus
        return operations / (self.assumptions.peak_tflops * 1e12 * self.assumptions.utilisation)

    @property
    def learning_rates(self) -> tuple[float, float]:
        """By the linear and by the square-root rule."""
        ratio = self.batch_size / BASE_BATCH
        return BASE_LEARNING_RATE * ratio, BASE_LEARNING_RATE * math.sqrt(ratio)

    @property
    def bytes_sent(self) -> float:
        """By each GPU in a step, for a ring all-reduce of float32 gradients."""
        return 2 * (self.gpus - 1) / self.gpus * 4 * self.parameters

    @property
    def bandwidth(self) -> float:
        """Bytes per second, to send the gradients within the backward, which is two thirds of the step."""
        return self.bytes_sent / (self.step_seconds * 2 / 3)

    @property
    def images_per_second(self) -> float:
        """Of one node."""
        return self.batch_size / self.step_seconds * min(self.assumptions.gpus_per_node, self.gpus) / self.gpus

    @property
    def hours(self) -> float:
        return self.steps * self.step_seconds / 3600

    def cells(self) -> dict[str, str]:
        """The table's column, by row."""
        linear, root = self.learning_rates
        a = self.assumptions
        decode_cores = self.images_per_second / a.decodes_per_core
        return {
            "parameters (M)": f"{self.parameters / 1e6:.2f}",
            "forward MACs at all queries (G)": f"{count_macs(self.config) / 1e9:.3f}",
            "one more student, mean (G)": f"{student_macs(self.config) / 1e9:.3f}",
            "sandwich step, per image (G)": f"{self.macs_per_image / 1e9:.3f}",
            "global batch": f"{self.batch_size:,}",
            "images per GPU": f"{self.batch_size / self.gpus:g}",
            "learning rate, linear": f"{linear:.2g}",
            "learning rate, square root": f"{root:.2g}",
            "steps": f"{self.steps:,}",
            "step (ms)": f"{1e3 * self.step_seconds:.1f}",
            "gradients sent per GPU and step (MB)": f"{self.bytes_sent / 1e6:.0f}",
            "bandwidth that hides them (GB/s)": f"{self.bandwidth / 1e9:.1f}",
            "images/s per node": f"{self.images_per_second:,.0f}",
            "storage per node (MB/s)": f"{self.images_per_second * a.kilobytes_per_image / 1e3:,.0f}",
            "decode cores per node": f"{math.ceil(decode_cores):,}",
            "checkpoint (MB)": f"{16 * self.parameters / 1e6:.0f}",
            "published model (MB)": f"{4 * self.parameters / 1e6:.0f}",
            "hours": f"{self.hours:.2f}",
            "GPU hours": f"{self.hours * self.gpus:,.0f}",
            "dollars": f"{self.hours * self.gpus * a.dollars_per_gpu_hour:,.0f}",
        }


def student_macs(config: VisualPerceiverConfig) -> float:
    """Mean multiply-accumulates of a student: K from [1, Q - 1] with p(K) ~ 1 / K, as in the schedule `sandwich`."""
    budgets = range(1, config.num_queries)
    weights = [1 / K for K in budgets]
    macs = [count_trunk_macs(config, K) for K in budgets]
    return sum(w * m for w, m in zip(weights, macs, strict=True)) / sum(weights)


def scaling_table(assumptions: Assumptions) -> str:
    """The plans side by side, in markdown, with what they assume."""
    a = assumptions
    columns = [Plan(name, gpus, a).cells() for name, gpus in PLANS]
    headers = [f"{name.split('_')[2]}, {gpus} GPUs" for name, gpus in PLANS]
    lines = ["| " + " | ".join(["", *headers]).strip() + " |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {row} | " + " | ".join(column[row] for column in columns) + " |" for row in columns[0]]
    return "\n".join(
        [
            f"Assumed, not measured: {a.peak_tflops:g} TFLOP/s of peak per GPU, {100 * a.utilisation:g} % of it used, "
            f"${a.dollars_per_gpu_hour:g} per GPU hour, {a.gpus_per_node} GPUs per node, {a.images_per_gpu} images per GPU "
            f"while the global batch is at most {a.largest_batch:,}, {a.epochs} epochs of {IMAGES:,} images, "
            f"{a.students} students, {a.kilobytes_per_image:g} KB per JPEG, {a.decodes_per_core:g} images decoded per core "
            "and second.",
            "",
            *lines,
        ]
    )


def command(
    peak_tflops: Annotated[
        float, typer.Option(help="Peak of one GPU in 10^12 operations per second.")
    ] = Assumptions.peak_tflops,
    utilisation: Annotated[
        float, typer.Option(help="Part of the peak that is used, in (0, 1].")
    ] = Assumptions.utilisation,
    dollars_per_gpu_hour: Annotated[float, typer.Option(help="Price.")] = Assumptions.dollars_per_gpu_hour,
    images_per_gpu: Annotated[int, typer.Option(help="Images of a step, for each GPU.")] = Assumptions.images_per_gpu,
    largest_batch: Annotated[
        int, typer.Option(help="Images of a step beyond which more save no steps.")
    ] = Assumptions.largest_batch,
    decodes_per_core: Annotated[
        float, typer.Option(help="Images that one core decodes and crops in a second.")
    ] = Assumptions.decodes_per_core,
) -> None:
    """Print the plan for ImageNet-1k on 8, 64 and 512 GPUs."""
    try:
        assumptions = Assumptions(
            peak_tflops=peak_tflops,
            utilisation=utilisation,
            dollars_per_gpu_hour=dollars_per_gpu_hour,
            images_per_gpu=images_per_gpu,
            largest_batch=largest_batch,
            decodes_per_core=decodes_per_core,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    print(scaling_table(assumptions))


if __name__ == "__main__":
    run_command(command)
