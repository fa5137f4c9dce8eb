"""Perceiver IO beyond classes: it paints masked patches of an image, one output query for the position of each.

    OMP_NUM_THREADS=1 python benchmarks/masked_patches.py --dataset PATH_OR_ID --picture docs/masked_patches.png

Latents read the visible pixels alone, each with its Fourier features. A query for each masked patch is a linear map of the
Fourier features of the patch's place; what it reads from the latents becomes the patch's pixels by another linear map. The
network learns from the mean squared error of the normalised pixels. Printed is that error on the last 5,000 training images,
which it does not learn from, beside two guesses that learn nothing: the mean colour of the image's visible pixels, and for
each pixel the visible one that is nearest.
"""

import time
from pathlib import Path
from typing import Annotated

import datasets
import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from torch import nn

from hf_visual_perceiver.data.images import BatchOrder, ImageDataset, load_images, normalise
from hf_visual_perceiver.evaluation.plots import save_figure
from hf_visual_perceiver.inference.loading import default_dataset
from hf_visual_perceiver.modeling import IterativePerceiverConfig, IterativePerceiverModel
from hf_visual_perceiver.modeling.elastic import CIFAR_STATISTICS
from hf_visual_perceiver.modeling.modeling_iterative_perceiver import fourier_features
from hf_visual_perceiver.utils.conditions import conditions_line, measurement_conditions
from hf_visual_perceiver.utils.console import run_command
from hf_visual_perceiver.utils.files import check_picture, check_writable
from hf_visual_perceiver.utils.tables import markdown_table


MEAN, STD = CIFAR_STATISTICS["mean"], CIFAR_STATISTICS["std"]
CONFIG = {
    "decoder_type": "query",
    "num_frequency_bands": 16,
    "qk_channels": 64,
    "num_queries": 48,
    "hidden_size": 128,
    "num_blocks": 1,
    "num_self_attends_per_block": 3,
    "num_cross_attends": 1,
    "initializer_range": 0.1,
}


def patches_of(images: torch.Tensor, side: int) -> torch.Tensor:
    """(B, C, S, S) -> (B, P, side^2 C), from the top left, row by row."""
    return nn.functional.unfold(images, side, stride=side).transpose(1, 2)


def images_of(patches: torch.Tensor, side: int, size: int) -> torch.Tensor:
    """The inverse of `patches_of`."""
    return nn.functional.fold(patches.transpose(1, 2), size, side, stride=side)


