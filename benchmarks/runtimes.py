"""Runtimes side by side at several K: PyTorch in its forms, torch.export, ONNX Runtime in float32 and int8, OpenVINO.

    python benchmarks/runtimes.py --json runtimes.json --plot runtimes.png

Exports the checkpoint. After a warm-up, each repetition runs every runtime once at every K, in turn, on the same images.
Medians are printed, and ratios to eager PyTorch within a repetition. Exported graphs compute the cosines of selection even
if t = 1 keeps everything; PyTorch's forms do not. Runtimes that are not installed are listed and skipped. All runtimes use as
many threads as torch (OMP_NUM_THREADS).
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hf_visual_perceiver.data.images import load_images, normalise, pixels_of_size
from hf_visual_perceiver.evaluation.plots import check_picture, save_figure
from hf_visual_perceiver.export.comparison import runtime_versions
from hf_visual_perceiver.export.graph import export_onnx, quantise, trace
from hf_visual_perceiver.export.runtime import OnnxClassifier, numpy_inputs
from hf_visual_perceiver.inference.loading import default_dataset, default_model, load_model
from hf_visual_perceiver.modeling import VisualPerceiverForImageClassification
from hf_visual_perceiver.utils.conditions import conditions_line, measurement_conditions
from hf_visual_perceiver.utils.console import run_command
from hf_visual_perceiver.utils.extras import require_extra
from hf_visual_perceiver.utils.files import check_writable, write_json


console = Console(width=120)
messages = Console(stderr=True)

Forward = Callable[[torch.Tensor, int], torch.Tensor]  # pixels, K -> logits
EAGER = "eager"


def pytorch_runtimes(model: VisualPerceiverForImageClassification, compile_model: bool) -> dict[str, Forward]:
    """PyTorch's own forms."""

    def knobs(K: int) -> dict[str, Any]:
        return model.config.resolve(num_active_queries=K)

    runtimes: dict[str, Forward] = {EAGER: lambda x, K: model(x, **knobs(K)).logits}
    fast = model.optimize_for_inference()
    runtimes["optimised"] = lambda x, K: fast(x, **knobs(K)).logits
    if compile_model:
        compiled = torch.compile(model)
        runtimes["compile"] = lambda x, K: compiled(x, **knobs(K)).logits
    module = trace(model).module()
    runtimes["torch.export"] = lambda x, K: module(x, torch.tensor(1.0), torch.tensor(K))[0]
    return runtimes


def knobs(K: int) -> dict[str, float]:
    """The inputs of a graph for the first K queries."""
    return {"dqs_threshold": 1.0, "num_active_queries": K}


def onnx_runtimes(path: Path, int8: Path) -> dict[str, Forward]:
    """The exported files in ONNX Runtime."""
    float32, quantised = OnnxClassifier(path), OnnxClassifier(int8)
    return {
        "ONNX Runtime": lambda x, K: torch.from_numpy(float32.run(x, knobs(K))[0]),
        "ONNX Runtime, int8": lambda x, K: torch.from_numpy(quantised.run(x, knobs(K))[0]),
    }


def openvino_runtime(path: Path) -> dict[str, Forward]:
    """The exported file in OpenVINO."""
    require_openvino()
    import openvino

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(openvino.Core().read_model(path), "CPU", settings)
    return {"OpenVINO": lambda x, K: torch.from_numpy(compiled(numpy_inputs(x, knobs(K)))["logits"])}


def require_openvino() -> None:
    """Raise a `ValueError` without OpenVINO."""
    if "openvino" not in runtime_versions():
        raise ValueError("OpenVINO is not installed (pip install openvino).")


@torch.inference_mode()
def milliseconds(forward: Forward, pixels: torch.Tensor, K: int) -> float:
    """Time of one forward."""
    began = time.perf_counter()
    forward(pixels, K)
    return 1000 * (time.perf_counter() - began)


