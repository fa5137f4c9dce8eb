"""`visual-perceiver info`."""

from pathlib import Path

from rich.table import Table

from hf_visual_perceiver.cli.evaluate import errors_line, evaluation_table
from hf_visual_perceiver.cli.options import (
    JsonOption,
    ModelArgument,
    ModelOption,
    chosen_model,
    output_console,
    write_result,
)
from hf_visual_perceiver.utils.files import read_json


def info_command(checkpoint: ModelArgument = None, model: ModelOption = None, json_file: JsonOption = None) -> None:
    """Show a checkpoint's architecture, default budget, cost at every budget and measured accuracy."""
    from hf_visual_perceiver.evaluation.evaluate import read_evaluation
    from hf_visual_perceiver.hub.card import training_lines
    from hf_visual_perceiver.inference.loading import load_model
    from hf_visual_perceiver.utils.conditions import conditions_line

    console, name = output_console(json_file), chosen_model(checkpoint, model)
    network = load_model(name)
    config = network.config
    height, width = config.image_height_width
    default = config.default_budget
    facts = {
        "family": config.title,
        "architecture": getattr(config, "architecture", config.model_type),
        "parameters": sum(p.numel() for p in network.parameters()),
        "images": f"{height}x{width}, {config.num_channels} channels",
        "network": config.summary,
        "default budget": default.short(config.knobs),
        "labels": ", ".join(config.label_names),
    }
    summary = Table(show_header=False, title=name)
    for key, value in facts.items():
        summary.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
    console.print(summary)
    macs = {budget.short(config.knobs): config.count_macs(budget) for budget in config.budgets()}
    measured, training = Path(name) / "evaluation.json", Path(name) / "training.json"
    evaluation = read_evaluation(measured) if measured.is_file() else None
    for line in read_json(training, training_lines) if training.is_file() else []:
        console.print(f"- {line}", highlight=False, markup=False, soft_wrap=True)
    if evaluation is not None:
        console.print(evaluation_table(evaluation))
        console.print(conditions_line(evaluation.conditions), style="dim", highlight=False)
        console.print(errors_line(evaluation), markup=False, highlight=False)
    else:
        table = Table("budget", "MACs (M)", title="cost per image")
        for budget, count in macs.items():
            table.add_row(f"{budget}", f"{count / 1e6:.2f}")
        console.print(table)
    write_result(json_file, {**facts, "macs": macs, "evaluation": None if evaluation is None else evaluation.to_dict()})
