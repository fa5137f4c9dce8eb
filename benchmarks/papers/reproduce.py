"""Reproduce the paper's tables and figures with the checkpoints that exist, beside the paper's numbers.

python benchmarks/papers/reproduce.py --output-dir outputs/paper
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import datasets
import transformers
import typer
from reproduce_measure import Measurements, measure, read_checkpoints
from reproduce_sections import PICTURES, SECTIONS
from rich.console import Console

from hf_visual_perceiver.cli.options import (
    BatchSizeOption,
    DatasetNameOption,
    DatasetOption,
    DeviceOption,
    DtypeOption,
    MaxImagesOption,
    SplitOption,
    dataset_label,
)
from hf_visual_perceiver.data.images import load_images
from hf_visual_perceiver.data.parts import at_most
from hf_visual_perceiver.evaluation import paper
from hf_visual_perceiver.inference.loading import choose_device, default_dataset
from hf_visual_perceiver.utils.conditions import command_line, conditions_line
from hf_visual_perceiver.utils.console import run_command
from hf_visual_perceiver.utils.files import folder_written_aside, write_json, write_text


messages = Console(stderr=True)
CHECKPOINTS = Path(__file__).with_name("reproduce.yaml")


def write_report(found: Measurements, output_dir: Path) -> Path:
    """Write paper.md, its pictures in paper/, and the measurements as paper/measurements.json.

    Args:
        found: The measurements; their conditions name the dataset.
        output_dir: Folder for the report; created if missing. An earlier paper/ in it is replaced.

    Returns:
        The path of the report.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with folder_written_aside(output_dir / PICTURES) as pictures:
        sections = [section(found, pictures) for section in SECTIONS]
        write_json(pictures / "measurements.json", _plain(found))
    report = output_dir / "paper.md"
    write_text(report, "\n\n".join([_introduction(found), *sections]) + "\n")
    return report


def _introduction(found: Measurements) -> str:
    c = found.conditions
    return (
        "# The paper's tables and figures, and ours\n\n"
        f"{paper.CITATION}. Columns and dashed curves labelled *paper* are its printed numbers (CIFAR-10, all 10,000 test "
        f"images). All others were measured on {len(found.data):,} images of {c['dataset']}, split {c['split']}, by\n\n"
        f"    {c.get('command', 'python -m reproduce')}\n\n"
        f"Conditions: {conditions_line(c)}. The seed draws the random subsets. Each checkpoint is one training run."
    )


def _row(row: Any) -> dict[str, Any]:
    budget = getattr(row, "budget", None)
    return {**asdict(row), **({} if budget is None else {"budget": budget.kwargs})}


def _plain(found: Measurements) -> dict[str, Any]:
    """The numbers behind the report, for JSON."""
    selection = found.selection
    return {
        "conditions": found.conditions,
        "missing": found.missing,
        "query_masking": found.query_masking.to_dict() if found.query_masking else None,
        "specialists": {str(K): _row(row) for K, row in found.specialists.items()},
        "robustness": found.robustness and found.robustness.to_dict(),
        "random_subsets": [_row(row) for row in found.random_subsets],
        "selection": selection
        and {"threshold": selection.threshold, "counts": selection.counts.tolist(), "example": selection.example},
        "attention": {role: maps.round(6).tolist() for role, maps in found.attention.items()},
    }


def command(
    output_dir: Annotated[Path, typer.Option(help="Folder for paper.md and its pictures in paper/.")] = Path(
        "outputs/paper"
    ),
    config: Annotated[
        Path | None, typer.Option(help="YAML file with the checkpoints; by default reproduce.yaml beside this script.")
    ] = None,
    dataset: DatasetOption = None,
    dataset_name: DatasetNameOption = None,
    split: SplitOption = "test",
    max_images: MaxImagesOption = None,
    batch_size: BatchSizeOption = 256,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the subsets.")] = 0,
    image: Annotated[int, typer.Option(help="Index of the image whose similarities are shown.")] = 0,
    robustness_images: Annotated[
        int, typer.Option(min=0, help="Number of images to measure under corruptions, evenly spaced; 0 for none.")
    ] = 100,
    robustness_severity: Annotated[list[int], typer.Option(help="Severity, 1 to 5; repeat for several.")] = [1, 3, 5],  # noqa: B006
) -> None:
    """Reproduce the paper's tables and figures with the checkpoints that exist."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"Expected a folder for the report, got the file {str(output_dir)!r}.")
    checkpoints = read_checkpoints(config or CHECKPOINTS)
    for role, name in checkpoints.missing.items():
        messages.print(f"missing: {role}" + (f", {name}" if name else ""), markup=False, highlight=False)
    data = at_most(load_images(dataset or default_dataset(), split), max_images)
    found = measure(
        checkpoints,
        data,
        batch_size,
        choose_device(device),
        dtype,
        seed,
        image,
        True,
        robustness_images,
        robustness_severity,
        conditions={
            "dataset": dataset_label(dataset, dataset_name),
            "split": split,
            "command": command_line(),
        },
    )
    typer.echo(f"Report: {write_report(found, output_dir)}")


def main() -> None:
    """Run the command; an input error is one line, without a traceback."""
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    run_command(command, out_of_memory="try a smaller --batch-size")


if __name__ == "__main__":
    main()
