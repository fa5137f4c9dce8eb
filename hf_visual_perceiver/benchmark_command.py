"""`visual-perceiver benchmark`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from .benchmark import FORMS, benchmark, benchmark_table, plot_benchmark
from .loading import check_dtype, choose_device, default_dataset, default_model, load_model
from .options import DeviceOption, JsonOption, ModelOption, model_label
from .plots import check_picture
from .training.conditions import cpu_computes_in_bf16, measurement_conditions
from .training.data import load_images, normalise, pixels_of_size
from .training.files import check_writable, write_json


def benchmark_command(
    model: ModelOption = None,
    batch_size: Annotated[list[int], typer.Option(help="Repeat for several.")] = [1, 64],  # noqa: B006
    num_active_queries: Annotated[
        list[int] | None, typer.Option(help="K to measure beside all queries; repeat. By default the paper's.")
    ] = None,
    dqs_threshold: Annotated[list[float], typer.Option(help="t to measure; repeat for several.")] = [0.8],  # noqa: B006
    form: Annotated[list[str], typer.Option(help=f"{', '.join(FORMS)}; repeat.")] = ["eager", "optimized"],  # noqa: B006
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32, bfloat16 or float16; repeat. By default float32, and bfloat16 where it is fast."),
    ] = None,
    repetitions: Annotated[int, typer.Option(help="Of all settings.")] = 7,
    device: DeviceOption = "auto",
    plot: Annotated[Path | None, typer.Option(help="Write relative time against MACs to this picture.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Time and memory of a checkpoint on this machine, at every budget and in each form, side by side."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    if plot:
        check_picture(plot)
    for output in filter(None, (plot, json_file)):
        check_writable(output)
    place = choose_device(device)
    fast_bf16 = place != "cpu" or cpu_computes_in_bf16()
    dtypes = dtype or ["float32", *(["bfloat16"] if fast_bf16 else [])]
    for name in dtypes:
        check_dtype(name)
    name = model or default_model()
    network = load_model(name, place)
    for K in num_active_queries or ():
        network.config.operating_point(K)
    cfg, data = network.config.timm_pretrained_cfg, load_images(default_dataset(), "test")
    indices = range(min(max(batch_size), len(data)))
    pixels = normalise(pixels_of_size(data, indices, network.config.image_height_width), cfg["mean"], cfg["std"])
    rows = benchmark(
        network,
        pixels,
        batch_size,
        dqs_threshold,
        form,
        [getattr(torch, name) for name in dtypes],
        repetitions,
        budgets=num_active_queries,
        progress=sys.stderr.isatty(),
    )
    for size in batch_size:
        console.print(benchmark_table([row for row in rows if row.batch_size == size]))
    conditions = measurement_conditions(place, model=model_label(name), repetitions=repetitions)
    console.print(", ".join(f"{key} {value}" for key, value in conditions.items()), style="dim", highlight=False)
    if json_file:
        write_json(json_file, {"conditions": conditions, "rows": [asdict(row) for row in rows]})
    if plot:
        plot_benchmark(rows, plot)
        console.print(f"Plot: {plot}")
