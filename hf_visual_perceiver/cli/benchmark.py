"""`visual-perceiver benchmark`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hf_visual_perceiver.cli.options import (
    BudgetOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    ModelOption,
    chosen_model,
    model_label,
    output_console,
    parsed_budgets,
    picture_option,
    write_result,
)
from hf_visual_perceiver.utils.choices import FORMS, check_dtype


def benchmark_command(
    checkpoint: ModelArgument = None,
    model: ModelOption = None,
    batch_size: Annotated[list[int], typer.Option(help="Batch size; repeat for several.")] = [1, 64],  # noqa: B006
    budget: BudgetOption = None,
    form: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(FORMS)}; repeat for several. By default eager, and optimized if available."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="float32, bfloat16 or float16; repeat for several. By default float32, and bfloat16 where it is fast."
        ),
    ] = None,
    timm: Annotated[
        list[str] | None,
        typer.Option(help="Also time this timm classifier, with random weights; repeat for several."),
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Number of timed repetitions of each setting.")] = 7,
    single_calls: Annotated[
        int, typer.Option(min=1, help="Number of repetitions at batch size 1, for the median and 95th percentile.")
    ] = 200,
    device: DeviceOption = "auto",
    plot: Annotated[Path | None, picture_option("Plot relative time against MACs to this .png, .svg or .pdf.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Measure a checkpoint's time and memory on this machine, at every budget and in each form, side by side."""
    import torch

    from hf_visual_perceiver.benchmark.benchmark import benchmark, benchmark_table, plot_benchmark, timm_rival
    from hf_visual_perceiver.data.images import load_images, normalise, pixels_of_size
    from hf_visual_perceiver.inference.loading import choose_device, default_dataset, load_model
    from hf_visual_perceiver.utils.conditions import cpu_computes_in_bf16, measurement_conditions

    console = output_console(json_file, width=170)
    place = choose_device(device)
    fast_bf16 = place != "cpu" or cpu_computes_in_bf16()
    dtypes = dtype or ["float32", *(["bfloat16"] if fast_bf16 else [])]
    for name in dtypes:
        check_dtype(name)
    name = chosen_model(checkpoint, model)
    network = load_model(name, place)
    config = network.config
    adaptive = config.adaptive_budgets()
    budgets = parsed_budgets(config, budget) or [*config.budgets(), *adaptive[len(adaptive) // 2 :][:1]]
    forms = form or ["eager", *(["optimized"] if hasattr(network, "optimize_for_inference") else [])]
    rivals = {
        f"timm's {rival}, eager {dtypes[0]}": timm_rival(
            rival, network.config, network.device, getattr(torch, dtypes[0])
        )
        for rival in timm or ()
    }
    cfg, data = network.config.timm_pretrained_cfg, load_images(default_dataset(), "test")
    indices = range(min(max(batch_size), len(data)))
    pixels = normalise(pixels_of_size(data, indices, network.config.image_height_width), cfg["mean"], cfg["std"])
    rows = benchmark(
        network,
        pixels,
        batch_size,
        budgets,
        forms,
        [getattr(torch, name) for name in dtypes],
        repetitions,
        rivals,
        single_calls=single_calls,
    )
    for size in batch_size:
        console.print(benchmark_table([row for row in rows if row.batch_size == size], config.unit))
    counts = {"repetitions": repetitions, **({"single_calls": single_calls} if 1 in batch_size else {})}
    conditions = measurement_conditions(place, model=model_label(name), **counts)
    console.print(", ".join(f"{key} {value}" for key, value in conditions.items()), style="dim", highlight=False)
    write_result(json_file, {"conditions": conditions, "rows": [asdict(row) for row in rows]})
    if plot:
        plot_benchmark(rows, plot)
        console.print(f"Plot: {plot}")
