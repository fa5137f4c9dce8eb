"""Model cards, rendered from the evaluation and the training facts of a checkpoint."""

import os
from pathlib import Path
from typing import Any

import jinja2
import torch
from huggingface_hub import EvalResult, ModelCardData

from hf_visual_perceiver.evaluation.confusion import Confusion
from hf_visual_perceiver.evaluation.evaluate import Evaluation, read_evaluation
from hf_visual_perceiver.evaluation.plots import plot_tradeoff
from hf_visual_perceiver.evaluation.robustness import ALL, CLEAN, Robustness, read_robustness
from hf_visual_perceiver.inference.loading import load_config
from hf_visual_perceiver.modeling import FAMILIES, Budget
from hf_visual_perceiver.training.curves import recipe_step_names
from hf_visual_perceiver.utils.bundled import SAMPLE, shipped
from hf_visual_perceiver.utils.conditions import conditions_line
from hf_visual_perceiver.utils.files import read_json, write_json, write_text
from hf_visual_perceiver.utils.tables import markdown_table


PICTURE = "tradeoff.png"
CLASSES = 10  # number of classes in a card's table: those with the lowest accuracy


def write_card(folder: Path, model: Any, evaluation: Evaluation) -> Path:
    """Write README.md, tradeoff.png and evaluation.json into a checkpoint's folder.

    Args:
        folder: The checkpoint's folder; training.json and robustness.json in it are read if they exist.
        model: The checkpoint.
        evaluation: The checkpoint's evaluation.

    Returns:
        The path of the card.
    """
    text = render_card(folder, model.config, evaluation)
    plot_tradeoff(evaluation, folder / PICTURE)
    write_json(folder / "evaluation.json", evaluation.to_dict())
    write_text(folder / "README.md", text)
    return folder / "README.md"


def rewrite_card(folder: Path, output: Path | None = None) -> Path:
    """Write a checkpoint's card from its JSON files alone: config, evaluation and, if present, training and robustness.

    Args:
        folder: The checkpoint's folder.
        output: The file to write; None is README.md in the folder, in which case the plot is redrawn as well.

    Returns:
        The path of the card.

    Raises:
        ValueError: If the folder holds no checkpoint, or its evaluation is missing or damaged.
    """
    measured = folder / "evaluation.json"
    if not measured.is_file():
        raise ValueError(
            f"Expected {measured} to exist; `visual-perceiver evaluate --model {folder} --write-card` writes it."
        )
    evaluation, config = read_evaluation(measured), load_config(str(folder))
    if output is None:
        plot_tradeoff(evaluation, folder / PICTURE)
    picture = Path(os.path.relpath(folder / PICTURE, output.parent)).as_posix() if output else PICTURE
    output = output or folder / "README.md"
    write_text(output, render_card(folder, config, evaluation, picture))
    return output


