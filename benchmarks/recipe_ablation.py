"""Ablation of cifar10_micro_levels.yaml: one run for each change, at equal training FLOP.

    python benchmarks/recipe_ablation.py --dataset PATH_OR_ID --max-minutes 120

trains the missing runs in the order of the list below, stops after the given time, and prints the accuracy on the validation
images side by side. The same command continues. The teacher has to be trained before:

    accelerate launch training/train.py --config training/recipes/cifar10_wide_teacher.yaml
"""

import time
from pathlib import Path
from typing import Annotated

import typer

from hf_visual_perceiver.evaluation.comparison import read_run
from hf_visual_perceiver.training.factory import block_ends, create_model, ladder_of, mean_macs
from hf_visual_perceiver.training.recipe import Recipe, load_recipe
from hf_visual_perceiver.training.schedules import create_schedule
from hf_visual_perceiver.training.train import train
from hf_visual_perceiver.utils.conditions import measurement_conditions


STRATIFIED = "budgets={schedule: stratified, groups: 2}"
FULL = ["config.trunk_attention=full", "config.block_drop_rate=0", "config.decoder_reads=all"]
ONE_LEVEL = ["config.level_starts=null", "config.level_widths=null"]
PLAIN = [
    "architecture=timm/conv_stem_classifier_32",
    "budgets={schedule: fixed, K: 1}",
    "evaluate_budgets=[1]",
    "attention=null",
    "stem_loss=0",
]
POOLED = "the first level with pooling, no queries"
PRETRAINED = "the first level learns with pooling before, for a quarter of the FLOP"
# What differs from the recipe.
CHANGES: dict[str, list[str]] = {
    "the recipe": [],
    "AdamW, not Muon": ["optimizer=adamw", "learning_rate=2.0e-3", "weight_decay=0.05"],
    "no teacher": ["teacher=null"],
    "no classifiers of the stem": ["stem_loss=0"],
    "the output query reads all tokens": ["config.decoder_reads=all"],
    "earlier blocks are never hidden": ["config.block_drop_rate=0"],
    "full attention, stratified": [*FULL, STRATIFIED],
    "queries begin in a grid": ["config.query_init=spatial"],
    "small K first": ["budgets.small_first={start: 4, fraction: 0.5}"],
    "one level, as wide as all": [*ONE_LEVEL, "config.stem_widths=[[24, 68], [68, 272], [272, 272], [272]]"],
    "one level, as the first": ONE_LEVEL,
    "patches, no stem": [
        *ONE_LEVEL,
        "config.stem=patch",
        "config.stem_widths=null",
        "config.patch_size=4",
        "stem_loss=0",
    ],
    PRETRAINED: [],
    POOLED: [
        *PLAIN,
        "config={widths: [[24, 12], [12, 48], [48, 48], [48]], residual: true, act_layer: relu}",
    ],
    "a stem as wide as all levels with pooling, no queries": [
        *PLAIN,
        "config={widths: [[24, 68], [68, 272], [272, 272], [272]], residual: true, act_layer: relu}",
    ],
    "ResNet-20 (41 M), no queries": [*PLAIN, "architecture=timm/cifar_resnet20", "config={}"],
}


def main(
    dataset: Annotated[str, typer.Option(help="CIFAR-10: Hub id or folder of parquet files.")] = "uoft-cs/cifar10",
    recipe: Annotated[Path, typer.Option(help="Recipe to change.")] = Path(
        "training/recipes/cifar10_micro_levels.yaml"
    ),
    output: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/recipe_ablation"),
    pflop: Annotated[float, typer.Option(help="FLOP of each run, in 1e15; a step counts as three forwards.")] = 0.06,
    seeds: Annotated[int, typer.Option(help="Seeds of each change, from 0.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Change to run; repeat for several; by default all.")] = None,
    max_minutes: Annotated[float, typer.Option(help="Save and stop after this time.")] = 1e9,
    overrides: Annotated[list[str] | None, typer.Argument(help="Keys of the recipe, for all runs.")] = None,
) -> None:
    """Train with each change at equal cost, and compare."""
    if unknown := set(only or []) - set(CHANGES):
        raise SystemExit(f"Expected changes among {', '.join(CHANGES)}, got {', '.join(unknown)}.")
    end = time.monotonic() + 60 * max_minutes
    # Seeds outside: an ablation that is cut short has every change once.
    for seed in range(seeds):
        for name in only or CHANGES:
            # The moving average of so short a run still has the first weights in it.
            own = ["ema_decay=null", "evaluate_every=null", "log_every=50", f"seed={seed}"]
            common = [f"dataset={dataset}", *own, *(overrides or [])]
            folder, share, changes = run_folder(output, name, seed), 1.0, CHANGES[name]
            if name == PRETRAINED:
                stem, share = folder.with_name(f"{folder.name}-stem"), 0.75
                run(recipe, [*common, *CHANGES[POOLED]], stem, 0.25 * pflop, end)
                changes = [f"initial_stem={stem}/model"]
                if not (stem / "model").is_dir():
                    continue
            run(recipe, [*common, *changes], folder, share * pflop, end)
    print_table(output, pflop)


def run(recipe: Path, changes: list[str], folder: Path, pflop: float, end: float) -> None:
    """Train, or go on training, until the time `end` of the monotonic clock."""
    steps = affordable_steps(load_recipe(recipe, changes), pflop * 1e15)
    lengths = [f"steps={steps}", f"warmup_steps={steps // 20}", f"save_every={max(steps // 10, 1)}"]
    minutes = (end - time.monotonic()) / 60
    if minutes > 0:
        train(load_recipe(recipe, [*changes, *lengths]), folder, resume=folder.exists(), max_minutes=minutes)


def affordable_steps(recipe: Recipe, flop: float) -> int:
    """Number of steps of this recipe within a FLOP budget; a step counts as three forwards."""
    network = create_model(recipe, [f"class {i}" for i in range(10)])
    ladder, ends = ladder_of(network), block_ends(network)
    steps = 1000
    for _ in range(3):  # what a step costs may depend on how many there are
        schedule = create_schedule(recipe.budgets, ladder, 0, steps, ends)
        steps = max(2, round(flop / (6 * mean_macs(network, schedule, steps) * recipe.batch_size)))
    return steps


def run_folder(output: Path, name: str, seed: int) -> Path:
    """The folder of a run."""
    return output / f"{name.replace(',', '').replace(' ', '_')}-seed{seed}"


def print_table(output: Path, pflop: float) -> None:
    """Print the finished runs in markdown: validation accuracy (%), mean and half the range over seeds."""
    rows = []
    for name in CHANGES:
        folders = [run_folder(output, name, seed) for seed in range(10)]
        runs = [read_run(folder) for folder in folders if (folder / "model").is_dir()]
        if runs:
            rows.append((name, runs))
    budgets = sorted({K for _, runs in rows for run in runs for K in run.accuracy})
    print(f"| {pflop:g} PFLOP each | seeds | images (M) | {' | '.join(f'K = {K}' for K in budgets)} |")
    print(f"| --- | ---: | ---: |{' ---: |' * len(budgets)}")
    for name, runs in rows:
        cells = []
        for K in budgets:
            values = [100 * run.accuracy[K] for run in runs if K in run.accuracy]
            spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.2f}{spread}" if values else "")
        images = runs[0].step * runs[0].recipe["batch_size"] / 1e6
        print(f"| {name} | {len(runs)} | {images:.2f} | {' | '.join(cells)} |")
    print(measurement_conditions())


if __name__ == "__main__":
    typer.run(main)
