"""Compare training runs: accuracy at every budget, with mean and standard deviation over seeds."""

import itertools
import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from hf_visual_perceiver.evaluation.plots import save_figure
from hf_visual_perceiver.training.checkpointing import FREE_KEYS, RunFolder
from hf_visual_perceiver.training.curves import recipe_step_names
from hf_visual_perceiver.training.recipe import recipe_from_dict
from hf_visual_perceiver.utils.tables import markdown_table


LONGEST_NAME = 3  # maximum number of recipe keys in a name; beyond that, folder names are easier to read


@dataclass(frozen=True)
class Run:
    """The data that a comparison reads from a run's folder.

    Attributes:
        path: The folder.
        seed: Seed in the recipe.
        recipe: The recipe's keys that affect learning, without the seed, as dotted names such as `budgets.schedule`.
        step: The last evaluated step.
        accuracy: Validation accuracy at that step, by K, the step of the network's ladder of budgets.
        budgets: Name of the budget at each K.
        macs_per_image: Mean multiply-accumulates per image in training, if known.
    """

    path: Path
    seed: int
    recipe: dict[str, Any]
    step: int
    accuracy: dict[int, float]
    budgets: dict[int, str]
    macs_per_image: float | None


@dataclass(frozen=True)
class Row:
    """Runs that differ only in their seed.

    Attributes:
        name: Short name, unique in the comparison.
        runs: Names of the folders.
        seeds: The seed of each run.
        step: The last evaluated step.
        accuracy: Mean validation accuracy, by K.
        deviation: Sample standard deviation over seeds, by K; None with a single seed.
        budgets: Name of the budget at each K.
        macs_per_image: Mean over the runs for which it is known.
        recipe: The recipe's values for the keys in which the rows of the comparison differ.
    """

    name: str
    runs: list[str]
    seeds: list[int]
    step: int
    accuracy: dict[int, float]
    deviation: dict[int, float | None]
    budgets: dict[int, str]
    macs_per_image: float | None
    recipe: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """The result of `compare_runs`."""

    rows: list[Row]

    @property
    def budgets(self) -> list[str]:
        """Names of the budgets that were evaluated in any row, ascending in K."""
        steps = sorted((K, name) for row in self.rows for K, name in row.budgets.items())
        last = {name: K for K, name in steps}
        return sorted(last, key=lambda name: (last[name], name))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"rows": [asdict(row) for row in self.rows]}

    def table(self) -> list[list[str]]:
        """Cells of the table, headers first; accuracies are in percent."""
        with_macs = any(row.macs_per_image is not None for row in self.rows)
        headers = ["runs", "seeds", "step", *(["training MACs (M)"] if with_macs else [])]
        lines = [[*headers, *(name.replace("=", " = ") for name in self.budgets)]]
        for row in self.rows:
            macs = "" if row.macs_per_image is None else f"{row.macs_per_image / 1e6:.1f}"
            facts = [row.name, f"{len(row.seeds)}", f"{row.step}", *([macs] if with_macs else [])]
            cells = {name: _percent(row.accuracy[K], row.deviation[K]) for K, name in row.budgets.items()}
            lines.append([*facts, *(cells.get(name, "") for name in self.budgets)])
        return lines

    def to_markdown(self) -> str:
        """The table in markdown."""
        headers, *lines = self.table()
        return markdown_table(headers, lines)