def render_card(folder: Path, config: Any, evaluation: Evaluation, picture: str = PICTURE) -> str:
    """Render the text of a checkpoint's card.

    Args:
        folder: The checkpoint's folder; training.json and robustness.json in it are read if they exist.
        config: The checkpoint's config.
        evaluation: The checkpoint's evaluation.
        picture: Path of the plot, relative to the card.

    Raises:
        ValueError: If a file is damaged.
    """
    training, robustness = folder / "training.json", folder / "robustness.json"
    corrupted = read_robustness(robustness) if robustness.is_file() else None
    facts, described = (
        read_json(training, lambda values: (values, training_lines(values))) if training.is_file() else ({}, [])
    )
    name = folder.resolve().name
    return _template().render(
        metadata=_metadata(name, config, evaluation, facts),
        name=name,
        summary=_summary(config, facts),
        about=config.about,
        citation=config.citation,
        unit=config.unit,
        fast=_arguments(config.budgets()[2 * len(config.budgets()) // 3]),
        adaptive=_arguments(_middle(config.adaptive_budgets())),
        picture=picture,
        table=evaluation_markdown(evaluation),
        command=evaluation.conditions.get("command", "visual-perceiver evaluate"),
        conditions=conditions_line(evaluation.conditions),
        errors=_errors(evaluation.confusion),
        training="\n".join(f"- {line}" for line in described) or "Not recorded.",
        limits=_limits(config, corrupted),
    )


def evaluation_markdown(evaluation: Evaluation) -> str:
    """The rows of a sweep as Markdown."""
    rows = []
    for row in evaluation.rows:
        used = f"{row.used_mean:.2f}"
        if row.used_min != row.used_max:
            used += f" ± {row.used_std:.2f} ({row.used_min} to {row.used_max})"
        accuracy = f"{100 * row.accuracy:.2f} ± {100 * row.standard_error:.2f}"
        name = evaluation.name(row.budget)
        quantised = [f"{100 * evaluation.int8[name]:.2f}" if name in evaluation.int8 else ""] if evaluation.int8 else []
        rows.append([name, used, f"{row.macs / 1e6:.2f}", accuracy, *quantised, f"{row.relative_time:.2f}"])
    accuracies = ["accuracy (%)", *(["engine in int8 (%)"] if evaluation.int8 else [])]
    headers = ("setting", f"{evaluation.unit}: mean ± std (min to max)", "MACs (M)", *accuracies, "time")
    return markdown_table(headers, rows)


def _middle(budgets: list[Budget]) -> Budget | None:
    return budgets[len(budgets) // 2] if budgets else None


def _arguments(budget: Budget | None) -> str:
    """A budget as arguments of a call; empty for None."""
    return str(budget or "")


def _errors(confusion: Confusion | None) -> str:
    """Accuracy by class and the most frequent mistakes of the full network, as Markdown."""
    if confusion is None:
        return "Errors by class were not measured."
    worst = confusion.worst_first()
    chosen = "by class" if len(worst) <= CLASSES else f"on the {CLASSES} worst of {len(worst)} classes"
    rows = []
    for label in worst[:CLASSES]:
        accuracy, images = confusion.accuracy(label), confusion.images(label)
        error = (accuracy * (1 - accuracy) / images) ** 0.5
        others = ", ".join(f"{given} ({number})" for _, given, number in confusion.mistakes(label)[:2])
        rows.append([label, others, f"{images}", f"{100 * accuracy:.1f} ± {100 * error:.1f}"])
    table = markdown_table(["class", "most frequent wrong labels", "images", "accuracy (%)"], rows, left=2)
    return f"Accuracy of the full network {chosen}:\n\n{table}\n\n{confusion.sentence()}"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(shipped("model_cards/template.md").read_text())


def _metadata(name: str, config: Any, evaluation: Evaluation, facts: dict[str, Any]) -> str:
    """The card's YAML metadata, which the Hub reads."""
    c = evaluation.conditions
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="uoft-cs/cifar10" if c["dataset"] == SAMPLE else c["dataset"],
            dataset_name=f"{c['dataset']} ({c['split']}, {c['images']} images)",
            dataset_split=c["split"],
            metric_type="accuracy",
            metric_name=f"accuracy at {evaluation.name(row.budget)}",
            metric_value=round(row.accuracy, 4),
        )
        for row in evaluation.rows
    ]
    data = ModelCardData(
        model_name=name,
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["timm", "vision", "adaptive-computation", config.model_type.replace("_", "-")],
        datasets=[facts["recipe"]["dataset"]] if facts else None,
        metrics=["accuracy"],
        eval_results=results,
    )
    return data.to_yaml()


def _summary(config: Any, facts: dict[str, Any]) -> str:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in FAMILIES[config.model_type].classifier(config).parameters()) / 1e6
    named = ", ".join(filter(None, (getattr(config, "architecture", ""), f"{parameters:.2f} M parameters")))
    height, width = config.image_height_width
    return (
        f"{config.title} ({named}{': ' if config.summary else ''}{config.summary}): a network that classifies {height}x{width} images into {config.num_labels} classes"
        + (f", trained on {facts['recipe']['dataset']}." if facts else ".")
    )


