"""timm's training augmentation, applied to a whole batch at once on the device that holds the images.

All random numbers are drawn on the CPU: NumPy draws them for the global batch from the seed and the step, so that an
image is augmented in the same way on CPU and GPU and with any number of processes. The host therefore knows which
images get which operation. It sends this to the device in one transfer and never waits for the device.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as kernels

from hf_visual_perceiver.training.recipe import Augmentation


# timm's 15 operations and the identity, in groups that are computed together: lookup tables of 256 values, computed on
# the host; two operations that depend on an image's histogram; blends with a degenerate image; geometric transforms.
# (RandAugment of kornia and torchvision draws one operation for all images of a call.)
LOOKUPS = ("Invert", "Posterize", "Solarize", "SolarizeAdd", "Brightness")
WARPS = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
OPERATIONS = (*LOOKUPS, "AutoContrast", "Equalize", "Contrast", "Color", "Sharpness", *WARPS, "Identity")
GROUPS = (LOOKUPS, ("AutoContrast",), ("Equalize",), ("Contrast",), ("Color",), ("Sharpness",), WARPS, ("Identity",))


@dataclass(frozen=True)
class RandAugment:
    """The settings that timm's `rand-...` notation encodes."""

    num_ops: int = 2  # n: number of operations per image, applied one after the other
    magnitude: float = 10  # m: on a scale where 10 is full strength
    magnitude_std: float = 0  # mstd: std of a normal distribution around magnitude; inf: uniform on [0, magnitude]
    magnitude_max: float = 10  # mmax: magnitudes are clipped to [0, mmax]
    increasing: bool = False  # inc: every operation gets stronger with the magnitude
    probability: float = 0.5  # p: probability of each operation

    def arguments(self, magnitude: np.ndarray, sign: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the argument of each operation at a magnitude, as timm's LEVEL_TO_ARG does.

        Args:
            magnitude: Values of at least 0, in an array of any shape.
            sign: 1 or -1, in the same shape, for operations that have two directions.
        """
        strength = magnitude / 10
        bits = (strength * 4).astype(int)
        threshold = (strength * 256).astype(int).clip(max=256)
        factor = 1.8 * strength + 0.1
        if self.increasing:
            bits, threshold, factor = 4 - bits, 256 - threshold, (1 + 0.9 * sign * strength).clip(min=0.1)
        arguments = {
            # timm's strongest setting keeps 0 bits, for which Pillow 13 raises; before, the image was black. Keep one.
            "Posterize": bits.clip(1, 8),
            "Solarize": threshold,
            "SolarizeAdd": (strength * 110).astype(int).clip(max=128),
            **dict.fromkeys(("Brightness", "Contrast", "Color", "Sharpness"), factor),
            "Rotate": 30 * sign * strength,  # degrees
            **dict.fromkeys(("ShearX", "ShearY"), 0.3 * sign * strength),
            **dict.fromkeys(("TranslateX", "TranslateY"), 0.45 * sign * strength),  # of the image's size
        }
        return {name: arguments.get(name, np.zeros_like(strength)) for name in OPERATIONS}

    def draw(self, random: np.random.Generator, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw operations, as indices into OPERATIONS, and their arguments, both (B, num_ops)."""
        shape = (batch_size, self.num_ops)
        operations = random.integers(len(OPERATIONS) - 1, size=shape)
        operations[random.random(shape) >= self.probability] = OPERATIONS.index("Identity")
        if math.isinf(self.magnitude_std):
            magnitude = random.uniform(0, self.magnitude, shape)
        else:
            magnitude = random.normal(self.magnitude, self.magnitude_std, shape)
        sign = np.where(random.random(shape) < 0.5, -1, 1)
        arguments = self.arguments(magnitude.clip(0, self.magnitude_max), sign)
        return operations, np.choose(operations, list(arguments.values()))


def parse_rand_augment(notation: str) -> RandAugment:
    """Parse timm's notation for RandAugment.

    Args:
        notation: `rand`, then any of n (operations per image), m (magnitude), mstd (above 100: uniform), mmax, inc (0
            or 1) and p (probability), each followed by its number, separated by hyphens.

    Raises:
        ValueError: If the notation is not RandAugment's.

    Example:
        >>> parse_rand_augment("rand-m9-mstd0.5-inc1").magnitude_std
        0.5
    """
    keys: dict[str, Any] = {
        "n": ("num_ops", int),
        "m": ("magnitude", int),
        "mstd": ("magnitude_std", float),
        "mmax": ("magnitude_max", int),
        "inc": ("increasing", int),
        "p": ("probability", float),
    }
    values: dict[str, Any] = {}
    policy, *sections = notation.split("-")
    try:
        for section in sections:
            match = re.fullmatch(rf"({'|'.join(keys)})(\d.*)", section)
            if match is None:
                raise ValueError
            name, kind = keys[match[1]]
            values[name] = kind(match[2])
        if policy != "rand" or values.get("probability", 0) > 1:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"Expected `augmentation.auto_augment` in timm's notation of RandAugment, rand and any of {', '.join(keys)} "
            f"with their numbers, such as rand-m9-mstd0.5-inc1, got {notation!r}."
        ) from None
    if values.get("magnitude_std", 0) > 100:
        values["magnitude_std"] = math.inf
    # timm takes mmax0 as the default bound.
    values["magnitude_max"] = values.get("magnitude_max") or RandAugment.magnitude_max
    values["increasing"] = bool(values.get("increasing", RandAugment.increasing))
    return RandAugment(**values)


