"""Create the embedded sample of CIFAR-10: 1,000 test images and 2,000 training images, balanced over the classes.

python -m hf_visual_perceiver.data.make_sample uoft-cs/cifar10 hf_visual_perceiver/data
"""

from pathlib import Path
from typing import Annotated

import datasets
import numpy as np
import typer

from hf_visual_perceiver.data.images import load_table
from hf_visual_perceiver.utils.console import run_command
from hf_visual_perceiver.utils.files import written_aside


def make_sample(dataset: str, folder: Path) -> None:
    """Write train.parquet and test.parquet with the first images of each class, in the dataset's order."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, per_class in (("train", 200), ("test", 100)):
        table = load_table(dataset, split)
        labels = np.asarray(table["label"])
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in np.unique(labels)]))
        # Keep the encoded bytes: decoding and re-encoding would change the files.
        table = table.cast_column("img", datasets.Image(decode=False)).select(chosen)
        table = table.cast_column("img", datasets.Image())
        with written_aside(folder / f"{split}.parquet") as aside:
            table.to_parquet(str(aside))


def command(
    dataset: Annotated[str, typer.Argument(help="Hub id of CIFAR-10, or its folder of parquet files.")],
    folder: Annotated[Path, typer.Argument(help="Folder for train.parquet and test.parquet.")],
) -> None:
    """Create the embedded sample."""
    make_sample(dataset, folder)


if __name__ == "__main__":
    run_command(command)
