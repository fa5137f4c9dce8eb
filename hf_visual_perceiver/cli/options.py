"""Options that several commands share, where their results go, and what to call a model or dataset in them.

Command modules import this without torch; what needs it is imported inside functions.
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
    """A check of an option's value."""

    def check(parameter: typer.CallbackParam, value: str) -> str:
        if value not in names:
            raise ValueError(f"Expected {parameter.opts[0]} to be one of {', '.join(names)}, got {value!r}.")
        return value

    return check


def _dtype(value: str) -> str:
    check_dtype(value)
    return value


def _json_file(value: Path | None) -> Path | None:
    """What could fail at the end fails at once."""
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
    """As `one_model`, and a usage error if neither names one."""
    if not value and not context.params.get("model"):
        raise typer.BadParameter("Missing a checkpoint: its folder, as an argument or with --model.", context)
    return one_model(context, value)


# Eager, so that the argument's check sees it.
ModelOption = Annotated[
    str | None,
    typer.Option("--model", is_eager=True, help="Folder or Hub id; by default the one that ships."),
]
ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", callback=one_model, help="Folder or Hub id, as --model takes it.")
]
RequiredModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", callback=required_model, help="The checkpoint's folder, as --model takes it."),
]
DatasetOption = Annotated[
    str | None,
    typer.Option(
        "--dataset", help="Hub id, folder of parquet files, or imagefolder; by default the sample that ships."
    ),
]
DatasetNameOption = Annotated[
    str | None,
    typer.Option(
        "--dataset-name", help="What to call the dataset in the result: its Hub id, if --dataset is a copy of it."
    ),
]
SplitOption = Annotated[
    str, typer.Option("--split", help='Split of the dataset, or a part of it such as "test[:200]" or "train[-5000:]".')
]
MaxImagesOption = Annotated[
    int | None, typer.Option("--max-images", min=1, help="At most so many images of a split, evenly spaced in it.")
]
BudgetOption = Annotated[
    list[str] | None,
    typer.Option("--budget", help='What images may use, such as "K=16", "K=16, t=0.8" or "full"; repeat for several.'),
]
OneBudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget", help='What images may use, such as "K=16", "K=16, t=0.8" or "full"; by default the model\'s own.'
    ),
]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", min=1, help="Images of a batch.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option("--dtype", callback=_dtype, help="float32, bfloat16 or float16.")]
FastOption = Annotated[bool, typer.Option("--fast", help="Use the form that is optimised for CPUs; same answers.")]
JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        callback=_json_file,
        help="Also write the result to this file; - is stdout, and everything else then goes to stderr.",
    ),
]


def parsed_budgets(config: Any, texts: Collection[str] | None) -> list[Any] | None:
    """What `--budget` was given, for a model with this config; None if it was not.

    Raises:
        ValueError: If a text is no budget, or out of the model's range.
    """
    return [config.parse_budget(text) for text in texts] if texts else None


def picture_option(help: str) -> Any:
    """An option for a picture to write: .png, .svg or .pdf."""
    return typer.Option(callback=_picture, help=help)


def output_console(json_file: Path | None = None, width: int = 120) -> Console:
    """Where a command prints: stdout, or stderr if `--json -` takes that. `width` is for what is no terminal."""
    console = Console(stderr=json_file == STDOUT)
    return console if console.is_terminal else Console(stderr=json_file == STDOUT, width=width)


def write_result(json_file: Path | None, values: Any) -> None:
    """Write plain values where `--json` says."""
    if json_file == STDOUT:
        json.dump(values, sys.stdout, indent=2)
        sys.stdout.write("\n")
    elif json_file is not None:
        write_json(json_file, values)


def chosen_model(argument: str | None, option: str | None) -> str:
    """The checkpoint that a command was given, as its argument or with `--model`; the one that ships if neither was."""
    from hf_visual_perceiver.inference.loading import default_model

    return argument or option or default_model()


def model_label(name: str) -> str:
    """What a result calls a model: where it lies on this machine helps nobody."""
    return Path(name).name if Path(name).is_dir() else name


def dataset_label(dataset: str | None, dataset_name: str | None = None) -> str:
    """What a result calls a dataset; None is the sample that ships."""
    from hf_visual_perceiver.inference.loading import SAMPLE

    return dataset_name or (Path(dataset).name if dataset and Path(dataset).exists() else dataset) or SAMPLE