@dataclass(frozen=True)
class Draws:
    """The random draws for B images. A box is (top, bottom, left, right); a box without area changes nothing."""

    crop: np.ndarray  # (B, 2) offset of the crop, in pixels down and to the right
    flip: np.ndarray  # (B,) bool
    operations: np.ndarray  # (B, num_ops) indices into OPERATIONS
    arguments: np.ndarray  # (B, num_ops)
    erased: np.ndarray  # (B, 4) box
    mixed: np.ndarray  # (B, 4) box that is mixed with the partner image: the whole image with mixup
    partner_weight: np.ndarray  # (B,) weight of the partner in the box: 1 with cutmix

    def __getitem__(self, positions: np.ndarray) -> "Draws":
        """Select the draws of some of the images."""
        return Draws(*(getattr(self, field.name)[positions] for field in dataclasses.fields(self)))


class BatchAugmentation:
    """Turns uint8 images into augmented, normalised and mixed pixel values.

    The order is timm's: random crop, horizontal flip, RandAugment, normalisation, random erasing, mixup or cutmix.

    Args:
        augmentation: Augmentations and their probabilities. Resized crops and repeats are not done here.
        num_labels: Number of classes in the dataset.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel, for pixels in [0, 1].
        seed: Random seed of the run; the same on every process.
        random_crop: Whether to crop, if the augmentation has a padding.
        num_images: Number of training images; needed for `augmentation.alternating_flip`.

    Raises:
        ValueError: If `augmentation.auto_augment` is not RandAugment in timm's notation.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        num_labels: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        random_crop: bool = True,
        num_images: int = 0,
    ):
        self.augmentation, self.num_labels, self.mean, self.std, self.seed = augmentation, num_labels, mean, std, seed
        self.padding = (augmentation.random_crop_padding or 0) if random_crop else 0
        notation = augmentation.auto_augment
        self.rand_augment = RandAugment(num_ops=0) if notation is None else parse_rand_augment(notation)
        # The 3 keeps this random stream apart from those of the schedule, the augmentation and the selection.
        self.flipped_at_first = np.random.default_rng((seed, 3)).random(num_images) < augmentation.horizontal_flip

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        step: int,
        positions: np.ndarray,
        batch_size: int,
        indices: np.ndarray | None = None,
        epoch: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Augment a process's share of a step's batch.

        Args:
            images: (B, 3, H, W) uint8.
            labels: (B,) int64, on the same device.
            step: Step of the run.
            positions: (B,) positions of the images in the global batch. For mixing, local images i and B - 1 - i must
                be at positions p and `batch_size` - 1 - p, as `BatchOrder` deals them.
            batch_size: Number of images in the global batch.
            indices: (B,) indices of the images in the training set; needed for `alternating_flip`.
            epoch: Epoch of the step; needed for `alternating_flip`.

        Returns:
            `pixel_values` (B, 3, H, W) and targets (B, num_labels) whose rows sum to 1, both float32.

        Raises:
            ValueError: If the images are not uint8, their number differs from that of the positions, or
                `alternating_flip` is on and the indices or the epoch are missing.
        """
        if images.dtype != torch.uint8 or len(images) != len(positions):
            raise ValueError(f"Expected {len(positions)} images in uint8, got {len(images)} in {images.dtype}.")
        draws = self.draw(step, batch_size, *images.shape[-2:])[positions]
        if self.augmentation.alternating_flip:
            if indices is None or epoch is None:
                raise ValueError(
                    "Expected the images' indices and the epoch, which `alternating_flip` needs, got none."
                )
            draws = dataclasses.replace(draws, flip=self.flipped_at_first[indices] ^ bool(epoch % 2))
        return self.apply(images, labels, draws)

    def draw(self, step: int, batch_size: int, height: int, width: int) -> Draws:
        """Draw what happens to each image of the global batch in a step."""
        # The 1 keeps this random stream apart from that of the schedule of K.
        random = np.random.default_rng((self.seed, step, 1))
        crop = random.integers(-self.padding, self.padding, (batch_size, 2), endpoint=True)
        flip = random.random(batch_size) < self.augmentation.horizontal_flip
        operations, arguments = self.rand_augment.draw(random, batch_size)
        erased = draw_erasing(random, self.augmentation.random_erasing, batch_size, height, width)
        mixed, partner_weight = draw_mixing(random, self.augmentation, batch_size, height, width)
        return Draws(crop, flip, operations, arguments, erased, mixed, partner_weight)

    def apply(self, images: Tensor, labels: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Apply the draws; see `__call__` for the shapes."""
        B, _, H, W = images.shape
        # The batch is sorted for each stage, so that an operation works on a slice; the last sort restores the order.
        unsorted = np.arange(B)
        orders = [unsorted, np.argsort(~draws.flip), *np.argsort(draws.operations, axis=0).T, unsorted]
        first, *moves = [np.argsort(before)[after] for before, after in itertools.pairwise(orders)]
        layers = [
            plan_layer(draws.operations[order, i], draws.arguments[order, i], H, W)
            for i, order in enumerate(orders[2:-1])
        ]
        corners = draws.crop[first] + self.padding
        corners = (first * 3 * (H + 2 * self.padding) + corners[:, 0]) * (W + 2 * self.padding) + corners[:, 1]
        mixed_rows = inside(draws.mixed[:, :2], H) * draws.partner_weight[:, None]
        mixed_columns = inside(draws.mixed[:, 2:], W)
        sent = send(
            {
                "corners": corners,
                "moves": np.stack(moves),
                **{f"{name}{i}": array for i, (_, arrays) in enumerate(layers) for name, array in arrays.items()},
                "fill": np.array([min(255, round(255 * m)) for m in self.mean], dtype=np.float32),
                "mean": np.array(self.mean, dtype=np.float32),
                "std": np.array(self.std, dtype=np.float32),
                "kept_rows": 1 - inside(draws.erased[:, :2], H),
                "kept_columns": 1 - inside(draws.erased[:, 2:], W),
                "mixed_rows": mixed_rows,
                "mixed_columns": mixed_columns,
                "partner_share": mixed_rows.mean(1, keepdims=True) * mixed_columns.mean(1, keepdims=True),
            },
            images.device,
        )

        pixels = crop(images, sent["corners"], self.padding)
        flips = int(draws.flip.sum())
        pixels = torch.cat([pixels[:flips].flip(-1), pixels[flips:]])
        for i, (sizes, arrays) in enumerate(layers):
            plan = {name: sent[f"{name}{i}"] for name in arrays}
            pixels = augment_layer(pixels.index_select(0, sent["moves"][i]), sizes, **plan, fill=sent["fill"])
        x = pixels.index_select(0, sent["moves"][-1]).float()
        x.div_(255).sub_(sent["mean"].view(3, 1, 1)).div_(sent["std"].view(3, 1, 1))
        if draws.erased.any():
            x.mul_(torch.maximum(sent["kept_rows"][:, None, :, None], sent["kept_columns"][:, None, None, :]))
        off = self.augmentation.label_smoothing / self.num_labels
        targets = x.new_full((B, self.num_labels), off)
        targets.scatter_(1, labels[:, None], 1 - self.augmentation.label_smoothing + off)
        if draws.partner_weight.any():
            x.lerp_(x.flip(0), sent["mixed_rows"][:, None, :, None] * sent["mixed_columns"][:, None, None, :])
            targets.lerp_(targets.flip(0), sent["partner_share"])
        return x, targets


def draw_erasing(
    random: np.random.Generator, probability: float, batch_size: int, height: int, width: int
) -> np.ndarray:
    """Draw the boxes (B, 4) of timm's random erasing: 2 % to a third of the image, with aspect ratio 0.3 to 1 / 0.3."""
    # timm tries ten times to find a box that fits.
    area = height * width * random.uniform(0.02, 1 / 3, (batch_size, 10))
    aspect_ratio = np.exp(random.uniform(math.log(0.3), math.log(1 / 0.3), (batch_size, 10)))
    heights, widths = np.rint(np.sqrt(area * aspect_ratio)), np.rint(np.sqrt(area / aspect_ratio))
    fits = (heights < height) & (widths < width)
    chosen = np.arange(batch_size), fits.argmax(1)
    erased = fits.any(1) & (random.random(batch_size) < probability)
    h, w = (np.where(erased, sizes[chosen], 0).astype(int) for sizes in (heights, widths))
    top, left = random.integers(0, height - h, endpoint=True), random.integers(0, width - w, endpoint=True)
    return np.stack([top, top + h, left, left + w], axis=1) * erased[:, None]


def draw_mixing(
    random: np.random.Generator, augmentation: Augmentation, batch_size: int, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw timm's mixup and cutmix for each image: the mixed boxes (B, 4) and the partner's weights (B,) in them."""
    mixup, cutmix = augmentation.mixup, augmentation.cutmix
    switch = augmentation.mixup_switch if mixup and cutmix else float(cutmix > 0)
    boxed = random.random(batch_size) < switch
    share = np.zeros(batch_size)  # 1 - lambda in the papers, drawn directly as Beta(alpha, alpha) is symmetric
    for alpha, chosen in ((mixup, ~boxed), (cutmix, boxed)):
        if alpha:
            share = np.where(chosen, random.beta(alpha, alpha, batch_size), share)
    share *= random.random(batch_size) < augmentation.mixup_probability
    sides = []
    for size in (height, width):
        length = (size * np.sqrt(share)).astype(int)
        centre = random.integers(0, size, batch_size)
        first, end = (centre - length // 2).clip(0, size), (centre + (length + 1) // 2).clip(0, size)
        sides += [np.where(boxed, first, 0), np.where(boxed, end, size)]
    return np.stack(sides, axis=1), np.where(boxed, 1.0, share)


def inside(sides: np.ndarray, size: int) -> np.ndarray:
    """Return (B, size): 1 where a row (or column) lies between `sides` (B, 2), else 0."""
    places = np.arange(size)
    return ((sides[:, :1] <= places) & (places < sides[:, 1:])).astype(np.float32)


def send(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Copy arrays to the device in one transfer that does not block the host; float64 becomes float32."""
    arrays = {name: a.astype(np.float32) if a.dtype == np.float64 else a for name, a in arrays.items()}
    # Arrays with large elements come first, so that every array is aligned to its element size.
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))
    packed = torch.from_numpy(
        np.concatenate([np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in arrays.values()])
    )
    cuda = device.type == "cuda"
    packed = (packed.pin_memory() if cuda else packed).to(device, non_blocking=cuda)
    dtypes = {np.dtype(np.int64): torch.int64, np.dtype(np.float32): torch.float32, np.dtype(np.uint8): torch.uint8}
    parts = packed.split([a.nbytes for a in arrays.values()])
    return {
        name: part.view(dtypes[a.dtype]).view(a.shape) for part, (name, a) in zip(parts, arrays.items(), strict=True)
    }


