"""Common corruptions of the CIFAR-10-C kind, on batches, each image's randomness from the seed and its index alone.

The corruptions, their severity constants and, as far as numpy and Pillow go, their steps are those of `make_cifar_c.py` in
https://github.com/hendrycks/robustness (Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019). Numbers measured with them are *not* CIFAR-10-C numbers:

- the random draws are ours, so no image equals the published one (all severities of an image share their draws here);
- `frost` is left out because it needs the authors' photographs, `spatter` because it needs OpenCV;
- values are rounded to uint8, the original truncates;
- motion blur (also of `snow`) follows ImageMagick's formula, a one-sided Gaussian along a line of whole-pixel steps, without
  ImageMagick; the affine part of `elastic_transform` samples at exact places, OpenCV 4 at 1/32 pixel;
- as in the original, `elastic_transform` wobbles more locally with severity, but moves the whole image less, so that the mean
  difference of pixels falls from severity 1 to 5, and `saturate` drains colour at severities 1 and 2 and adds it from 3 on;
- on images that are not 32x32, lengths in pixels grow with the shorter side; the original has no such rule.

Packages on the registry that draw these corruptions (imagecorruptions, torch-uncertainty, corrupt-tta) have ImageNet-C's constants,
too strong for 32x32, draw from one generator whatever the image, and need OpenCV and scikit-image or kornia; that is why the
corruptions are written out here.
"""

import io
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image


SEVERITIES = (1, 2, 3, 4, 5)

Draws = list[np.random.Generator]  # one per image
Images = TypeVar("Images", np.ndarray, torch.Tensor)


def corrupt(
    images: Images, corruption: str, severity: int, seed: int = 0, indices: Sequence[int] | None = None
) -> Images:
    """Corrupt a batch.

    Args:
        images: (B, H, W, 3) uint8, in numpy or torch.
        corruption: A key of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: Of the draws.
        indices: The images' places in their dataset, (B,): an image's draws follow from the seed, the corruption's name and
            this number, whatever batch it is in. 0 to B - 1 by default.

    Returns:
        The same shape, type and device.

    Raises:
        ValueError: If there is no such corruption or severity, the images are not (B, H, W, 3) uint8, or there is not one
            index for each.

    Example:
        >>> images = np.full((2, 32, 32, 3), 100, dtype=np.uint8)
        >>> corrupt(images, "brightness", 1)[0, 0, 0].tolist()
        [113, 113, 113]
        >>> one, both = corrupt(images[1:], "fog", 3, indices=[1]), corrupt(images, "fog", 3)
        >>> bool((one[0] == both[1]).all())
        True
    """
    if corruption not in CORRUPTIONS:
        raise ValueError(f"Expected a corruption among {', '.join(CORRUPTIONS)}, got {corruption!r}.")
    if severity not in SEVERITIES:
        raise ValueError(f"Expected a severity from 1 to 5, got {severity!r}.")
    if isinstance(images, torch.Tensor):
        corrupted = corrupt(images.cpu().numpy(), corruption, severity, seed, indices)
        return torch.from_numpy(corrupted).to(images.device)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"Expected images (B, H, W, 3) in uint8, got {tuple(images.shape)} in {images.dtype}.")
    places = range(len(images)) if indices is None else indices
    if len(places) != len(images):
        raise ValueError(f"Expected an index for each of {len(images)} images, got {len(places)}.")
    # The name is part of the key, so that a new corruption leaves the draws of the others as they are.
    name = zlib.crc32(corruption.encode())
    draws = [np.random.default_rng((seed, name, int(place))) for place in places]
    if not draws:
        return images.copy()
    kind = CORRUPTIONS[corruption]
    x = kind.function(images.astype(np.float32) / 255, kind.constants[severity - 1], draws)
    return np.rint(x.clip(0, 1) * 255).astype(np.uint8)


# Images are (B, H, W, 3) float32 in [0, 1] from here on. An image's result must not depend on the batch it is in: sums are taken in a
# fixed order over shifted images, never by BLAS, and functions whose last bit depends on the vector width only see one image's numbers.


