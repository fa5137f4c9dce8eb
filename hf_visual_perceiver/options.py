"""Options that several commands share, and what to call a model or dataset in their results."""

from pathlib import Path
from typing import Annotated

import typer

from .loading import SAMPLE


ModelOption = Annotated[str | None, typer.Option("--model", help="Folder or Hub id; by default the one that ships.")]
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
BatchSizeOption = Annotated[int, typer.Option("--batch-size", min=1, help="Images of a batch.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
FastOption = Annotated[bool, typer.Option("--fast", help="Use the form that is optimised for CPUs; same answers.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]


def model_label(name: str) -> str:
    """What a result calls a model: where it lies on this machine helps nobody."""
    return Path(name).name if Path(name).is_dir() else name


def dataset_label(dataset: str | None, dataset_name: str | None = None) -> str:
    """What a result calls a dataset; None is the sample that ships."""
    return dataset_name or (Path(dataset).name if dataset and Path(dataset).exists() else dataset) or SAMPLE