def crop(images: Tensor, corners: Tensor, padding: int) -> Tensor:
    """Crop (H, W) windows from the zero-padded images.

    Args:
        images: (B, 3, H, W).
        corners: (n,) offset of each window's first element in the flattened (B, 3, H + 2 padding, W + 2 padding).
        padding: Pixels of padding on each side.
    """
    _, _, H, W = images.shape
    padded = F.pad(images, (padding,) * 4).contiguous()
    _, channel, row, _ = padded.stride()
    length = 2 * channel + (H - 1) * row + W
    # A view of all possible, overlapping windows; index_select copies only the chosen ones.
    windows = padded.as_strided((padded.numel() - length + 1, 3, H, W), (1, channel, row, 1))
    return windows.index_select(0, corners)


def plan_layer(
    operations: np.ndarray, arguments: np.ndarray, height: int, width: int
) -> tuple[list[int], dict[str, np.ndarray]]:
    """Compute the arguments of `augment_layer`.

    Args:
        operations: (B,) indices into OPERATIONS, sorted.
        arguments: (B,) arguments of the operations.
        height: Height of the images.
        width: Width of the images.

    Returns:
        The number of images in each of GROUPS, and the arrays.
    """
    groups = np.cumsum([0, *(len(group) for group in GROUPS)])
    edges = np.searchsorted(operations, groups)
    lookups, blends, warps = slice(0, edges[1]), slice(edges[3], edges[6]), slice(edges[6], edges[7])
    arrays = {
        "tables": _tables(operations[lookups], arguments[lookups]),
        "factors": arguments[blends],
        **_grid(operations[warps] - groups[6], arguments[warps], height, width),
    }
    return np.diff(edges).tolist(), arrays