def gaussian_noise(x: np.ndarray, c: float, draws: Draws) -> np.ndarray:
    """`c`: standard deviation."""
    return x + np.float32(c) * _normal(draws, x.shape[1:])


def shot_noise(x: np.ndarray, c: float, draws: Draws) -> np.ndarray:
    """`c`: photons at full brightness."""
    photons = np.stack([g.poisson(image.astype(np.float64) * c) for g, image in zip(draws, x, strict=True)])
    return (photons / c).astype(np.float32)


def impulse_noise(x: np.ndarray, c: float, draws: Draws) -> np.ndarray:
    """`c`: share of values, each channel apart, that become 0 or 1."""
    hit, salt = (_uniform(draws, x.shape[1:]) for _ in range(2))
    return np.where(hit < c, (salt < 0.5).astype(np.float32), x)


def speckle_noise(x: np.ndarray, c: float, draws: Draws) -> np.ndarray:
    """`c`: standard deviation relative to the value."""
    return x + x * np.float32(c) * _normal(draws, x.shape[1:])


def gaussian_blur(x: np.ndarray, c: float, draws: Draws) -> np.ndarray:
    """`c`: standard deviation in pixels."""
    return _blur(x, c * _unit(x))


def defocus_blur(x: np.ndarray, c: tuple[float, float], draws: Draws) -> np.ndarray:
    """`c`: radius of a disk, and standard deviation of the 3x3 Gaussian that smooths its edge, in pixels."""
    radius, alias = c[0] * _unit(x), c[1]
    edge = np.exp(-0.5 * (np.arange(-1, 2) / alias) ** 2)
    edge = np.outer(edge, edge) / edge.sum() ** 2
    reach = math.floor(radius) + 1
    L = np.arange(-reach, reach + 1)
    disk = (L[:, None] ** 2 + L**2 <= radius**2).astype(np.float64)
    disk = np.pad(disk / disk.sum(), 1)
    kernel = sum(edge[i, j] * np.roll(disk, (i - 1, j - 1), (0, 1)) for i in range(3) for j in range(3))[1:-1, 1:-1]
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="reflect")
    out = np.zeros_like(x)
    for i, j in zip(*np.nonzero(kernel), strict=True):
        out += np.float32(kernel[i, j]) * padded[:, i : i + height, j : j + width]
    return out


def glass_blur(x: np.ndarray, c: tuple[float, int], draws: Draws) -> np.ndarray:
    """`c`: standard deviation of a Gaussian blur before and after, in pixels, and rounds of replacing pixels by neighbours.

    The original means to swap neighbours, but its swap of array views copies the upper or left neighbour, as here.
    """
    sigma, reach = c[0] * _unit(x), max(1, round(_unit(x)))
    x = np.floor(_blur(x, sigma) * 255) / np.float32(255)
    height, width = x.shape[1:3]
    rows, columns = np.mgrid[:height, :width]
    inside = (rows > reach) & (rows <= height - reach) & (columns > reach) & (columns <= width - reach)
    for _ in range(c[1]):
        steps = np.stack([g.integers(-reach, reach, size=(2, height, width)) for g in draws]) * inside
        x = x[_batch(x), rows + steps[:, 0], columns + steps[:, 1]]
    return _blur(x, sigma)


def motion_blur(x: np.ndarray, c: tuple[float, float], draws: Draws) -> np.ndarray:
    """`c`: radius and standard deviation in pixels; the direction is within 45 degrees of horizontal."""
    return _motion(x, c[0] * _unit(x), c[1] * _unit(x), [g.uniform(-45, 45) for g in draws])


def zoom_blur(x: np.ndarray, c: float, draws: Draws) -> np.ndarray:
    """`c`: where the zooms end, that are averaged with the image and begin at 1, in steps of 0.01."""
    # Rounding puts the end itself among some of them: a part of the original's definition.
    zooms = np.arange(1, c, 0.01)
    out = x.copy()
    for zoom in zooms:
        out += _zoom(x, zoom)
    return out / np.float32(len(zooms) + 1)