class MaskedPatches(nn.Module):
    """A Perceiver IO that reconstructs patches from the visible pixels.

    Args:
        config: Config of the Perceiver, with `decoder_type` "query" and Fourier features.
        patch_size: Pixels of a patch's side.

    Raises:
        ValueError: If patches do not fit into the images, or there is no decoder.
    """

    def __init__(self, config: IterativePerceiverConfig, patch_size: int = 4):
        super().__init__()
        if config.image_size % patch_size:
            raise ValueError(f"Expected a patch size that divides {config.image_size}, got {patch_size}.")
        if config.decoder_type != "query":
            raise ValueError(f"Expected `decoder_type` 'query', got {config.decoder_type!r}.")
        self.perceiver, self.patch_size = IterativePerceiverModel(config), patch_size
        grid, bands = config.image_size // patch_size, config.num_frequency_bands
        self.register_buffer("places", fourier_features(grid, bands, grid))  # (P, 2 (2 K + 1))
        pixels = torch.arange(config.image_size**2, dtype=torch.float32).view(1, 1, config.image_size, -1)
        self.register_buffer("pixels", patches_of(pixels, patch_size)[0].long())  # (P, pixels of a patch)
        self.query = nn.Linear(self.places.shape[1], config.hidden_size)
        self.paint = nn.Linear(config.hidden_size, config.num_channels * patch_size**2)

    def forward(self, images: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Paint masked patches: images (B, C, S, S) and (B, n) patches of each -> (B, n, side^2 C).

        Raises:
            ValueError: If `masked` is not of this shape, or leaves no patch visible.
        """
        B, P = len(images), len(self.places)
        if masked.ndim != 2 or len(masked) != B or not 1 <= masked.shape[1] < P:
            raise ValueError(f"Expected the masked patches as ({B}, 1 to {P - 1}), got {tuple(masked.shape)}.")
        visible = self.pixels[complement(masked, P)].flatten(1)  # (B, m)
        tokens = self.perceiver.tokens(images)
        seen = tokens.gather(1, visible[:, :, None].expand(-1, -1, tokens.shape[2]))
        latents = self.perceiver.read(seen, **self.perceiver.config.resolve())
        return self.paint(self.perceiver.decode(latents, self.query(self.places)[masked]))


def complement(chosen: torch.Tensor, count: int) -> torch.Tensor:
    """The others of `count`, ascending: (B, n) -> (B, count - n)."""
    rest = torch.ones(len(chosen), count, dtype=torch.bool).scatter(1, chosen, False)
    return rest.nonzero()[:, 1].view(len(chosen), -1)


def draw_masks(count: int, patches: int, share: float, *key: int) -> torch.Tensor:
    """(count, n) patches to mask in each image: the same share of all, at random."""
    masked = round(share * patches)
    if not 1 <= masked < patches:
        raise ValueError(f"Expected a share of masked patches that leaves some of {patches} on each side, got {share}.")
    order = np.random.default_rng(key).random((count, patches)).argsort(1)
    return torch.from_numpy(order[:, :masked])


def chosen_patches(patches: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """(B, P, c) and (B, n) -> (B, n, c)."""
    return patches.gather(1, chosen[:, :, None].expand(-1, -1, patches.shape[2]))


def train(
    model: MaskedPatches, data: ImageDataset, steps: int, batch_size: int, share: float, seed: int
) -> list[float]:
    """Train on random masks, with mirrored images in every other epoch; returns the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    order = BatchOrder(len(data), batch_size, seed, last_step=steps)
    losses: list[float] = []
    shown = time.monotonic()
    for step, keys in enumerate(order):
        images = normalise(data.images[[index for _, _, index in keys]], MEAN, STD)
        images = images.flip(3) if keys[0][1] % 2 else images
        masked = draw_masks(len(images), len(model.places), share, seed, step)
        loss = nn.functional.mse_loss(
            model(images, masked), chosen_patches(patches_of(images, model.patch_size), masked)
        )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
        if time.monotonic() - shown > 30:
            shown = time.monotonic()
            print(f"step {step + 1}/{steps}  loss {np.mean(losses[-50:]):.4f}", flush=True)
    return losses


def guesses(images: torch.Tensor, masked: torch.Tensor, model: MaskedPatches) -> dict[str, torch.Tensor]:
    """What needs no learning, as patches (B, n, side^2 C): the mean visible colour, and the nearest visible pixel."""
    B, C, S, _ = images.shape
    visible, hidden = (model.pixels[chosen].flatten(1) for chosen in (complement(masked, len(model.places)), masked))
    colours = images.flatten(2)  # (B, C, pixels)
    seen = colours.gather(2, visible[:, None].expand(-1, C, -1))
    axis = torch.arange(S, dtype=torch.float32)
    places = torch.cartesian_prod(axis, axis)
    painted = {"mean colour": colours.clone(), "nearest visible pixel": colours.clone()}
    nearest = torch.stack([visible[i, torch.cdist(places[hidden[i]], places[visible[i]]).argmin(1)] for i in range(B)])
    there = hidden[:, None].expand(-1, C, -1)
    painted["mean colour"].scatter_(2, there, seen.mean(2, keepdim=True).expand(-1, -1, hidden.shape[1]))
    painted["nearest visible pixel"].scatter_(2, there, colours.gather(2, nearest[:, None].expand(-1, C, -1)))
    shaped = {name: patches_of(values.view_as(images), model.patch_size) for name, values in painted.items()}
    return {name: chosen_patches(values, masked) for name, values in shaped.items()}


@torch.inference_mode()
def errors(
    model: MaskedPatches, data: ImageDataset, share: float, seed: int, batch_size: int = 250
) -> dict[str, float]:
    """The mean squared error of the masked, normalised pixels, of the network and of guesses."""
    sums: dict[str, float] = {}
    masks = draw_masks(len(data), len(model.places), share, seed, 2**32)
    for first in range(0, len(data), batch_size):
        images = normalise(data.images[first : first + batch_size], MEAN, STD)
        masked = masks[first : first + batch_size]
        truth = chosen_patches(patches_of(images, model.patch_size), masked)
        for name, values in {**guesses(images, masked, model), "Perceiver IO": model(images, masked)}.items():
            sums[name] = sums.get(name, 0.0) + (values - truth).square().mean((1, 2)).sum().item()
    return {name: total / len(data) for name, total in sums.items()}


@torch.inference_mode()
def draw(model: MaskedPatches, data: ImageDataset, share: float, seed: int, path: Path) -> None:
    """A picture of images: masked, with masked patches painted, and as they are."""
    images = normalise(data.images, MEAN, STD)
    masked = draw_masks(len(data), len(model.places), share, seed, 2**32)
    patches = patches_of(images, model.patch_size)
    there = masked[:, :, None].expand(-1, -1, patches.shape[2])
    grey = patches.scatter(1, there, 0.0)
    painted = patches.scatter(1, there, model(images, masked))
    figure = Figure(figsize=(1.1 * len(data), 3.6), layout="constrained")
    axes = figure.subplots(3, len(data), squeeze=False)
    for row, (name, values) in enumerate((("masked", grey), ("painted", painted), ("original", patches))):
        shown = images_of(values, model.patch_size, images.shape[2]) * torch.tensor(STD).view(3, 1, 1)
        shown = (shown + torch.tensor(MEAN).view(3, 1, 1)).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        for column, image in enumerate(shown):
            axes[row, column].imshow(image)
            axes[row, column].set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(name)
    save_figure(figure, path)


def main(
    dataset: Annotated[str | None, typer.Option(help="Hub id or folder; by default the sample in the package.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Images of a step.")] = 64,
    validation: Annotated[int, typer.Option(help="Images not to learn from, the last of the training split.")] = 5000,
    share: Annotated[float, typer.Option(help="Share of the patches to mask.")] = 0.5,
    patch_size: Annotated[int, typer.Option(help="Pixels of a patch's side.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the weights, the masks and the order of images.")] = 0,
    picture: Annotated[Path | None, typer.Option(help="Draw eight validation images to this file.")] = None,
) -> None:
    """Train, and print the error on the validation images."""
    datasets.disable_progress_bars()
    if picture is not None:
        check_picture(picture)
        check_writable(picture)
    data = load_images(dataset or default_dataset(), "train")
    if not 8 <= validation < len(data):
        raise ValueError(f"Expected `validation` to be in [8, {len(data) - 1}], got {validation}.")
    training, held_out = data.split_off(validation)
    torch.manual_seed(seed)
    model = MaskedPatches(IterativePerceiverConfig(**CONFIG), patch_size)
    begun = time.monotonic()
    train(model, training, steps, batch_size, share, seed)
    minutes = (time.monotonic() - begun) / 60
    model.eval()
    rows = [[name, f"{error:.4f}"] for name, error in errors(model, held_out, share, seed).items()]
    print(markdown_table(["masked patches", "mean squared error"], rows))
    facts = {"steps": steps, "batch_size": batch_size, "share": share, "seed": seed, "minutes": f"{minutes:.1f}"}
    print(conditions_line(measurement_conditions(**facts)))
    if picture is not None:
        draw(model, held_out.subset(slice(0, 8)), share, seed, picture)


if __name__ == "__main__":
    run_command(main)