def compare_runs(folders: Sequence[str | Path]) -> Comparison:
    """Compare the validation accuracies of runs at their last evaluated step.

    Runs whose recipes differ only in the seed, and in keys that do not change what is learned, make up a row. Rows are
    in the order of their first runs.

    Args:
        folders: The runs' folders.

    Raises:
        ValueError: If a folder is no run, its log is damaged or has no validation accuracies, or runs of a row cannot be
            averaged, because a seed occurs twice or the evaluated steps or K differ.
    """
    if not folders:
        raise ValueError("Expected at least one run to compare, got none.")
    groups: list[list[Run]] = []
    for run in map(read_run, folders):
        group = next((g for g in groups if g[0].recipe == run.recipe), None)
        if group is None:
            groups.append([run])
        else:
            _check_fits(run, group)
            group.append(run)
    differing = _differing_keys([group[0].recipe for group in groups])
    rows = []
    for group, name in zip(groups, _names(groups, differing), strict=True):
        accuracies = {K: [run.accuracy[K] for run in group] for K in sorted(group[0].accuracy)}
        macs = [run.macs_per_image for run in group if run.macs_per_image is not None]
        rows.append(
            Row(
                name=name,
                runs=[run.path.name for run in group],
                seeds=[run.seed for run in group],
                step=group[0].step,
                accuracy={K: statistics.fmean(values) for K, values in accuracies.items()},
                deviation={
                    K: statistics.stdev(values) if len(values) > 1 else None for K, values in accuracies.items()
                },
                budgets=group[0].budgets,
                macs_per_image=statistics.fmean(macs) if macs else None,
                recipe={key: group[0].recipe[key] for key in differing if key in group[0].recipe},
            )
        )
    return Comparison(rows)


