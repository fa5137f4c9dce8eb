"""`visual-perceiver card`: write a model card from stored results, without measuring anything."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_visual_perceiver.cli.options import ModelOption, RequiredModelArgument, chosen_model
from hf_visual_perceiver.utils.files import check_writable


def card_command(
    checkpoint: RequiredModelArgument = None,
    model: ModelOption = None,
    output: Annotated[
        Path | None,
        typer.Option(help="File to write, such as model_cards/NAME.md; by default README.md in the folder."),
    ] = None,
) -> None:
    """Rewrite a checkpoint's model card from its JSON files: evaluation and, if present, training and robustness."""
    from hf_visual_perceiver.hub.card import rewrite_card

    folder = Path(chosen_model(checkpoint, model))
    if output:
        check_writable(output)
    Console().print(f"Card: {rewrite_card(folder, output)}", soft_wrap=True)
