"""Time at every budget, side by side: K relative to all queries, and selection relative to a fixed K of the same mean.

    python benchmarks/inference.py --json inference.json

Every repetition runs all settings once, in turn, on the same images, after a warm-up; the ratios are of the same
repetition, and their medians are printed. Random weights by default: time does not depend on them, but which queries a
threshold keeps does, so thresholds want a trained checkpoint (`--model`).
"""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hf_visual_perceiver import VisualPerceiverConfig, VisualPerceiverForImageClassification, count_macs
from hf_visual_perceiver.cli import conditions_line
from hf_visual_perceiver.evaluation import PAPER_QUERIES
from hf_visual_perceiver.loading import choose_device, default_dataset, load_model
from hf_visual_perceiver.training.conditions import measurement_conditions
from hf_visual_perceiver.training.data import load_images, normalise, pixels_of_size
from hf_visual_perceiver.training.files import write_json


console = Console(width=120)


@torch.inference_mode()
def milliseconds(model: torch.nn.Module, pixels: torch.Tensor, **arguments: float) -> float:
    """Time of one forward, device included."""
    if pixels.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    model(pixels, **arguments)
    if pixels.device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def main(
    model: Annotated[
        str | None, typer.Option(help="Checkpoint; by default --architecture with random weights.")
    ] = None,
    architecture: Annotated[str, typer.Option(help="timm name.")] = "visual_perceiver_tiny_patch4_32",
    batch_size: Annotated[list[int], typer.Option(help="Repeat for several.")] = [1, 64, 512],  # noqa: B006
    threshold: Annotated[list[float], typer.Option(help="t, with --model; repeat for several.")] = [0.6, 0.8, 0.9],  # noqa: B006
    repetitions: Annotated[int, typer.Option(help="Of all settings.")] = 7,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Print time relative to all queries, and of selection relative to a fixed K."""
    device = choose_device(device)
    if model is None:
        torch.manual_seed(0)
        config = VisualPerceiverConfig.from_architecture(architecture, num_labels=10)
        network = VisualPerceiverForImageClassification(config).to(device, getattr(torch, dtype)).eval()
    else:
        network = load_model(model, device, dtype)
    config = network.config
    Q, size, cfg = config.num_queries, config.image_height_width, config.timm_pretrained_cfg
    data = load_images(default_dataset(), "test")

    results = []
    for batch in batch_size:
        indices = range(0, min(batch, len(data)))
        pixels = normalise(pixels_of_size(data, indices, size), cfg["mean"], cfg["std"])
        pixels = pixels.to(device, getattr(torch, dtype))
        settings: dict[str, dict[str, float]] = {
            f"K = {K}": {"num_active_queries": K} for K in (*(K for K in PAPER_QUERIES if K < Q), Q)
        }
        pairs = {}
        for t in threshold if model is not None else []:
            with torch.inference_mode():
                mean = network(pixels, dqs_threshold=t).active_queries.sum(1).float().mean().item()
            pairs[f"t = {t:g}"] = (mean, f"K = {max(1, round(mean))}")
            settings[f"t = {t:g}"] = {"dqs_threshold": t}
            settings.setdefault(pairs[f"t = {t:g}"][1], {"num_active_queries": max(1, round(mean))})
        for arguments in settings.values():
            milliseconds(network, pixels, **arguments)
        times: dict[str, list[float]] = {name: [] for name in settings}
        for _ in track(range(repetitions), f"batch {batch}", console=Console(stderr=True)):
            for name, arguments in settings.items():
                times[name].append(milliseconds(network, pixels, **arguments))
        full = np.asarray(times[f"K = {Q}"])
        table = Table(title=f"batch {len(indices)}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for header in (
            "setting",
            "mean queries",
            "ms",
            f"relative to K = {Q}",
            "MACs, relative",
            "relative to fixed K",
        ):
            table.add_column(header, justify="right")
        for name, arguments in settings.items():
            mean, fixed = pairs.get(name, (arguments.get("num_active_queries"), None))
            row = {
                "batch_size": len(indices),
                "setting": name,
                "queries": mean,
                "ms": float(np.median(times[name])),
                "relative_time": float(np.median(np.asarray(times[name]) / full)),
                "relative_to_fixed": float(np.median(np.asarray(times[name]) / times[fixed])) if fixed else None,
                "relative_macs": count_macs(config, int(mean)) / count_macs(config, Q) if fixed is None else None,
            }
            results.append(row)
            table.add_row(
                name,
                f"{mean:.1f}",
                f"{row['ms']:.2f}",
                f"{row['relative_time']:.3f}",
                "" if fixed else f"{row['relative_macs']:.3f}",
                f"{row['relative_to_fixed']:.2f} (K = {round(mean)})" if fixed else "",
            )
        console.print(table)
    conditions = measurement_conditions(device, dtype=dtype, model=model or architecture, repetitions=repetitions)
    console.print(conditions_line(conditions), style="dim", highlight=False)
    if json_file:
        write_json(json_file, {"conditions": conditions, "rows": results})


if __name__ == "__main__":
    typer.run(main)