def training_lines(facts: dict[str, Any]) -> list[str]:
    """Describe the facts of training.json in sentences."""
    recipe, c = facts["recipe"], facts["conditions"]
    # Both are None for a stream, whose number of images is unknown.
    images, epochs = facts["training_images"], facts["epochs"]
    held_out = recipe.get("validation_split")
    teacher = recipe.get("teacher")
    lines = [
        f"Data: {'' if images is None else f'{images:,} '}training images of {recipe['dataset']}; "
        + (
            f"split {held_out} was held out for validation."
            if held_out
            else f"{recipe['validation']:,} images of the training split were held out for validation."
        ),
        f"Recipe: {facts['recipe_name']} (recipe.yaml in the checkpoint's folder), {recipe['steps']:,} steps of "
        f"{recipe['batch_size']} images{'' if epochs is None else f' ({epochs:.1f} epochs)'}, "
        f"schedule {_schedule(recipe)}"
        + (f", {teacher['distillation']} distillation from {_run_name(teacher['model'])}." if teacher else "."),
        f"Seed: {recipe['seed']}, one run; other seeds were not measured.",
        f"Hardware: {c['hardware']}, {facts['processes']} process(es)"
        + (f" of {c['threads']} thread(s)" if "threads" in c else "")
        + f", {recipe['mixed_precision']} mixed precision; "
        f"{facts['training_hours']:.2f} hours of training steps. Energy was not measured.",
        f"Versions: torch {c['torch']}, transformers {c['transformers']}, timm {c['timm']}"
        + (f"; this folder was written at commit {c['commit']}." if "commit" in c else "."),
    ]
    if recipe.get("initial_model"):
        lines.insert(1, f"Initial weights: {_run_name(recipe['initial_model'])}{_earlier_stage(facts)}.")
    if facts["validation_accuracy"]:
        names = {f"{K}": name for K, name in recipe_step_names(recipe).items()}
        accuracies = ", ".join(
            f"{100 * accuracy:.2f} % ({names.get(K, K)})" for K, accuracy in facts["validation_accuracy"].items()
        )
        lines.append(f"Validation accuracy at the end: {accuracies}.")
    return lines


def _schedule(recipe: dict[str, Any]) -> str:
    """The name of the schedule; earlier versions stored it under `queries`."""
    return str((recipe.get("budgets") or recipe["queries"])["schedule"])


def _run_name(model: str) -> str:
    """The last part of a Hub id or path; for a run's `model` folder, the name of the run."""
    path = Path(model)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def _earlier_stage(facts: dict[str, Any]) -> str:
    """Describe how the initial model of a run was trained; empty if its folder did not record it."""
    earlier = facts.get("earlier_training")
    if earlier is None:
        return ""
    recipe, seed = earlier["recipe"], earlier["recipe"]["seed"]
    return (
        f", trained by {earlier['recipe_name']}: {recipe['steps']:,} steps of {recipe['batch_size']} images, schedule "
        f"{_schedule(recipe)}, seed {seed}, {earlier['training_hours']:.2f} hours on {earlier['conditions']['hardware']}"
        + (f" (started from {_run_name(recipe['initial_model'])})" if recipe.get("initial_model") else "")
    )


def _limits(config: Any, corrupted: Robustness | None) -> str:
    height, width = config.image_height_width
    robustness = "Robustness to corrupted or shifted images was not measured."
    if corrupted:
        clean, mean = (
            next(o for o in corrupted.cell(*place) if o.budget == corrupted.full) for place in ((CLEAN, 0), (ALL, None))
        )
        robustness = (
            f"Under {len(corrupted.corruptions)} corruptions (robustness.json) the mean accuracy at {corrupted.full.short(corrupted.knobs)} is "
            f"{100 * mean.accuracy:.2f} %; on the same {corrupted.conditions['images']:,} images without corruption it is "
            f"{100 * clean.accuracy:.2f} %. Other shifts were not measured."
        )
    return (
        f"The network was trained only on {height}x{width} images of the training set's classes, and assigns every image to one of "
        f"them. Its probabilities are not calibrated. {robustness} Accuracy is much lower at small budgets; see the table."
    )