def snow(x: np.ndarray, c: tuple[float, ...], draws: Draws) -> np.ndarray:
    """`c`: mean and deviation of the flakes' field, its zoom, threshold, motion's radius and deviation, and the share of the image."""
    mean, deviation, zoom, threshold, radius, sigma, share = c
    flakes = np.float32(mean) + np.float32(deviation) * _normal(draws, (*x.shape[1:3], 1))
    flakes = _zoom(flakes, zoom)
    flakes = np.floor(np.where(flakes < threshold, 0, flakes).clip(0, 1) * 255) / np.float32(255)
    flakes = _motion(flakes, radius * _unit(x), sigma * _unit(x), [g.uniform(-135, -45) for g in draws])
    grey = (np.float32(0.299) * x[..., 0] + np.float32(0.587) * x[..., 1] + np.float32(0.114) * x[..., 2])[..., None]
    x = np.float32(share) * x + np.float32(1 - share) * np.maximum(x, np.float32(1.5) * grey + np.float32(0.5))
    return x + flakes + flakes[:, ::-1, ::-1]


def fog(x: np.ndarray, c: tuple[float, float], draws: Draws) -> np.ndarray:
    """`c`: amount, and how fast the fog's detail fades with its size."""
    amount, height, width = np.float32(c[0]), *x.shape[1:3]
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    clouds = _plasma(draws, 2 ** math.ceil(math.log2(max(height, width))), c[1])[:, :height, :width, None]
    return (x + amount * clouds) * brightest / (brightest + amount)


def brightness(x: np.ndarray, c: float, draws: Draws) -> np.ndarray:
    """`c`: added to the value of HSV."""
    value = x.max(axis=-1, keepdims=True)
    brighter = np.minimum(value + np.float32(c), 1)
    # With hue and saturation fixed, colours scale with the value; black has none and becomes grey.
    return np.where(value > 0, x * (brighter / np.where(value > 0, value, 1)), brighter)


def saturate(x: np.ndarray, c: tuple[float, float], draws: Draws) -> np.ndarray:
    """`c`: factor of the saturation of HSV, and what is added to it. Grey counts as red, as HSV's hue 0 does."""
    value, least = x.max(axis=-1, keepdims=True), x.min(axis=-1, keepdims=True)
    chroma = value - least
    saturation = chroma / np.where(value > 0, value, 1)
    wanted = (saturation * np.float32(c[0]) + np.float32(c[1])).clip(0, 1)
    red = np.array([0, 1, 1], dtype=np.float32)
    return value - wanted * value * np.where(chroma > 0, (value - x) / np.where(chroma > 0, chroma, 1), red)


def contrast(x: np.ndarray, c: float, draws: Draws) -> np.ndarray:
    """`c`: factor of the distance from the image's mean colour."""
    # Summed as integers, which is exact in every order.
    sums = np.rint(x * 255).astype(np.int64).sum(axis=(1, 2), keepdims=True)
    means = (sums / (255 * x.shape[1] * x.shape[2])).astype(np.float32)
    return (x - means) * np.float32(c) + means


def elastic_transform(x: np.ndarray, c: tuple[float, float, float], draws: Draws) -> np.ndarray:
    """`c`: size and smoothness of local displacements, and reach of a random affine map, as shares of the image's side."""
    height, width = x.shape[1:3]
    side = min(height, width)
    alpha, sigma, reach = (share * side for share in c)
    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    maps = np.stack([_random_affine(g, height, width, reach) for g in draws]).astype(np.float32)[..., None, None]
    columns, rows = (maps[:, i, 0] * xs + maps[:, i, 1] * ys + maps[:, i, 2] for i in range(2))
    x = _sample(x, rows, columns, edge_twice=False)
    if not alpha:
        return x
    fields = (2 * _uniform(draws, (2, height, width)) - 1).transpose(0, 2, 3, 1)
    moves = np.float32(alpha) * _blur(fields, sigma, truncate=3, mode="symmetric")
    return _sample(x, ys + moves[..., 0], xs + moves[..., 1], edge_twice=True)