def read_run(folder: str | Path) -> Run:
    """Read a run's recipe and log.

    Raises:
        ValueError: If the folder is no run, its log is damaged, or it has no validation accuracies.
    """
    # Resolved, because the path `.` has an empty name.
    run = RunFolder(Path(folder).resolve())
    if not run.recipe_file.is_file():
        raise ValueError(f"Expected the folder of a run, got {folder} without a recipe.yaml.")
    try:
        values = yaml.safe_load(run.recipe_file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"Expected {run.recipe_file} to be valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"Expected {run.recipe_file} to hold keys and values, got {type(values).__name__}.")
    recipe = recipe_from_dict(values, str(run.recipe_file)).to_dict()
    seed, dataset = recipe.pop("seed"), recipe["dataset_name"] or recipe["dataset"]
    learned = {key: value for key, value in recipe.items() if key not in FREE_KEYS}
    entries = _read_log(run.log_file)
    evaluated = [entry for entry in entries if "validation_accuracy" in entry]
    if not evaluated:
        raise ValueError(
            f"Expected validation accuracies in {run.log_file}, got none: the run has not been evaluated yet."
        )
    step = max(entry["step"] for entry in evaluated)
    accuracy = {entry["K"]: entry["validation_accuracy"] for entry in evaluated if entry["step"] == step}
    names = recipe_step_names(recipe)
    return Run(
        path=run.path,
        seed=seed,
        # The path of the data may differ between runs, but another name means other data.
        recipe=_flat({**learned, "dataset": dataset}),
        step=step,
        accuracy=accuracy,
        budgets={K: names.get(K, f"K={K}") for K in accuracy},
        macs_per_image=_training_macs(run, entries),
    )


def plot_comparison(comparison: Comparison, path: str | Path) -> None:
    """Plot validation accuracy against budgets, one line per row, with the standard deviation over seeds as error bars."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in comparison.rows:
        budgets = list(row.accuracy)
        several = f" ({len(row.seeds)} seeds)" if len(row.seeds) > 1 else ""
        axes.errorbar(
            budgets,
            [100 * row.accuracy[K] for K in budgets],
            yerr=[100 * (row.deviation[K] or 0.0) for K in budgets] if len(row.seeds) > 1 else None,
            marker="o",
            markersize=4,
            capsize=3,
            label=f"{row.name}, step {row.step:,}{several}",
        )
    axes.set_xscale("log", base=2)
    names: dict[int, dict[str, None]] = {}  # those of different families may be at the same place
    for row in comparison.rows:
        for K, name in row.budgets.items():
            names.setdefault(K, {})[name] = None
    ticks = _apart(sorted(names))
    counted = all(list(names[K]) == [f"K={K}"] for K in names)
    axes.set_xticks(ticks, [f"{K}" if counted else "\n".join(names[K]) for K in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("queries K" if counted else "budget")
    axes.set_ylabel("validation accuracy (%)")
    if any(len(row.seeds) > 1 for row in comparison.rows):
        axes.set_title("mean ± standard deviation over seeds", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    save_figure(figure, path)


def _read_log(path: Path) -> list[dict[str, Any]]:
    entries = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry["step"], int) or (
                "validation_accuracy" in entry and not isinstance(entry["K"], int)
            ):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"Expected a JSON log entry in line {number} of {path}, got {line!r}.") from None
        entries.append(entry)
    return entries


def _training_macs(run: RunFolder, entries: list[dict[str, Any]]) -> float | None:
    """Mean multiply-accumulates per image, from the log or else from the training.json of a finished run."""
    logged = [entry["macs_per_image"] for entry in entries if "macs_per_image" in entry]
    if logged:
        return statistics.fmean(logged)
    try:
        return json.loads((run.model / "training.json").read_text()).get("macs_per_image")
    except (OSError, ValueError):
        return None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten groups of keys to dotted names; an empty group is dropped."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _check_fits(run: Run, group: list[Run]) -> None:
    first = group[0]
    twin = next((other for other in group if other.seed == run.seed), None)
    if twin is not None:
        raise ValueError(
            f"Expected runs of one recipe to have different seeds, got {run.seed} in {twin.path} and {run.path}."
        )
    if run.step != first.step or set(run.accuracy) != set(first.accuracy):
        raise ValueError(
            f"Expected runs of one recipe to be evaluated at the same step and K, got {_evaluated(first)} and {_evaluated(run)}."
        )


def _evaluated(run: Run) -> str:
    names = ", ".join(run.budgets[K] for K in sorted(run.accuracy)).replace(", K=", ", ")
    return f"step {run.step}, {names.replace('=', ' = ')} in {run.path}"


def _differing_keys(recipes: list[dict[str, Any]]) -> list[str]:
    """Keys that are not the same in all recipes, in the recipes' order."""
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    return [key for key in keys if any(key not in r or r[key] != recipes[0].get(key) for r in recipes)]


def _names(groups: list[list[Run]], differing: list[str]) -> list[str]:
    """Name rows by the keys that differ, if these are few, or else by the common prefix of a row's folder names."""
    recipes = [group[0].recipe for group in groups]
    # Keys that only some recipes have mostly follow from another key, as the number of students from the schedule.
    shared = [key for key in differing if all(key in recipe for recipe in recipes)]
    # The table has a column for the step, so the length of the runs is used only if nothing else differs.
    chosen = [key for key in shared if key not in ("steps", "warmup_steps")]
    for keys in (chosen, shared, differing):
        names = [_name(recipe, keys) for recipe in recipes]
        if 0 < len(keys) <= LONGEST_NAME and len(set(names)) == len(names):
            return names
    names = [_common_name([run.path.name for run in group]) for group in groups]
    if all(names) and len(set(names)) == len(names):
        return names
    return [_name(recipe, differing) or group[0].path.name for recipe, group in zip(recipes, groups, strict=True)]


def _name(recipe: dict[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key}={_value(recipe[key])}" if key in recipe else f"no {key}" for key in keys)


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _common_name(names: list[str]) -> str:
    """The common prefix of the names, without a trailing separator or the word seed."""
    if len(names) == 1:
        return names[0]
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(min(names), max(names), strict=False))
    return re.sub(r"[-_. ]*(seed[-_. ]*\d*)?$", "", "".join(letter for letter, _ in alike))


def _percent(mean: float, deviation: float | None) -> str:
    return f"{100 * mean:.2f}" + (f" ± {100 * deviation:.2f}" if deviation is not None else "")


def _apart(budgets: list[int]) -> list[int]:
    """Choose K, from the largest down, whose labels do not overlap on a logarithmic axis."""
    chosen: list[int] = []
    for K in reversed(budgets):
        if not chosen or math.log2(chosen[-1] / K) >= 0.35:
            chosen.append(K)
    return chosen
