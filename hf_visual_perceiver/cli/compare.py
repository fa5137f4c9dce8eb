"""`visual-perceiver compare`."""

from pathlib import Path
from typing import Annotated

import typer

from hf_visual_perceiver.cli.options import JsonOption, output_console, picture_option, write_result
from hf_visual_perceiver.utils.tables import terminal_table


def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="Folders of training runs.")],
    plot: Annotated[Path | None, picture_option("Write accuracy against K to this .png, .svg or .pdf.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in markdown.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Compare training runs by validation accuracy at every K: mean and standard deviation over seeds."""
    from hf_visual_perceiver.evaluation.comparison import compare_runs, plot_comparison

    console, comparison = output_console(json_file), compare_runs(runs)
    if markdown:
        console.print(comparison.to_markdown(), markup=False, highlight=False, soft_wrap=True)
    else:
        headers, *lines = comparison.table()
        console.print(terminal_table("validation accuracy (%)", headers, lines))
    write_result(json_file, comparison.to_dict())
    if plot:
        plot_comparison(comparison, plot)
        console.print(f"Plot: {plot}")
