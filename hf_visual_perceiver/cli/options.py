"""Options that several commands share, output of their results, and the names of models and datasets in results.

Command modules can import this without torch; imports that need torch are inside functions.
"""

import json
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_visual_perceiver.utils.choices import check_dtype
from hf_visual_perceiver.utils.files import check_picture, check_writable, write_json


STDOUT = Path("-")


def one_of(names: Collection[str]) -> Callable[[typer.CallbackParam, str], str]:
    """Create a callback that checks that an option's value is one of `names`."""

    def check(parameter: typer.CallbackParam, value: str) -> str:
        if value not in names:
            raise ValueError(f"Expected {parameter.opts[0]} to be one of {', '.join(names)}, got {value!r}.")
        return value

    return check


def _dtype(value: str) -> str:
    check_dtype(value)
    return value


def _json_file(value: Path | None) -> Path | None:
    """Fail early if the file cannot be written."""
    if value is not None and value != STDOUT:
        check_writable(value)
    return value


def _picture(value: Path | None) -> Path | None:
    if value is not None:
        check_picture(value)
        check_writable(value)
    return value


def one_model(context: typer.Context, value: str | None) -> str | None:
    """Raise a `ValueError` if the argument and `--model` name different checkpoints."""
    option = context.params.get("model")
    if value and option and Path(value) != Path(option):
        raise ValueError(f"Expected one checkpoint, got {value!r} and --model {option!r}.")
    return value


def required_model(context: typer.Context, value: str | None) -> str | None:
    """Like `one_model`, and raise a usage error if neither names a checkpoint."""
    if not value and not context.params.get("model"):
        raise typer.BadParameter("Expected a checkpoint folder, as an argument or with --model, got none.", context)
    return one_model(context, value)


# Eager, so that it is parsed before the argument's callback, which reads it.
ModelOption = Annotated[
    str | None,
    typer.Option("--model", is_eager=True, help="Folder or Hub id; by default the bundled checkpoint."),
]
ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", callback=one_model, help="Folder or Hub id; the same as --model.")
]
RequiredModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", callback=required_model, help="Folder of the checkpoint; the same as --model."),
]
DatasetOption = Annotated[
    str | None,
    typer.Option("--dataset", help="Hub id, folder of parquet files, or imagefolder; by default the bundled sample."),
]
DatasetNameOption = Annotated[
    str | None,
    typer.Option(
        "--dataset-name", help="Name of the dataset in the result, such as its Hub id if --dataset is a local copy."
    ),
]
SplitOption = Annotated[
    str, typer.Option("--split", help='Split of the dataset, or a part of it such as "test[:200]" or "train[-5000:]".')
]
MaxImagesOption = Annotated[
    int | None, typer.Option("--max-images", min=1, help="Maximum number of images, evenly spaced in the split.")
]
# docs/command_line.md lists the short names of each family.
BUDGET = 'Compute budget, in the short names of the model\'s knobs: "K=16", "K=16, t=0.8", "exit=2", "grid=5", ..., or "full"'
BudgetOption = Annotated[list[str] | None, typer.Option("--budget", help=f"{BUDGET}; repeat for several.")]
OneBudgetOption = Annotated[str | None, typer.Option("--budget", help=f"{BUDGET}; by default that of config.json.")]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", min=1, help="Images per batch.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option("--dtype", callback=_dtype, help="float32, bfloat16 or float16.")]
FastOption = Annotated[bool, typer.Option("--fast", help="Use the optimised form for CPUs, with the same results.")]
JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        callback=_json_file,
        help="Also write the result to this JSON file; - is stdout, and all other output then goes to stderr.",
    ),
]


def parsed_budgets(config: Any, texts: Collection[str] | None) -> list[Any] | None:
    """Parse the values of `--budget` for a model with this config; None if there are none.

    Raises:
        ValueError: If a text is not a budget, or is out of the model's range.
    """
    return [config.parse_budget(text) for text in texts] if texts else None


def picture_option(help: str) -> Any:
    """Create an option for a picture file to write: .png, .svg or .pdf."""
    return typer.Option(callback=_picture, help=help)


def output_console(json_file: Path | None = None, width: int = 120) -> Console:
    """The console of a command: stdout, or stderr if `--json -` uses stdout. `width` applies without a terminal."""
    console = Console(stderr=json_file == STDOUT)
    return console if console.is_terminal else Console(stderr=json_file == STDOUT, width=width)


def write_result(json_file: Path | None, values: Any) -> None:
    """Write plain values to the file or stdout that `--json` names, if it is given."""
    if json_file == STDOUT:
        json.dump(values, sys.stdout, indent=2)
        sys.stdout.write("\n")
    elif json_file is not None:
        write_json(json_file, values)


def chosen_model(argument: str | None, option: str | None) -> str:
    """The checkpoint given to a command as argument or with `--model`, or else the bundled one."""
    from hf_visual_perceiver.inference.loading import default_model

    return argument or option or default_model()


def model_label(name: str) -> str:
    """The name of a model in results: its Hub id, or its folder's name without the path on this machine.

    The `model` folder of a run has the run's name.
    """
    folder = Path(name).resolve()
    if not folder.is_dir():
        return name
    return folder.parent.name if folder.name == "model" else folder.name


def dataset_label(dataset: str | None, dataset_name: str | None = None) -> str:
    """The name of a dataset in results; None is the bundled sample."""
    from hf_visual_perceiver.inference.loading import SAMPLE

    return dataset_name or (Path(dataset).name if dataset and Path(dataset).exists() else dataset) or SAMPLE
