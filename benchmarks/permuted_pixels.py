"""What a fixed permutation of all pixels costs networks that know about grids of pixels, and a Perceiver.

    OMP_NUM_THREADS=1 python benchmarks/permuted_pixels.py --dataset PATH_OR_ID

trains each network on the images as they are and on the images with their pixels permuted, the same permutation in every
image, for the same number of steps and without augmentation (a crop or a flip means nothing to permuted pixels). It prints
accuracy on the validation images, the last 5,000 of training, permuted likewise. A run that exists is continued or taken as
it is, so the same command goes on after a stop.

Perceiver's claim (section 4.1 of Jaegle et al. 2021) is about pixels that are permuted after they got their positions; there
nothing changes, which tests/modeling/test_families.py checks. Here Fourier features come after the permutation: a pixel
gets the position of the place it was moved to. To learned positions one permutation is as good as another.
"""

from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
import typer
from PIL import Image

from hf_visual_perceiver.data.images import ImageDataset, load_images
from hf_visual_perceiver.evaluation.comparison import read_run
from hf_visual_perceiver.modeling import family_of
from hf_visual_perceiver.training.recipe import TIMM, Recipe, recipe_from_dict
from hf_visual_perceiver.training.train import train
from hf_visual_perceiver.utils.conditions import conditions_line, measurement_conditions
from hf_visual_perceiver.utils.console import run_command
from hf_visual_perceiver.utils.files import written_aside
from hf_visual_perceiver.utils.tables import markdown_table


# Two iterations, each of which reads all pixels; D = 96. 29 or 32 channels a pixel.
PERCEIVER = {
    "num_queries": 16,
    "hidden_size": 96,
    "num_attention_heads": 3,
    "num_blocks": 2,
    "num_cross_attends": 2,
    "num_self_attends_per_block": 2,
    "initializer_range": 0.1,
}
PATCHES = {
    "num_queries": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "initializer_range": 0.1,
}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "Perceiver, Fourier positions": (
        "perceiver_nano_32",
        {**PERCEIVER, "num_frequency_bands": 6, "qk_channels": 32},
    ),
    "Perceiver, learned positions": ("perceiver_nano_32", {**PERCEIVER, "inputs": "learned", "stem_channels": 16}),
    "Visual Perceiver, patches of 4": ("visual_perceiver_nano_patch4_32", PATCHES),
    "convolutions": (f"{TIMM}conv_stem_classifier_32", {"widths": [[16], [40], [96]]}),
}
COMMON = {
    "batch_size": 64,
    "learning_rate": 2e-3,
    "warmup_steps": 0.1,
    "weight_decay": 0.05,
    "clip_gradient_norm": 1.0,
    "augmentation": {"random_crop_padding": 0, "horizontal_flip": 0.0},
    "log_every": 50,
    "save_every": 200,
    "tracker": None,
}


def main(
    dataset: Annotated[str, typer.Option(help="CIFAR-10: Hub id or folder of parquet files.")] = "uoft-cs/cifar10",
    output: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/permuted_pixels"),
    steps: Annotated[int, typer.Option(help="Steps of each run, of 64 images.")] = 600,
    validation: Annotated[int, typer.Option(help="Images not to learn from, the last of the training split.")] = 5000,
    seed: Annotated[int, typer.Option(help="Of the permutation and the runs.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Some of the networks; repeat for several.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Stop a run after this time; the command goes on.")] = None,
) -> None:
    """Train with and without the permutation, and compare."""
    datasets.disable_progress_bars()
    if unknown := set(only or []) - set(NETWORKS):
        raise ValueError(f"Expected networks among {'; '.join(NETWORKS)}, got {'; '.join(sorted(unknown))}.")
    permuted = output / f"permuted-seed{seed}"
    if not permuted.is_dir():
        write_permuted(load_images(dataset, "train"), permuted / "train.parquet", seed)
    rows = []
    for name in only or NETWORKS:
        runs = []
        for kind, source in (("plain", dataset), ("permuted", str(permuted))):
            recipe = recipe_of(name, dataset=source, validation=validation, steps=steps, seed=seed)
            folder = output / f"{name.replace(',', '').replace(' ', '_')}-{kind}-seed{seed}"
            if train(recipe, folder, resume=folder.exists(), max_minutes=max_minutes) is None:
                raise SystemExit(f"Stopped in {folder}; the same command goes on.")
            runs.append(read_run(folder))
        plain, moved = (100 * max(run.accuracy.items())[1] for run in runs)
        macs = f"{(runs[0].macs_per_image or 0) / 1e6:.1f}"
        rows.append([name, macs, f"{plain:.2f}", f"{moved:.2f}", f"{moved - plain:+.2f}"])
    print(markdown_table(["network", "MACs (M)", "plain (%)", "permuted (%)", "difference"], rows))
    print(conditions_line(measurement_conditions(steps=steps, batch_size=COMMON["batch_size"], seed=seed)))


def recipe_of(name: str, **values: Any) -> Recipe:
    """The recipe of a network, which trains and validates the full network."""
    architecture, config = NETWORKS[name]
    K = 1
    if not architecture.startswith(TIMM):
        K = len(family_of(architecture).create_config(architecture, num_labels=10, **config).ladder())
    fixed = {"architecture": architecture, "config": config, "budgets": {"schedule": "fixed", "K": K}}
    return recipe_from_dict({**COMMON, **fixed, **values}, source="benchmarks/permuted_pixels.py")


def permute_pixels(images: np.ndarray, seed: int) -> np.ndarray:
    """Move the pixels of all images (n, H, W, 3) by the same permutation."""
    n, height, width, channels = images.shape
    order = np.random.default_rng(seed).permutation(height * width)
    return images.reshape(n, height * width, channels)[:, order].reshape(images.shape)


def write_permuted(data: ImageDataset, file: Path, seed: int) -> None:
    """Write a dataset with permuted pixels as parquet, for the training code to read as any other."""
    if not isinstance(data.images, np.ndarray):
        raise ValueError("Expected images of one size that fit in memory, got others.")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=data.label_names)})
    images = [Image.fromarray(image) for image in permute_pixels(data.images, seed)]
    table = datasets.Dataset.from_dict({"image": images, "label": data.labels}, features=features)
    file.parent.mkdir(parents=True)
    with written_aside(file) as aside:
        table.to_parquet(str(aside))


if __name__ == "__main__":
    run_command(main)
