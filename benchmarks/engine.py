"""What the engine of `optimize_for_inference` gains over PyTorch, and what selection, cascades and int8 gain in it.

    OMP_NUM_THREADS=1 python benchmarks/engine.py [CHECKPOINT...] --json engine.json

prints medians and their ratios; the rows of a comparison take turns, on images of the embedded sample.
"""

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
import timm
import torch
import typer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from hf_visual_perceiver import bundled_checkpoint
from hf_visual_perceiver.benchmark.timing import interleaved
from hf_visual_perceiver.data.images import load_images, normalise
from hf_visual_perceiver.inference.cascade import Cascade
from hf_visual_perceiver.inference.loading import default_dataset, load_model
from hf_visual_perceiver.inference.onnx_graphs import Sessions, Stage, export_stage
from hf_visual_perceiver.modeling import Budget, count_macs
from hf_visual_perceiver.utils.conditions import measurement_conditions
from hf_visual_perceiver.utils.tables import markdown_table


THRESHOLDS = (0.6, 0.8, 0.9, 0.97)
LATENCY_CALLS = 200


class Measurement:
    """One checkpoint, eager and in the engine, with the images to time it on."""

    def __init__(self, name: str, repetitions: int):
        self.name, self.repetitions = name, repetitions
        self.model = load_model(name)
        self.engine = self.model.optimize_for_inference()
        self.config = self.model.config
        self.Q = self.config.num_queries
        cfg, data = self.config.timm_pretrained_cfg, load_images(default_dataset(), "test")
        self.images = normalise(data.images[:256], cfg["mean"], cfg["std"])
        self.tables: list[dict[str, Any]] = []

    def medians(self, batch: int, **runs: Callable[[torch.Tensor], Any]) -> dict[str, float]:
        """Median milliseconds of each run on the first images, in turn; single images are timed 20 times as often."""
        calls = {name: partial(run, self.images[:batch]) for name, run in runs.items()}
        count = self.repetitions * (20 if batch == 1 else 1)
        times = interleaved(calls, count, torch.device("cpu"), progress=False)
        return {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}

    def table(self, title: str, headers: list[str], rows: list[list[float]]) -> None:
        """Print a table and keep it."""
        print(f"\n**{Path(self.name).name}: {title}**\n")
        print(markdown_table(headers, [[f"{cell:.3g}" for cell in row] for row in rows], left=0), flush=True)
        self.tables.append({"model": Path(self.name).name, "title": title, "headers": headers, "rows": rows})

    def budgets(self) -> None:
        """Every budget, eager and in the engine, and the spread of single calls."""
        for batch in (1, 64, 256):
            forms = {"eager": self.model, "engine": self.engine}
            runs = {f"{f} {K}": partial(form, num_active_queries=K) for K in self.ladder for f, form in forms.items()}
            ms, rows = self.medians(batch, **runs), []
            for K in self.ladder:
                eager, ours, full = ms[f"eager {K}"], ms[f"engine {K}"], ms[f"engine {self.Q}"]
                rows.append([K, eager, ours, ours / eager, ours / full])
            headers = ["K", "eager, ms", "engine, ms", "engine / eager", "engine: K / all"]
            self.table(f"batch {batch}", headers, rows)
        rows = []
        for K in self.ladder:
            ms = []
            for _ in range(LATENCY_CALLS):
                began = time.perf_counter()
                self.engine(self.images[:1], num_active_queries=K)
                ms.append(1000 * (time.perf_counter() - began))
            rows.append([K, *map(float, np.percentile(ms, [50, 95]))])
        self.table(f"one image, {LATENCY_CALLS} single calls", ["K", "p50, ms", "p95, ms"], rows)

    @property
    def ladder(self) -> tuple[int, ...]:
        """The budgets that are timed."""
        return (1, 8, 16, self.Q)

    def selection(self) -> None:
        """Thresholds against a fixed K of the same number of queries, and against all queries."""
        for batch in (1, 256):
            rows = []
            for t in THRESHOLDS:
                selected = partial(self.engine, dqs_threshold=t)
                kept = selected(self.images[:batch]).active_queries.sum(1).float().mean().item()
                fixed = partial(self.engine, num_active_queries=max(1, round(kept)))
                ms = self.medians(batch, t=selected, K=fixed, all=self.engine)
                rows.append([t, kept, ms["t"], ms["t"] / ms["K"], ms["t"] / ms["all"]])
            self.table(f"selection, batch {batch}", ["t", "queries", "ms", "to fixed K", "to all queries"], rows)

    def cascades(self) -> None:
        """A cascade against the fixed K whose cost is nearest, at their time for as many multiply-accumulates."""
        stages, rows = [self.Q // 16, self.Q // 4, self.Q], []
        budgets = [Budget(num_active_queries=K) for K in stages]
        costs = np.array(self.config.count_stages(budgets), dtype=float)
        sure = self.engine(self.images, num_active_queries=stages[0]).logits.softmax(-1).amax(-1)
        for share in (0.9, 0.6, 0.3):
            threshold = sure.quantile(1 - share).item()
            cascade = Cascade(self.engine, budgets, [threshold, threshold])
            mean = float(costs[cascade(self.images).stage.numpy()].mean())
            K = min(range(1, self.Q + 1), key=lambda K: abs(count_macs(self.config, K) - mean))
            ms = self.medians(256, cascade=cascade, K=partial(self.engine, num_active_queries=K))
            times = [ms["cascade"] / mean, ms["K"] / count_macs(self.config, K)]
            rows.append([threshold, mean / 1e6, K, ms["cascade"], ms["cascade"] / ms["K"], times[0] / times[1]])
        headers = ["threshold", "mean MACs (M)", "K of that cost", "ms", "to fixed K", "to fixed K, per MAC"]
        self.table(f"cascade of K = {stages}, batch 256", headers, rows)

    def int8(self) -> None:
        """Linear layers in int8 against float32."""
        quantised, rows = self.model.optimize_for_inference(int8=True), []
        for batch in (1, 64):
            for K in (8, self.Q):
                forms = {"float32": self.engine, "int8": quantised}
                ms = self.medians(batch, **{f: partial(form, num_active_queries=K) for f, form in forms.items()})
                rows.append([batch, K, ms["float32"], ms["int8"], ms["int8"] / ms["float32"]])
        self.table("int8", ["batch", "K", "float32, ms", "int8, ms", "int8 / float32"], rows)

    def rivals(self) -> None:
        """All queries, and K = 8, beside static networks in ONNX Runtime: timm's ViT of the same sizes, and ResNet-20."""
        rows, height_width = [], self.config.image_height_width
        vit = VisionTransformer(
            img_size=height_width,
            patch_size=self.config.patch_size,
            num_classes=10,
            embed_dim=self.config.hidden_size,
            depth=self.config.num_hidden_layers,
            num_heads=self.config.num_attention_heads,
            mlp_ratio=self.config.intermediate_size / self.config.hidden_size,
            class_token=False,
            global_pool="avg",
        )
        statics = {"ViT": self.graph(vit), "ResNet-20": self.graph(timm.create_model("cifar_resnet20"))}
        for batch in (1, 64, 256):
            ms = self.medians(batch, eight=partial(self.engine, num_active_queries=8), engine=self.engine, **statics)
            rows.append([batch, *ms.values(), ms["engine"] / ms["ViT"], ms["engine"] / ms["ResNet-20"]])
        headers = [
            "batch",
            "engine, K = 8, ms",
            "engine, all, ms",
            "ViT, ms",
            "ResNet-20, ms",
            "all / ViT",
            "all / ResNet",
        ]
        self.table("static networks in ONNX Runtime", headers, rows)

    def graph(self, network: nn.Module) -> Callable[[torch.Tensor], Any]:
        """A static network in ONNX Runtime."""
        network.eval()
        stage = Stage(network, {"x": self.images[:2]}, {"x": {0: "images"}}, ("logits",))
        weights = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        sessions = Sessions({"static": export_stage(stage)}, weights)
        return lambda x: sessions.run("static", x=x.numpy())

    def start(self) -> None:
        """Seconds to load and optimise the checkpoint, in a new process, imports not counted."""
        code = (
            "import sys, time, torch, hf_visual_perceiver\n"
            "from hf_visual_perceiver.inference.loading import load_optimized\n"
            "began = time.perf_counter(); model = load_optimized(sys.argv[1])\n"
            "model(torch.zeros(1, 3, *model.config.image_height_width)); print(time.perf_counter() - began)"
        )
        result = subprocess.run([sys.executable, "-c", code, self.name], capture_output=True, text=True, check=True)
        self.table("start", ["load, optimise and answer once, s"], [[float(result.stdout.split()[-1])]])


def main(
    checkpoints: Annotated[list[str] | None, typer.Argument(help="Both bundled ones by default.")] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Of each run; single images get 20 times as many.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the tables here.")] = None,
) -> None:
    """Measure and print."""
    names = [bundled_checkpoint(), bundled_checkpoint("visual_perceiver_nano_cifar10")]
    tables = []
    for name in checkpoints or names:
        measured = Measurement(str(name), repetitions)
        with torch.no_grad():
            for question in ("budgets", "selection", "cascades", "int8", "rivals", "start"):
                getattr(measured, question)()
        tables += measured.tables
    conditions = measurement_conditions("cpu", dtype="float32", form="onnxruntime")
    print(f"\n{', '.join(f'{key} {value}' for key, value in conditions.items())}")
    if json_file:
        json_file.write_text(json.dumps({"conditions": conditions, "tables": tables}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