def _tables(operations: np.ndarray, arguments: np.ndarray) -> np.ndarray:
    """Return lookup tables (n, 256): the new value for each value of a pixel."""
    value = np.arange(256)
    counts = np.bincount(operations, minlength=len(LOOKUPS))
    _, bits, threshold, added, factor = np.split(arguments[:, None], np.cumsum(counts)[:-1])
    tables = [
        np.broadcast_to(255 - value, (counts[0], 256)),
        value - value % 2.0 ** (8 - bits),
        np.where(value < threshold, value, 255 - value),
        np.where(value < 128, np.minimum(value + added, 255), value),
        # In float32, as in PIL: the result is truncated, so the precision matters.
        np.minimum(value.astype(np.float32) * factor.astype(np.float32), 255),
    ]
    return np.concatenate(tables).astype(np.uint8)


def _grid(operations: np.ndarray, arguments: np.ndarray, height: int, width: int) -> dict[str, np.ndarray]:
    """The `grid_sample` grid of PIL's affine transforms, as two terms to add: (n, 2, H, 1) and (n, 2, 1, W)."""
    angle, shear_x, shear_y, move_x, move_y = ((operations == i) * arguments for i in range(len(WARPS)))
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    # Coordinates in pixels from the centre; only the rotation is about the centre.
    y, x = np.arange(height) + 0.5 - height / 2, np.arange(width) + 0.5 - width / 2
    x_from_y = np.outer(shear_x - sin, y) + (shear_x * height / 2 + move_x * width)[:, None]
    y_from_y = np.outer(cos, y) + (shear_y * width / 2 + move_y * height)[:, None]
    x_from_x, y_from_x = np.outer(cos, x), np.outer(shear_y + sin, x)
    scale = np.array([[2 / width], [2 / height]])
    return {
        "rows": (np.stack([x_from_y, y_from_y], axis=1) * scale)[:, :, :, None],
        "columns": (np.stack([x_from_x, y_from_x], axis=1) * scale)[:, :, None, :],
    }


