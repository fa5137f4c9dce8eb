"""Time and MACs of the paper's network against image size and number of queries.

    python benchmarks/scaling.py --plot scaling.png --json scaling.json

The trunk processes K tokens for any image size, so at constant K the cost grows slowly and linearly with the number of patches
N; a ViT's grows with N and N^2. There are two sweeps with random weights: image size at constant K (beside timm's ViT on the same
patches), and the number of learned queries Q at constant K and image size.
"""

import statistics
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from inference import timm_vit, vit_macs
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from hf_visual_perceiver import VisualPerceiverConfig, VisualPerceiverForImageClassification, count_macs
from hf_visual_perceiver.benchmark.timing import interleaved
from hf_visual_perceiver.evaluation.plots import save_figure
from hf_visual_perceiver.inference.loading import choose_device
from hf_visual_perceiver.utils.conditions import measurement_conditions
from hf_visual_perceiver.utils.console import run_command
from hf_visual_perceiver.utils.files import write_json


console = Console(width=120)


def main(
    image_size: Annotated[list[int], typer.Option(help="Repeat.")] = [32, 48, 64, 96, 128, 224],  # noqa: B006
    num_queries: Annotated[list[int], typer.Option(help="Q; repeat.")] = [16, 32, 64, 128, 196],  # noqa: B006
    num_active_queries: Annotated[int, typer.Option(help="K of both sweeps.")] = 16,
    vit_up_to: Annotated[int, typer.Option(help="Largest image of the ViT, which is slow on large ones.")] = 128,
    batch_size: Annotated[int, typer.Option()] = 4,
    repetitions: Annotated[int, typer.Option()] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    plot: Annotated[Path | None, typer.Option(help="Plot the curves to this .png, .svg or .pdf.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")] = None,
) -> None:
    """Measure and print."""
    place = torch.device(choose_device(device))
    torch.manual_seed(0)
    K, runs, facts = num_active_queries, {}, {}

    def add(sweep: str, network: str, size: int, Q: int, macs: int, model: torch.nn.Module, **arguments: int) -> None:
        name = f"{sweep}, {network}, {size}, {Q}"
        facts[name] = {"sweep": sweep, "network": network, "image_size": size, "Q": Q, "macs": macs}
        images = torch.randn(batch_size, 3, size, size, device=place)
        runs[name] = partial(model.to(place).eval(), images, **arguments)

    for sweep, pairs in (
        ("image size", [(size, 64) for size in image_size]),
        ("queries", [(32, Q) for Q in num_queries]),
    ):
        for size, Q in pairs:
            config = VisualPerceiverConfig(image_size=size, num_queries=Q, num_labels=10)
            model = VisualPerceiverForImageClassification(config).eval()
            for form, network in (("eager", model), ("optimized", model.to(place).optimize_for_inference())):
                if form == "optimized":
                    name = f"{sweep}, optimized, {size}, {Q}"
                    facts[name] = {
                        "sweep": sweep,
                        "network": form,
                        "image_size": size,
                        "Q": Q,
                        "macs": count_macs(config, K),
                    }
                    images = torch.randn(batch_size, 3, size, size, device=place)
                    runs[name] = partial(network, images, num_active_queries=K)
                else:
                    add(sweep, form, size, Q, count_macs(config, K), network, num_active_queries=K)
            if sweep == "image size" and size <= vit_up_to:
                add(sweep, "timm's ViT", size, Q, vit_macs(config), timm_vit(config))
    times = interleaved(runs, repetitions, place, "scaling")
    rows = [{**facts[name], "ms": 1000 * statistics.median(seconds)} for name, seconds in times.items()]
    for sweep in ("image size", "queries"):
        table = Table(title=f"{sweep}, K = {K}", title_justify="left", box=box.SIMPLE_HEAD)
        for header in ("network", "image", "patches", "Q", "MACs (M)", "ms", "vs smallest"):
            table.add_column(header, justify="left" if header == "network" else "right")
        for network in dict.fromkeys(row["network"] for row in rows):
            of_sweep = [row for row in rows if row["sweep"] == sweep and row["network"] == network]
            for row in of_sweep:
                table.add_row(
                    network,
                    f"{row['image_size']}",
                    f"{(row['image_size'] // 4) ** 2}",
                    f"{row['Q']}" if network != "timm's ViT" else "",
                    f"{row['macs'] / 1e6:.1f}",
                    f"{row['ms']:.2f}",
                    f"{row['ms'] / of_sweep[0]['ms']:.2f}",
                )
        console.print(table)
    conditions = measurement_conditions(
        place,
        dtype="float32",
        batch_size=batch_size,
        K=K,
        repetitions=repetitions,
        model="visual_perceiver_tiny_patch4",
    )
    console.print(", ".join(f"{key} {value}" for key, value in conditions.items()), highlight=False)
    if json_file:
        write_json(json_file, {"conditions": conditions, "rows": rows})
    if plot:
        figure = Figure(figsize=(9, 4), layout="constrained")
        for axes, sweep, x in zip(figure.subplots(1, 2), ("image size", "queries"), ("N", "Q"), strict=True):
            for network in dict.fromkeys(row["network"] for row in rows if row["sweep"] == sweep):
                chosen = [row for row in rows if row["sweep"] == sweep and row["network"] == network]
                values = [(row["image_size"] // 4) ** 2 if x == "N" else row["Q"] for row in chosen]
                axes.plot(values, [row["ms"] for row in chosen], "o-", label=network)
            axes.set_xlabel("patches N" if x == "N" else "learned queries Q")
            axes.set_ylabel(f"ms, batch of {batch_size}, K = {K}")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        save_figure(figure, plot)


if __name__ == "__main__":
    run_command(main)
