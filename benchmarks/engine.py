"""Speed of the engine of `optimize_for_inference` compared with PyTorch, and of selection, cascades and int8 in it.

    OMP_NUM_THREADS=1 python benchmarks/engine.py --json engine.json

prints ratios of medians on images of the embedded sample. Each comparison is interleaved in one run.
"""

import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from hf_visual_perceiver.benchmark.timing import interleaved
from hf_visual_perceiver.data.images import load_images, normalise
from hf_visual_perceiver.evaluation.cascade import Cascade
from hf_visual_perceiver.inference.loading import default_dataset, default_model, load_model
from hf_visual_perceiver.inference.onnx_graphs import Sessions, Stage, export_stage
from hf_visual_perceiver.modeling import Budget, count_macs
from hf_visual_perceiver.utils.conditions import measurement_conditions


BUDGETS = (1, 8, 16, 64)
LATENCY_CALLS = 200


def medians(runs: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Median milliseconds of each call, run in turns."""
    seconds = interleaved(runs, repetitions, torch.device("cpu"), progress=False)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def table(title: str, headers: list[str], rows: list[list[Any]]) -> dict[str, Any]:
    """Print a table in markdown, and return it."""
    print(f"\n{title}\n\n| {' | '.join(headers)} |\n|{' ---: |' * len(headers)}")
    for row in rows:
        print(f"| {' | '.join(f'{cell:.3g}' if isinstance(cell, float) else str(cell) for cell in row)} |")
    return {"title": title, "headers": headers, "rows": rows}


def budgets(model: Any, engine: Any, images: torch.Tensor, repetitions: int) -> list[dict[str, Any]]:
    """Time of every budget, eager and with the engine."""
    tables = []
    for batch in (1, 64, 256):
        x, count = images[:batch], 20 * repetitions if batch == 1 else repetitions
        forms = {"eager": model, "engine": engine}
        runs = {(f, K): partial(form, x, num_active_queries=K) for K in BUDGETS for f, form in forms.items()}
        ms = medians({str(name): run for name, run in runs.items()}, count)
        rows = []
        for K in BUDGETS:
            eager, ours, full = (ms[str(key)] for key in (("eager", K), ("engine", K), ("engine", BUDGETS[-1])))
            rows.append([K, eager, ours, ours / eager, ours / full])
        headers = ["K", "eager, ms", "engine, ms", "engine / eager", "engine: K / all"]
        tables.append(table(f"Batch {batch}", headers, rows))
    return tables


def latency(engine: Any, image: torch.Tensor) -> dict[str, Any]:
    """Median and 95th percentile of single calls."""
    rows = []
    for K in BUDGETS:
        ms = []
        for _ in range(LATENCY_CALLS):
            began = time.perf_counter()
            engine(image, num_active_queries=K)
            ms.append(1000 * (time.perf_counter() - began))
        rows.append([K, *map(float, np.percentile(ms, [50, 95]))])
    return table(f"One image, {LATENCY_CALLS} single calls", ["K", "p50, ms", "p95, ms"], rows)


def selection(engine: Any, images: torch.Tensor, repetitions: int) -> list[dict[str, Any]]:
    """Thresholds compared with a fixed K of as many queries, and with all queries."""
    Q, tables = engine.config.num_queries, []
    for batch in (1, 256):
        x, rows = images[:batch], []
        for t in (0.6, 0.8, 0.9, 0.97):
            kept = engine(x, dqs_threshold=t).active_queries.sum(1).float().mean().item()
            K = max(1, round(kept))
            runs = {
                "t": partial(engine, x, dqs_threshold=t),
                "K": partial(engine, x, num_active_queries=K),
                "all": partial(engine, x, num_active_queries=Q),
            }
            ms = medians(runs, 20 * repetitions if batch == 1 else repetitions)
            rows.append([t, kept, ms["t"], ms["t"] / ms["K"], ms["t"] / ms["all"]])
        headers = ["t", "queries", "ms", "to fixed K", "to all queries"]
        tables.append(table(f"Selection, batch {batch}", headers, rows))
    return tables


def cascades(engine: Any, images: torch.Tensor, repetitions: int) -> dict[str, Any]:
    """A cascade compared with a fixed K of equal MACs."""
    config, rows = engine.config, []
    stages = [4, 16, config.num_queries]
    budgets = [Budget(num_active_queries=K) for K in stages]
    costs = np.array(config.count_stages(budgets), dtype=float)
    sure = engine(images, num_active_queries=stages[0]).logits.softmax(-1).amax(-1)
    for share in (0.9, 0.6, 0.3):
        threshold = sure.quantile(1 - share).item()
        cascade = Cascade(engine, budgets, [threshold, threshold])
        mean = float(costs[cascade(images).stage.numpy()].mean())
        K = min(range(1, config.num_queries + 1), key=lambda K: abs(count_macs(config, K) - mean))
        runs = {"cascade": partial(cascade, images), "K": partial(engine, images, num_active_queries=K)}
        ms = medians(runs, repetitions)
        rows.append([threshold, mean / 1e6, K, ms["cascade"], ms["cascade"] / ms["K"]])
    headers = ["threshold", "mean MACs (M)", "K of equal MACs", "ms", "to fixed K"]
    return table(f"Cascade of K = {stages}, batch {len(images)}", headers, rows)


def eight_bits(model: Any, engine: Any, images: torch.Tensor, repetitions: int) -> dict[str, Any]:
    """Linear layers in 8 bits compared with float32."""
    quantised, rows = model.optimize_for_inference(int8=True), []
    for batch, K in itertools.product((1, 64), (8, 64)):
        runs = {
            "float32": partial(engine, images[:batch], num_active_queries=K),
            "int8": partial(quantised, images[:batch], num_active_queries=K),
        }
        ms = medians(runs, 20 * repetitions if batch == 1 else repetitions)
        rows.append([batch, K, ms["float32"], ms["int8"], ms["int8"] / ms["float32"]])
    return table("8 bits", ["batch", "K", "float32, ms", "int8, ms", "int8 / float32"], rows)


def vision_transformer(engine: Any, images: torch.Tensor, repetitions: int) -> dict[str, Any]:
    """All queries compared with timm's ViT of the same width, depth and number of tokens, both in ONNX Runtime."""
    from timm.models.vision_transformer import VisionTransformer

    config, rows = engine.config, []
    height, width = config.image_height_width
    vit = VisionTransformer(
        img_size=(height, width),
        patch_size=config.patch_size,
        num_classes=10,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        class_token=False,
        global_pool="avg",
    ).eval()
    stage = Stage(vit, {"x": images[:2]}, {"x": {0: "images"}}, ("logits",))
    sessions = Sessions({"vit": export_stage(stage)}, dict(vit.named_parameters()))
    for batch in (1, 64):
        x = images[:batch]
        runs = {"engine": partial(engine, x), "ViT": partial(sessions.run, "vit", x=x.numpy())}
        ms = medians(runs, 20 * repetitions if batch == 1 else repetitions)
        rows.append([batch, ms["engine"], ms["ViT"], ms["engine"] / ms["ViT"]])
    return table("All queries beside timm's ViT", ["batch", "engine, ms", "ViT, ms", "engine / ViT"], rows)


def start(name: str) -> dict[str, Any]:
    """Seconds to load and optimise the checkpoint, in a new process, imports not counted."""
    code = (
        "import sys, time, torch, hf_visual_perceiver\n"
        "from hf_visual_perceiver.inference.loading import load_optimized, load_model\n"
        "began = time.perf_counter(); model = load_optimized(sys.argv[1])\n"
        "model(torch.zeros(1, 3, *model.config.image_height_width)); print(time.perf_counter() - began)"
    )
    result = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True)
    return table("Start", ["load, optimise and answer once, s"], [[float(result.stdout.split()[-1])]])


def main(
    model: Annotated[str | None, typer.Option(help="Checkpoint; the bundled one by default.")] = None,
    repetitions: Annotated[
        int, typer.Option(min=1, help="Repetitions of each measurement; 20 times as many for single images.")
    ] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the tables to this JSON file.")] = None,
) -> None:
    """Measure and print."""
    name = model or default_model()
    network = load_model(name)
    engine = network.optimize_for_inference()
    cfg, data = network.config.timm_pretrained_cfg, load_images(default_dataset(), "test")
    images = normalise(data.images[:256], cfg["mean"], cfg["std"])
    with torch.no_grad():
        tables = [
            *budgets(network, engine, images, repetitions),
            latency(engine, images[:1]),
            *selection(engine, images, repetitions),
            cascades(engine, images, repetitions),
            eight_bits(network, engine, images, repetitions),
            vision_transformer(engine, images, repetitions),
            start(name),
        ]
    conditions = measurement_conditions(engine.device, dtype="float32", form="onnxruntime")
    print(f"\n{', '.join(f'{key} {value}' for key, value in conditions.items())}")
    if json_file:
        json_file.write_text(json.dumps({"conditions": conditions, "tables": tables}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