def augment_layer(
    images: Tensor, sizes: list[int], tables: Tensor, factors: Tensor, rows: Tensor, columns: Tensor, fill: Tensor
) -> Tensor:
    """Apply one operation of RandAugment to each image.

    Args:
        images: (B, 3, H, W) uint8, sorted by GROUPS.
        sizes: Number of images in each group.
        tables: (n, 256) uint8, for the images that a lookup table changes.
        factors: (n,), for the images that are blended.
        rows: (n, 2, H, 1), for the images that are warped.
        columns: (n, 2, 1, W), for the same images. `rows + columns` is where a pixel is read, (x, y) in [-1, 1].
        fill: (3,) colour of pixels from outside the image.
    """
    lookups, autocontrast, equalize, contrast, color, sharpness, warps, same = images.split(sizes)
    changed = [
        tables.gather(1, lookups.flatten(1).long()).view_as(lookups),
        kernels.autocontrast(autocontrast),
        kernels.equalize(equalize),
        _blend(contrast.float(), color.float(), sharpness.float(), factors),
        _warp(warps.float(), rows + columns, fill),
    ]
    return torch.cat([*changed, same])


def _blend(contrast: Tensor, color: Tensor, sharpness: Tensor, factors: Tensor) -> Tensor:
    """PIL's ImageEnhance: blend each image with its version without contrast, colour or sharpness, or extrapolate."""
    images = torch.cat([contrast, color, sharpness])
    red, green, blue = torch.cat([contrast, color]).split(1, dim=1)
    # PIL computes with integers; float32 represents all of them exactly.
    grey = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768).div_(65536).floor_()
    mean = grey[: len(contrast)].mean((2, 3), keepdim=True).add_(0.5).floor_()
    smooth = sharpness.clone()
    columns = sharpness[..., :-2, :] + sharpness[..., 1:-1, :] + sharpness[..., 2:, :]
    squares = columns[..., :-2] + columns[..., 1:-1] + columns[..., 2:]
    smooth[..., 1:-1, 1:-1].mul_(4).add_(squares).div_(13).add_(0.5).floor_()
    degenerate = torch.cat([mean.expand_as(contrast), grey[len(contrast) :].expand_as(color), smooth])
    blended = images.sub_(degenerate).mul_(factors[:, None, None, None]).add_(degenerate)
    return blended.clamp_(0, 255).to(torch.uint8)


def _warp(images: Tensor, grid: Tensor, fill: Tensor) -> Tensor:
    """Sample the images at a grid (n, 2, H, W), bilinearly; like PIL, do not blend edge pixels with the fill colour."""
    within = (torch.maximum(*grid.abs().split(1, dim=1)) < 1).float()
    read = F.grid_sample(images, grid.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
    # PIL truncates; the small offset keeps a rounding error from turning a whole number into the one below.
    return torch.lerp(fill.view(3, 1, 1), read.add_(1e-3), within).to(torch.uint8)
