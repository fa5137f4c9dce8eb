"""Does measured time fall with multiply-accumulates? Every budget of every family, with random weights.

    OMP_NUM_THREADS=1 python benchmarks/family_times.py [ARCHITECTURE...] --json family_times.json

The budgets of a network are run in turn, in eager PyTorch, on images of the embedded sample. Ratios are to the full network.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hf_visual_perceiver.benchmark.benchmark import BenchmarkRow, benchmark
from hf_visual_perceiver.data.images import load_images, normalise, pixels_of_size
from hf_visual_perceiver.inference.loading import default_dataset
from hf_visual_perceiver.modeling.elastic import family_of
from hf_visual_perceiver.utils.conditions import command_line, conditions_line, measurement_conditions
from hf_visual_perceiver.utils.console import run_command
from hf_visual_perceiver.utils.files import check_writable, write_json
from hf_visual_perceiver.utils.tables import markdown_table


ARCHITECTURES = (
    "visual_perceiver_nano_patch4_32",
    "visual_perceiver_nano_conv_32",
    "dvt_nano_32",
    "lookupvit_nano_patch4_32",
    "perceiver_nano_32",
    "perceiver_io_nano_32",
    "qna_vit_nano_32",
)


def create_network(architecture: str) -> Any:
    """A classifier of ten classes with random weights.

    Raises:
        ValueError: If there is no such architecture.
    """
    family = family_of(architecture)
    return family.classifier(family.create_config(architecture, num_labels=10)).eval()


def pixels_for(config: Any, count: int) -> torch.Tensor:
    """The first images of the embedded sample, (n, C, H, W), normalised."""
    cfg, data = config.timm_pretrained_cfg, load_images(default_dataset(), "test")
    indices = range(min(count, len(data)))
    return normalise(pixels_of_size(data, indices, config.image_height_width), cfg["mean"], cfg["std"])


def table_of(rows: dict[str, list[BenchmarkRow]]) -> str:
    """MACs and time of every budget, and their ratios to the full network's, in Markdown."""
    sizes = list(dict.fromkeys(row.batch_size for of_one in rows.values() for row in of_one))
    headers = ["network", "budget", "MACs (M)", "/ full"]
    for size in sizes:
        headers += [f"batch {size}, ms", "/ full"]
    lines = []
    for name, of_one in rows.items():
        full = next(row.macs for row in of_one if row.setting == "full")
        for setting in dict.fromkeys(row.setting for row in of_one):
            found = [row for row in of_one if row.setting == setting]
            cells = [f"{found[0].macs / 1e6:.1f}", f"{found[0].macs / full:.3f}"]
            for row in found:
                cells += [f"{row.ms:.4g}", f"{row.relative_time:.3f}"]
            lines.append([name, setting, *cells])
    return markdown_table(headers, lines, left=2)


def main(
    architectures: Annotated[list[str] | None, typer.Argument(help="timm names; by default all nano networks.")] = None,
    batch_size: Annotated[list[int], typer.Option(help="Repeat for several.")] = [1, 256],  # noqa: B006
    repetitions: Annotated[int, typer.Option(min=1, help="Of all budgets.")] = 7,
    single_calls: Annotated[int, typer.Option(min=1, help="Repetitions at batch size 1.")] = 100,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this JSON file.")] = None,
) -> None:
    """Measure and print."""
    if json_file is not None:
        check_writable(json_file)
    torch.manual_seed(0)
    networks = {name: create_network(name) for name in architectures or ARCHITECTURES}
    rows = {
        name: benchmark(
            network,
            pixels_for(network.config, max(batch_size)),
            batch_size,
            forms=("eager",),
            repetitions=repetitions,
            single_calls=single_calls,
        )
        for name, network in networks.items()
    }
    counts = {"repetitions": repetitions, "single_calls": single_calls}
    conditions = measurement_conditions(dtype="float32", form="eager", **counts, command=command_line())
    print(f"{table_of(rows)}\n\n{conditions_line(conditions)}")
    if json_file:
        plain = {name: [asdict(row) for row in of_one] for name, of_one in rows.items()}
        write_json(json_file, {"conditions": conditions, "rows": plain})


if __name__ == "__main__":
    run_command(main)
