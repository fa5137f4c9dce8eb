"""Accuracy at every K after training by different query schedules, at the same training MACs and seeds.

    python benchmarks/query_schedules.py --dataset PATH_OR_ID

trains a small network with each schedule and seed (existing runs are resumed or reused), and prints the accuracy on the
validation images side by side.
"""

from pathlib import Path
from typing import Annotated

import typer
import yaml

from hf_visual_perceiver.evaluation.comparison import compare_runs
from hf_visual_perceiver.modeling import count_macs
from hf_visual_perceiver.training.recipe import Recipe, load_recipe
from hf_visual_perceiver.training.schedules import create_schedule, step_macs
from hf_visual_perceiver.training.train import train
from hf_visual_perceiver.utils.conditions import measurement_conditions
from hf_visual_perceiver.utils.console import run_command


SCHEDULES = {
    "uniform": {"schedule": "uniform"},
    "stratified": {"schedule": "stratified", "groups": 4},
    "sandwich": {"schedule": "sandwich", "students": 2},
}
# A network that two CPU cores train a dozen times in an hour or two.
SMALL = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2}
BUDGETS = [1, 2, 4, 8, 16, 32, 48, 64]


def main(
    dataset: Annotated[str, typer.Option(help="CIFAR-10: Hub id or folder of parquet files.")] = "uoft-cs/cifar10",
    recipe: Annotated[Path, typer.Option(help="Recipe of all runs.")] = Path("training/recipes/cifar10_nano_cpu.yaml"),
    output: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/query_schedules"),
    schedule: Annotated[
        list[str] | None, typer.Option(help="Schedule to run; repeat for several; by default all.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds per schedule, from 0.")] = 2,
    epochs: Annotated[float, typer.Option(help="Training MACs, in epochs with all queries.")] = 6.0,
    small: Annotated[bool, typer.Option(help="Use a small network instead of the recipe's.")] = True,
    overrides: Annotated[list[str] | None, typer.Argument(help="Keys of the recipe, for all runs.")] = None,
) -> None:
    """Train with each schedule at equal cost, and compare."""
    names = schedule or list(SCHEDULES)
    folders = []
    # Seeds outside: an ablation that is cut short has every schedule once.
    for seed in range(seeds):
        for name in names:
            common = [f"dataset={dataset}", f"evaluate_budgets={BUDGETS}", "evaluate_every=null", "log_every=50"]
            common += [f"config={yaml.safe_dump({**SMALL, 'initializer_range': 0.1}, default_flow_style=True)}"] * small
            common += [f"budgets={yaml.safe_dump(SCHEDULES[name], default_flow_style=True)}", f"seed={seed}"]
            base = load_recipe(recipe, [*common, *(overrides or [])])
            steps = affordable_steps(base, epochs)
            lengths = [f"steps={steps}", f"warmup_steps={steps // 20}", f"save_every={max(steps // 10, 1)}"]
            folder = output / f"{name}-seed{seed}"
            chosen = load_recipe(recipe, [*common, *lengths, *(overrides or [])])
            if train(chosen, folder, resume=folder.exists()) is None:
                raise SystemExit(f"Stopped in {folder}; run the same command to continue.")
            folders.append(folder)
    print(compare_runs(folders).to_markdown())
    print(measurement_conditions())


def affordable_steps(recipe: Recipe, epochs: float) -> int:
    """Number of steps that cost as many MACs as `epochs` of 45,000 images with all queries."""
    config = recipe.model_config(num_labels=10)
    schedule = create_schedule(recipe.budgets, config.ladder(), seed=0)  # the same number for every seed of the run
    cost = sum(step_macs(config, schedule, step) for step in range(2000)) / 2000
    return round(epochs * 45_000 * count_macs(config) / (cost * recipe.batch_size))


if __name__ == "__main__":
    run_command(main)
