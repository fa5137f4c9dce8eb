"""The `visual-perceiver` command.

Neither this module nor those of the commands import torch before a command starts its work, so that --help and errors
in the arguments respond at once; see visual_perceiver_launcher.
"""

import functools
import importlib.metadata
import platform
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from hf_visual_perceiver.cli.attention_maps import attention_maps_command
from hf_visual_perceiver.cli.benchmark import benchmark_command
from hf_visual_perceiver.cli.calibrate import calibrate_command
from hf_visual_perceiver.cli.card import card_command
from hf_visual_perceiver.cli.compare import compare_command
from hf_visual_perceiver.cli.convert import convert_command
from hf_visual_perceiver.cli.demo_app import demo_app_command
from hf_visual_perceiver.cli.evaluate import evaluate_command
from hf_visual_perceiver.cli.export import compare_exports_command, export_command
from hf_visual_perceiver.cli.frontier import frontier_command
from hf_visual_perceiver.cli.info import info_command
from hf_visual_perceiver.cli.knn import knn_command
from hf_visual_perceiver.cli.predict import predict_command
from hf_visual_perceiver.cli.publish import publish_command
from hf_visual_perceiver.cli.robustness import robustness_command
from hf_visual_perceiver.utils.console import DEBUG, DEBUG_HELP, run_app
from hf_visual_perceiver.utils.extras import require_extra


COMMANDS: dict[str, Callable[..., None]] = {
    "evaluate": evaluate_command,
    "predict": predict_command,
    "compare": compare_command,
    "frontier": frontier_command,
    "info": info_command,
    "benchmark": benchmark_command,
    "robustness": robustness_command,
    "card": card_command,
    "export": export_command,
    "compare-exports": compare_exports_command,
    "convert": convert_command,
    "publish": publish_command,
    "demo-app": demo_app_command,
    "attention-maps": attention_maps_command,
    "calibrate": calibrate_command,
    "knn": knn_command,
}

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _show_version(value: bool) -> None:
    if not value:
        return
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "timm")]
    package = importlib.metadata.version("hf-visual-perceiver")
    typer.echo(f"visual-perceiver {package} ({', '.join(versions)}, Python {platform.python_version()})")
    raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help=DEBUG_HELP)] = False,
) -> None:
    """Image classifiers whose compute budget is chosen at each call."""


def _begun(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command so that it first imports the package."""

    @functools.wraps(command)
    def run(**arguments: object) -> None:
        require_extra("cli")
        import_package()
        command(**arguments)

    return run


for name, command in COMMANDS.items():
    app.command(name)(_begun(command))


def import_package() -> None:
    """Run the package's __init__, which registers the models, unless it has run, and silence other libraries."""
    package = sys.modules["hf_visual_perceiver"]
    if not hasattr(package, "__version__"):
        assert package.__spec__ is not None, "the package was made from a spec"
        assert package.__spec__.loader is not None, "the package was made from a spec"
        package.__spec__.loader.exec_module(package)

    import datasets
    import transformers

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def main() -> None:
    """Run the command; errors in the input are reported in one line, without a traceback."""
    run_app(app, out_of_memory="try a smaller --batch-size")


if __name__ == "__main__":
    main()
