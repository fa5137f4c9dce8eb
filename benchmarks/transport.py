"""What the small form of a run's state costs: the same run continued from the whole state and from the rounded one.

    python benchmarks/transport.py --dataset PATH_OR_ID

trains a recipe to its end with a checkpoint half-way, writes that checkpoint in the form for transport, continues it to the
end as well, and prints sizes, losses and validation accuracies of the two.
"""

import shutil
import statistics
from pathlib import Path
from typing import Annotated

import typer

from hf_visual_perceiver.training.checkpointing import RunFolder
from hf_visual_perceiver.training.conditions import measurement_conditions
from hf_visual_perceiver.training.console import run_command
from hf_visual_perceiver.training.recipe import load_recipe
from hf_visual_perceiver.training.train import train
from hf_visual_perceiver.training.transport import write_transport


def main(
    dataset: Annotated[str, typer.Option(help="CIFAR-10: Hub id or folder of parquet files.")] = "uoft-cs/cifar10",
    recipe: Annotated[Path, typer.Option()] = Path("training/recipes/cifar10_nano_stratified.yaml"),
    output: Annotated[Path, typer.Option(help="A new folder for the runs.")] = Path("runs/transport"),
    steps: Annotated[int, typer.Option(min=100, help="Of the whole run.")] = 300,
    overrides: Annotated[list[str] | None, typer.Argument(help="Keys of the recipe.")] = None,
) -> None:
    """Measure and print."""
    half = steps // 2
    lengths = [
        f"steps={steps}",
        f"save_every={half}",
        f"warmup_steps={steps // 10}",
        "log_every=1",
        "evaluate_every=null",
    ]
    chosen = load_recipe(recipe, [f"dataset={dataset}", *lengths, "keep_checkpoints=2", *(overrides or [])])
    train(chosen, output / "whole")
    # As if it had been carried away half-way.
    shutil.copytree(output / "whole", output / "stopped")
    shutil.rmtree(output / "stopped" / "model")
    shutil.rmtree(output / "stopped" / "checkpoints" / f"step_{steps}")
    files = write_transport(output / "stopped", output / "carried")
    shards = [path for path in files if path.suffix == ".safetensors"]
    train(chosen, output / "carried", resume=True)

    before = sum(path.stat().st_size for path in (output / "stopped" / "checkpoints" / f"step_{half}").iterdir())
    print(f"state: {before / 1e6:.1f} MB, for transport {sum(path.stat().st_size for path in shards) / 1e6:.1f} MB")
    one, other = (RunFolder(output / name).entries() for name in ("whole", "carried"))
    losses = [{e["step"]: e["loss"] for e in entries if "loss" in e} for entries in (one, other)]
    for name, window in (
        ("first 10 steps after", range(half + 1, half + 11)),
        ("last 50 steps", range(steps - 49, steps + 1)),
    ):
        a, b = (statistics.fmean(series[step] for step in window) for series in losses)
        print(f"mean loss, {name}: {a:.4f} whole, {b:.4f} rounded ({b - a:+.4f})")
    for a, b in zip(*([e for e in entries if "validation_accuracy" in e] for entries in (one, other)), strict=True):
        print(
            f"validation accuracy (%) at K = {a['K']}: {100 * a['validation_accuracy']:.2f} whole, {100 * b['validation_accuracy']:.2f} rounded"
        )
    facts = measurement_conditions(recipe=recipe.name, overrides=" ".join(overrides or []) or None)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))


if __name__ == "__main__":
    run_command(main)
