"""Time at every budget, in every form of the model, beside other networks of the same size.

    python benchmarks/inference.py --plot inference.png --json inference.json
    python benchmarks/inference.py --device cuda --compile-rivals --repetitions 31 --plot inference.png --json inference.json

After a warm-up, every repetition runs all settings of all forms and the rivals once, in turn, on the same images. Ratios are
taken within a repetition, and their medians are printed. By default the weights are random. Time does not depend on them, but the
number of kept queries does: use a trained checkpoint (`--model`) with thresholds, or `--mean-queries` for a given number.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from timm.models.vision_transformer import VisionTransformer
from transformers import PerceiverConfig, PerceiverModel

from hf_visual_perceiver import VisualPerceiverConfig, VisualPerceiverForImageClassification
from hf_visual_perceiver.benchmark.benchmark import FORMS, Rival, benchmark, benchmark_table, plot_benchmark
from hf_visual_perceiver.data.images import load_images, normalise, pixels_of_size
from hf_visual_perceiver.evaluation.paper import QUERIES
from hf_visual_perceiver.inference.loading import choose_device, default_dataset, load_model
from hf_visual_perceiver.modeling import Budget, select_queries
from hf_visual_perceiver.utils.conditions import cpu_computes_in_bf16, measurement_conditions
from hf_visual_perceiver.utils.console import run_command
from hf_visual_perceiver.utils.files import write_json


console = Console(width=160)


def timm_vit(config: VisualPerceiverConfig, drop_path_rate: float = 0.0) -> VisionTransformer:
    """timm's ViT of the same width, depth and number of tokens."""
    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=config.num_labels,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        class_token=False,
        global_pool="avg",
        drop_path_rate=drop_path_rate,
    )


def vit_macs(config: VisualPerceiverConfig) -> int:
    """MACs of `timm_vit` for one image."""
    N, D, M = config.num_patches, config.hidden_size, config.intermediate_size
    blocks = config.num_hidden_layers * (N * (4 * D**2 + 2 * D * M) + 2 * N**2 * D)
    return N * config.num_channels * config.patch_size**2 * D + blocks + D * config.num_labels


def transformers_perceiver(config: VisualPerceiverConfig) -> PerceiverModel:
    """transformers' Perceiver with as many latents of the same width and as many blocks, reading the same patches."""
    return PerceiverModel(
        PerceiverConfig(
            num_latents=config.num_queries,
            d_latents=config.hidden_size,
            d_model=config.num_channels * config.patch_size**2,
            num_blocks=1,
            num_self_attends_per_block=config.num_hidden_layers,
            num_self_attention_heads=config.num_attention_heads,
            num_cross_attention_heads=1,
            self_attention_widening_factor=config.intermediate_size // config.hidden_size,
            cross_attention_widening_factor=config.intermediate_size // config.hidden_size,
        )
    )


def rivals_of(
    config: VisualPerceiverConfig, device: str, dtype: torch.dtype, compile_mode: str | None = None
) -> dict[str, Rival]:
    """The other networks in a dtype, by name; with a mode of torch.compile, also the compiled ViT."""
    vit = timm_vit(config).to(device, dtype).eval()
    perceiver = transformers_perceiver(config).to(device, dtype).eval()

    def read(pixels: torch.Tensor) -> torch.Tensor:
        patches = torch.nn.functional.unfold(pixels, config.patch_size, stride=config.patch_size)
        return perceiver(patches.transpose(1, 2)).last_hidden_state

    runs = {"timm's ViT, eager": (vit, vit_macs(config)), "transformers' Perceiver, eager": (read, None)}
    if compile_mode:
        compiled = torch.compile(vit, mode=compile_mode)

        def replay(pixels: torch.Tensor) -> torch.Tensor:
            torch.compiler.cudagraph_mark_step_begin()  # or CUDA graphs are recorded for each order of networks
            return compiled(pixels)

        runs["timm's ViT, compiled"] = (replay, vit_macs(config))
    suffix = str(dtype).removeprefix("torch.")
    return {f"{name} {suffix}": Rival(run, macs, dtype) for name, (run, macs) in runs.items()}


@torch.inference_mode()
def sharpened(model: VisualPerceiverForImageClassification) -> VisualPerceiverForImageClassification:
    """Sharpen the cross-attention as training does; untrained queries read nearly the same, and selection drops them."""
    block, D = model.visual_perceiver.cross_attention, model.config.hidden_size
    for linear in (block.query, block.key_value):
        linear.weight.normal_(std=(4 / D) ** 0.5)
    return model