def pixelate(x: np.ndarray, c: float, draws: Draws) -> np.ndarray:
    """`c`: the side of the image in big pixels, as a share of its side."""
    height, width = x.shape[1:3]

    def change(image: Image.Image) -> Image.Image:
        small = image.resize((int(width * c), int(height * c)), Image.Resampling.BOX)
        return small.resize((width, height), Image.Resampling.BOX)

    return _by_pillow(x, change)


def jpeg_compression(x: np.ndarray, c: int, draws: Draws) -> np.ndarray:
    """`c`: Pillow's quality."""

    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=c)
        return Image.open(file)

    return _by_pillow(x, change)


def _normal(draws: Draws, shape: tuple[int, ...]) -> np.ndarray:
    return np.stack([g.standard_normal(shape, dtype=np.float32) for g in draws])


def _uniform(draws: Draws, shape: tuple[int, ...]) -> np.ndarray:
    return np.stack([g.random(shape, dtype=np.float32) for g in draws])


def _unit(x: np.ndarray) -> float:
    """What a pixel of a 32x32 image is in pixels of these."""
    return min(x.shape[1:3]) / 32


def _batch(x: np.ndarray) -> np.ndarray:
    return np.arange(len(x))[:, None, None]


def _blur(x: np.ndarray, sigma: float, truncate: float = 4, mode: Any = "edge") -> np.ndarray:
    """Gaussian blur of (B, H, W, channels)."""
    reach = int(truncate * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (1, 2):
        size = x.shape[axis]
        padding = [(reach, reach) if i == axis else (0, 0) for i in range(4)]
        padded, out = np.pad(x, padding, mode=mode), np.zeros_like(x)
        for i, weight in enumerate(kernel):
            out += np.float32(weight) * (padded[:, i : i + size] if axis == 1 else padded[:, :, i : i + size])
        x = out
    return x


def _motion(x: np.ndarray, radius: float, sigma: float, degrees: list[float]) -> np.ndarray:
    """Average of each pixel with those before it on a line: ImageMagick's motion blur, each image in its direction."""
    height, width = x.shape[1:3]
    steps = 2 * math.ceil(radius) + 1
    weights = np.exp(-0.5 * (np.arange(steps) / sigma) ** 2)
    weights /= weights.sum()
    rows, columns = np.mgrid[:height, :width]
    out = np.zeros_like(x)
    for i in range(steps):
        dy = np.array([math.ceil(i * math.sin(math.radians(d)) - 0.5) for d in degrees])[:, None, None]
        dx = np.array([math.ceil(i * math.cos(math.radians(d)) - 0.5) for d in degrees])[:, None, None]
        shifted = x[_batch(x), (rows + dy).clip(0, height - 1), (columns + dx).clip(0, width - 1)]
        out += np.float32(weights[i]) * shifted
    return out


def _zoom(x: np.ndarray, zoom: float) -> np.ndarray:
    """The middle of (B, H, W, channels), enlarged linearly to the full size; as scipy's `zoom` places the samples."""
    for axis in (1, 2):
        size = x.shape[axis]
        crop = math.ceil(size / zoom)
        enlarged = round(crop * zoom)
        places = (np.arange(size) + (enlarged - size) // 2) * (crop - 1) / (enlarged - 1)
        low = np.minimum(places.astype(np.int64), crop - 1)
        shape = (-1, 1, 1) if axis == 1 else (-1, 1)
        share = (places - low).astype(np.float32).reshape(shape)
        low += (size - crop) // 2
        high = np.minimum(low + 1, size - 1)
        x = np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
    return x


def _plasma(draws: Draws, size: int, decay: float) -> np.ndarray:
    """Clouds in [0, 1], (B, size, size), by the diamond-square algorithm on a torus; `size` is a power of two."""
    noise = np.stack([g.uniform(-1, 1, size * size) for g in draws])
    used = 0
    clouds = np.zeros((len(draws), size, size))
    step, wibble = size, 100.0

    def wibbled_mean(sums: np.ndarray) -> np.ndarray:
        nonlocal used
        count = sums[0].size
        used += count
        return sums / 4 + wibble**2 * noise[:, used - count : used].reshape(sums.shape)

    while step >= 2:
        half = step // 2
        corners = clouds[:, ::step, ::step]
        sums = corners + np.roll(corners, -1, 1)
        clouds[:, half::step, half::step] = wibbled_mean(sums + np.roll(sums, -1, 2))
        centres = clouds[:, half::step, half::step]
        sums = centres + np.roll(centres, 1, 1) + corners + np.roll(corners, -1, 2)
        clouds[:, ::step, half::step] = wibbled_mean(sums)
        sums = centres + np.roll(centres, 1, 2) + corners + np.roll(corners, -1, 1)
        clouds[:, half::step, ::step] = wibbled_mean(sums)
        step, wibble = half, wibble / decay
    clouds -= clouds.min(axis=(1, 2), keepdims=True)
    return (clouds / clouds.max(axis=(1, 2), keepdims=True)).astype(np.float32)


def _random_affine(g: np.random.Generator, height: int, width: int, reach: float) -> np.ndarray:
    """Where each place (x, y, 1) of the result is taken from, (2, 3): three points around the centre moved by up to `reach`."""
    x, y, arm = height // 2, width // 2, min(height, width) // 3
    points = np.array([[x + arm, y + arm], [x + arm, y - arm], [x - arm, y - arm]], dtype=np.float64)
    moved = np.column_stack([points + g.uniform(-reach, reach, (3, 2)), np.ones(3)])
    return np.linalg.solve(moved, points).T


def _sample(x: np.ndarray, rows: np.ndarray, columns: np.ndarray, edge_twice: bool) -> np.ndarray:
    """Linear interpolation of (B, H, W, 3) at (B, H, W) places, mirrored at the edges with or without repeating the edge."""

    def mirror(places: np.ndarray, size: int) -> np.ndarray:
        if edge_twice:
            places = places % (2 * size)
            return np.minimum(places, 2 * size - 1 - places)
        places = places % (2 * size - 2)
        return np.minimum(places, 2 * size - 2 - places)

    height, width = x.shape[1:3]
    low_rows, low_columns = np.floor(rows), np.floor(columns)
    out = np.zeros_like(x)
    for i in (0, 1):
        row_weight = (rows - low_rows) if i else 1 - (rows - low_rows)
        r = mirror(low_rows.astype(np.int64) + i, height)
        for j in (0, 1):
            weight = row_weight * ((columns - low_columns) if j else 1 - (columns - low_columns))
            c = mirror(low_columns.astype(np.int64) + j, width)
            out += weight[..., None].astype(np.float32) * x[_batch(x), r, c]
    return out


def _by_pillow(x: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    images = (Image.fromarray(image) for image in np.rint(x * 255).astype(np.uint8))
    return np.stack([np.asarray(change(image)) for image in images]).astype(np.float32) / 255


@dataclass(frozen=True)
class Corruption:
    """A way to corrupt, its family, and the constants of the five severities."""

    family: str
    function: Callable[[np.ndarray, Any, Draws], np.ndarray]
    constants: tuple[Any, Any, Any, Any, Any]


# Hendrycks & Dietterich's order, families and constants for CIFAR.
CORRUPTIONS = {
    "gaussian_noise": Corruption("noise", gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Corruption("noise", shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": Corruption("noise", impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle_noise": Corruption("noise", speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": Corruption("blur", gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1)),
    "defocus_blur": Corruption("blur", defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": Corruption("blur", glass_blur, ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))),
    "motion_blur": Corruption("blur", motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": Corruption("blur", zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": Corruption(
        "weather",
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "fog": Corruption("weather", fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": Corruption("weather", brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption("digital", contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "saturate": Corruption("digital", saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))),
    "elastic_transform": Corruption(
        "digital",
        elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": Corruption("digital", pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": Corruption("digital", jpeg_compression, (80, 65, 58, 50, 40)),
}
