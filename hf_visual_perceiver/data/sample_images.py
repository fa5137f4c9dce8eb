"""Write a few images of the embedded sample to files, as inputs to try commands on.

python -m hf_visual_perceiver.data.sample_images FOLDER --count 8
"""

from pathlib import Path
from typing import Annotated

import datasets
import typer

from hf_visual_perceiver.data.images import load_images
from hf_visual_perceiver.utils.bundled import default_dataset
from hf_visual_perceiver.utils.console import run_command


def write_sample_images(folder: Path, count: int) -> list[Path]:
    """Write the first `count` test images of the sample as PNG files named after their class."""
    data = load_images(default_dataset(), "test")
    if not 1 <= count <= len(data):
        raise ValueError(f"Expected a count in [1, {len(data)}], got {count}.")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03d}_{data.label_names[data.labels[i]]}.png" for i in range(count)]
    for i, path in enumerate(paths):
        data.image(i).save(path)
    return paths


def command(
    folder: Annotated[Path, typer.Argument(help="Folder to write to.")],
    count: Annotated[int, typer.Option(help="Number of images.")] = 8,
) -> None:
    """Write a few images of the embedded sample to files."""
    datasets.disable_progress_bars()
    write_sample_images(folder, count)


if __name__ == "__main__":
    run_command(command)