@torch.inference_mode()
def threshold_for(model: VisualPerceiverForImageClassification, pixels: torch.Tensor, mean: float) -> float:
    """Find the t that keeps a given mean number of queries on these images, by bisection."""
    y = model.visual_perceiver.read(pixels.to(model.device), model.config.num_queries)
    low, high = -1.0, 1.0
    for _ in range(30):
        t = (low + high) / 2
        few = select_queries(y, t, model.config.dqs_reference).sum(1).float().mean() < mean
        low, high = (t, high) if few else (low, t)
    return round(t, 4)


def main(
    model: Annotated[
        str | None, typer.Option(help="Checkpoint; by default --architecture with random weights.")
    ] = None,
    architecture: Annotated[str, typer.Option(help="timm name.")] = "visual_perceiver_tiny_patch4_32",
    batch_size: Annotated[list[int], typer.Option(help="Repeat for several.")] = [1, 8, 64, 512],  # noqa: B006
    num_active_queries: Annotated[
        list[int] | None, typer.Option(help="K, beside all queries; by default the paper's values.")
    ] = None,
    threshold: Annotated[list[float], typer.Option(help="t, with --model; repeat for several.")] = [0.6, 0.8, 0.9],  # noqa: B006
    mean_queries: Annotated[
        list[float] | None,
        typer.Option(help="Also select with the t that keeps this mean number of queries; repeat for several."),
    ] = None,
    form: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(FORMS)}; repeat for several. By default eager, optimized, and grouped on a GPU."
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="Repeat for several; by default float32, and bfloat16 where it is fast.")
    ] = None,
    compile_rivals: Annotated[bool, typer.Option(help="Also time the compiled ViT.")] = False,
    repetitions: Annotated[int, typer.Option(help="Of all settings.")] = 7,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    plot: Annotated[
        Path | None, typer.Option(help="Plot relative time against MACs to this .png, .svg or .pdf.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")] = None,
) -> None:
    """Print times relative to all queries; also selection relative to a fixed K, and each form relative to eager."""
    device = choose_device(device)
    names = dtype or ["float32", *(["bfloat16"] if device != "cpu" or cpu_computes_in_bf16() else [])]
    dtypes = [getattr(torch, name) for name in names]
    torch.manual_seed(0)
    if model is None:
        config = VisualPerceiverConfig.from_architecture(architecture, num_labels=10)
        network = sharpened(VisualPerceiverForImageClassification(config)).to(device).eval()
    else:
        network = load_model(model, device)
    config, data = network.config, load_images(default_dataset(), "test")
    cfg, indices = config.timm_pretrained_cfg, range(min(max(batch_size), len(data)))
    pixels = normalise(pixels_of_size(data, indices, config.image_height_width), cfg["mean"], cfg["std"])
    thresholds = [*(threshold if model else ()), *(threshold_for(network, pixels[:256], k) for k in mean_queries or ())]
    forms = form or ["eager", "optimized", *(["grouped"] if device != "cpu" and thresholds else [])]
    # On GPUs the mode of our optimised form, which replays CUDA graphs.
    mode = None if not compile_rivals else "default" if device == "cpu" else "reduce-overhead"
    rivals = {name: rival for kind in dtypes for name, rival in rivals_of(config, device, kind, mode).items()}
    fixed = [Budget(num_active_queries=K) for K in num_active_queries or QUERIES if config.num_queries > K]
    rows = benchmark(
        network,
        pixels,
        batch_size,
        [*fixed, *(Budget(dqs_threshold=t) for t in thresholds)],
        forms,
        dtypes,
        repetitions,
        rivals,
    )
    for size in batch_size:
        console.print(benchmark_table([row for row in rows if row.batch_size == size], config.unit))
    conditions = measurement_conditions(
        device, model=Path(model).name if model else architecture, repetitions=repetitions
    )
    console.print(", ".join(f"{key} {value}" for key, value in conditions.items()), highlight=False)
    if json_file:
        write_json(json_file, {"conditions": conditions, "rows": [asdict(row) for row in rows]})
    if plot:
        plot_benchmark(rows, plot)


if __name__ == "__main__":
    run_command(main)
