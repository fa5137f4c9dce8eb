"""`visual-perceiver convert`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_visual_perceiver.cli.options import output_console


def convert_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder or Hub id of a PerceiverForImageClassification of transformers, such as "
            "deepmind/vision-perceiver-fourier.",
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="New or empty folder to write to.")],
) -> None:
    """Convert a checkpoint of transformers' own Perceiver, of any of its three kinds of inputs, with equal logits.

    The folder is written only if the logits agree. It loads in transformers and timm, with the budgets of this package.
    """
    from hf_visual_perceiver.hub.convert import convert

    with Console(stderr=True).status("loading, converting, comparing with transformers"):
        network, difference = convert(source, output)
    config, size = network.config, sum(p.numel() for p in network.parameters())
    console = output_console()
    console.print(
        f"{output}: {config.summary}, {config.inputs} inputs, {size / 1e6:.2f} M parameters",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
    console.print(f"Largest difference of a logit from transformers': {difference:.1e}.", highlight=False)