def main(
    model: Annotated[str | None, typer.Option(help="Checkpoint; by default the bundled one.")] = None,
    num_active_queries: Annotated[list[int], typer.Option(help="K; repeat for several.")] = [8, 16, 32, 64],  # noqa: B006
    batch_size: Annotated[list[int], typer.Option(help="Repeat for several.")] = [1, 64],  # noqa: B006
    repetitions: Annotated[int, typer.Option(min=1, help="Number of repetitions of all settings.")] = 15,
    compile_model: Annotated[
        bool, typer.Option("--compile/--no-compile", help="torch.compile needs a C++ compiler.")
    ] = True,
    plot: Annotated[Path | None, typer.Option(help="Write times to this .png, .svg or .pdf.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")] = None,
) -> None:
    """Print milliseconds of a batch by runtime and K."""
    if plot:
        check_picture(plot)
    for output in filter(None, (plot, json_file)):
        check_writable(output)
    network = load_model(model or default_model())
    for K in num_active_queries:
        network.config.resolve(num_active_queries=K)
    cfg, data = network.config.timm_pretrained_cfg, load_images(default_dataset(), "test")
    runtimes, left_out = pytorch_runtimes(network, compile_model), []
    with tempfile.TemporaryDirectory() as folder:
        path, int8 = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        try:
            require_extra("export")
            with messages.status("exporting"):
                export_onnx(network, path)
                quantise(path, int8)
            runtimes |= onnx_runtimes(path, int8)
            runtimes |= openvino_runtime(path)
        except ValueError as error:
            left_out.append(str(error))
        rows = []
        for batch in batch_size:
            indices = range(0, min(batch, len(data)))
            pixels = normalise(
                pixels_of_size(data, indices, network.config.image_height_width), cfg["mean"], cfg["std"]
            )
            for name, forward in list(runtimes.items()):
                try:
                    warm_up(name, forward, network, pixels, num_active_queries)
                except RuntimeError as error:  # no C++ compiler, an operation that a runtime lacks
                    left_out.append(f"{name} fails: {str(error).strip().splitlines()[0]}")
                    del runtimes[name]
            times: dict[tuple[str, int], list[float]] = {(name, K): [] for K in num_active_queries for name in runtimes}
            for _ in track(
                range(repetitions), f"batch {len(indices)}", console=messages, disable=not messages.is_terminal
            ):
                for name, K in times:
                    times[name, K].append(milliseconds(runtimes[name], pixels, K))
            for (name, K), values in times.items():
                ratio = np.asarray(values) / times[EAGER, K]
                rows.append(
                    {
                        "batch_size": len(indices),
                        "runtime": name,
                        "num_active_queries": K,
                        "ms": float(np.median(values)),
                        "relative_to_eager": float(np.median(ratio)),
                    }
                )
            console.print(times_table(rows, len(indices), num_active_queries))
    for message in dict.fromkeys(left_out):
        console.print(f"Skipped: {message}", markup=False, highlight=False)
    conditions = measurement_conditions(
        "cpu", dtype="float32", model=Path(model).name if model else Path(default_model()).name, repetitions=repetitions
    )
    conditions |= runtime_versions()
    console.print(conditions_line(conditions), style="dim", highlight=False)
    if json_file:
        write_json(json_file, {"conditions": conditions, "left_out": left_out, "rows": rows})
    if plot:
        plot_times(rows, conditions, plot)


@torch.inference_mode()
def warm_up(
    name: str, forward: Forward, model: VisualPerceiverForImageClassification, pixels: torch.Tensor, budgets: list[int]
) -> None:
    """Run a runtime once at every K, and check its logits.

    Raises:
        RuntimeError: If its logits differ from those of eager PyTorch.
    """
    for K in budgets:
        expected = model(pixels, **model.config.resolve(num_active_queries=K)).logits
        difference = (forward(pixels, K) - expected).abs().max().item()
        if "int8" not in name and difference > 1e-3 * max(1.0, expected.abs().max().item()):
            raise RuntimeError(f"its logits differ from eager PyTorch's by {difference:.2g} at K = {K}")


def times_table(rows: list[dict], batch: int, budgets: list[int]) -> Table:
    """Milliseconds by runtime and K, and in brackets relative to eager PyTorch."""
    table = Table(
        title=f"batch {batch}: ms (relative to eager)", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("runtime")
    for K in budgets:
        table.add_column(f"K = {K}", justify="right")
    here = {(row["runtime"], row["num_active_queries"]): row for row in rows if row["batch_size"] == batch}
    for name in dict.fromkeys(name for name, _ in here):
        cells = (here[name, K] for K in budgets)
        table.add_row(name, *(f"{cell['ms']:.2f} ({cell['relative_to_eager']:.2f})" for cell in cells))
    return table


def plot_times(rows: list[dict], conditions: dict, path: Path) -> None:
    """Time against K, one panel for each batch size, one curve for each runtime."""
    batches = list(dict.fromkeys(row["batch_size"] for row in rows))
    names = list(dict.fromkeys(row["runtime"] for row in rows))
    figure = Figure(figsize=(4.5 * len(batches) + 1.5, 4), layout="constrained")
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    for axes, batch in zip(panels, batches, strict=True):
        for name, marker in zip(names, "osv^D*P", strict=False):
            points = [row for row in rows if (row["batch_size"], row["runtime"]) == (batch, name)]
            if points:
                axes.plot(
                    [p["num_active_queries"] for p in points], [p["ms"] for p in points], marker=marker, label=name
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({row["num_active_queries"] for row in rows})
        axes.set_xticks(ticks, map(str, ticks))
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.tick_params(axis="y", which="minor", labelsize=7)
        axes.set_xlabel("queries K")
        axes.set_ylabel("ms for the batch")
        axes.set_title(f"batch {batch}", fontsize=10)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(f"{conditions['model']}, threads: {conditions['threads']}\n{conditions['hardware']}", fontsize=9)
    save_figure(figure, path)


if __name__ == "__main__":
    run_command(main)
