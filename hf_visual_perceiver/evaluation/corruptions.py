"""Corrupted images: the published CIFAR-10-C, if its files are given, and half a dozen corruptions of our own.

CIFAR-10-C (Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR
2019, https://zenodo.org/records/2535967) is the field's standard. The corruptions in `CORRUPTIONS` are those that take
a line or two of Pillow and NumPy, with our own severities: results measured with them are not CIFAR-10-C results.
Packages that implement the whole set (imagecorruptions, torch-uncertainty, corrupt-tta) use ImageNet-C's constants,
which are too strong for 32x32 images, and need OpenCV and scikit-image or kornia.
"""

import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from hf_visual_perceiver.data.images import ImageDataset


SEVERITIES = (1, 2, 3, 4, 5)


def gaussian_noise(image: Image.Image, c: float, random: np.random.Generator) -> Image.Image:
    """`c`: standard deviation of the noise, for values in [0, 1]."""
    pixels = np.asarray(image, dtype=np.float32)
    return Image.fromarray(
        np.rint(pixels + 255 * c * random.standard_normal(pixels.shape)).clip(0, 255).astype(np.uint8)
    )


def gaussian_blur(image: Image.Image, c: float, random: np.random.Generator) -> Image.Image:
    """`c`: standard deviation in pixels, for an image whose shorter side is 32; it scales with the image."""
    return image.filter(ImageFilter.GaussianBlur(c * min(image.size) / 32))


def brightness(image: Image.Image, c: float, random: np.random.Generator) -> Image.Image:
    """`c`: Pillow's factor."""
    return ImageEnhance.Brightness(image).enhance(c)


def contrast(image: Image.Image, c: float, random: np.random.Generator) -> Image.Image:
    """`c`: Pillow's factor."""
    return ImageEnhance.Contrast(image).enhance(c)


def pixelate(image: Image.Image, c: float, random: np.random.Generator) -> Image.Image:
    """`c`: side of the downsampled image, as a share of the original side."""
    small = image.resize((int(image.width * c), int(image.height * c)), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.BOX)


def jpeg_compression(image: Image.Image, c: int, random: np.random.Generator) -> Image.Image:
    """`c`: Pillow's JPEG quality."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=c)
    return Image.open(file)


CORRUPTIONS: dict[str, tuple[Callable[[Image.Image, Any, np.random.Generator], Image.Image], tuple[Any, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "brightness": (brightness, (1.1, 1.2, 1.3, 1.5, 1.8)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (jpeg_compression, (80, 65, 58, 50, 40)),
}


def corrupt(
    images: np.ndarray, corruption: str, severity: int, seed: int = 0, indices: Sequence[int] | None = None
) -> np.ndarray:
    """Apply one of our own corruptions to a batch.

    Args:
        images: (B, H, W, 3) uint8.
        corruption: A key of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: Random seed.
        indices: (B,) indices of the images in their dataset; 0 to B - 1 by default. An image's random numbers follow
            from the seed, the corruption's name and this index, and not from the batch.

    Returns:
        (B, H, W, 3) uint8 corrupted images.

    Raises:
        ValueError: If there is no such corruption or severity, the images are not (B, H, W, 3) uint8, or the number of
            indices differs from that of the images.

    Example:
        >>> images = np.full((2, 32, 32, 3), 100, dtype=np.uint8)
        >>> corrupt(images, "brightness", 1)[0, 0, 0].tolist()
        [110, 110, 110]
    """
    if corruption not in CORRUPTIONS:
        raise ValueError(f"Expected a corruption among {', '.join(CORRUPTIONS)}, got {corruption!r}.")
    if severity not in SEVERITIES:
        raise ValueError(f"Expected a severity from 1 to 5, got {severity!r}.")
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"Expected images (B, H, W, 3) in uint8, got {tuple(images.shape)} in {images.dtype}.")
    places = range(len(images)) if indices is None else indices
    if len(places) != len(images):
        raise ValueError(f"Expected an index for each of {len(images)} images, got {len(places)}.")
    function, constants = CORRUPTIONS[corruption]
    corrupted = np.empty_like(images)
    for i, place in enumerate(places):
        random = np.random.default_rng((seed, zlib.crc32(corruption.encode()), int(place)))
        corrupted[i] = np.asarray(function(Image.fromarray(images[i]), constants[severity - 1], random))
    return corrupted


@dataclass(frozen=True)
class Cifar10C:
    """The folder of the published CIFAR-10-C: labels.npy, and NAME.npy with 32x32 uint8 images by severity, 1 to 5.

    Args:
        folder: The unpacked folder.
        clean: The test images that were corrupted, in CIFAR-10's order.

    Raises:
        ValueError: If the folder is not as described, or its labels are not those of `clean`.
    """

    folder: Path
    clean: ImageDataset

    def __post_init__(self) -> None:
        if not (self.folder / "labels.npy").is_file() or not self.corruptions:
            raise ValueError(
                f"Expected the folder of CIFAR-10-C, with labels.npy and images, got {str(self.folder)!r}."
            )
        labels, n = self._load("labels"), len(self.clean)
        if len(labels) != n * len(SEVERITIES) or not np.array_equal(
            labels, np.tile(self.clean.labels, len(SEVERITIES))
        ):
            raise ValueError(
                f"Expected the dataset to be the images that {self.folder} corrupts, in its order: {len(labels)} labels of "
                f"five severities there, {n} images in the dataset"
                + (", of other labels." if len(labels) == n * len(SEVERITIES) else ".")
            )

    @property
    def corruptions(self) -> list[str]:
        """The corruptions in the folder."""
        return sorted(file.stem for file in self.folder.glob("*.npy") if file.stem != "labels")

    def images(self, corruption: str, severity: int) -> ImageDataset:
        """The test images under one corruption at one severity.

        Raises:
            ValueError: If the file does not hold images of five severities.
        """
        images, n = self._load(corruption), len(self.clean)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) != n * len(SEVERITIES):
            raise ValueError(
                f"Expected {n * len(SEVERITIES)} images (H, W, 3) in uint8 in {corruption}.npy, got {images.shape} in {images.dtype}."
            )
        part = slice(n * (severity - 1), n * severity)
        return ImageDataset(images[part], self.clean.labels, self.clean.label_names)

    def _load(self, name: str) -> np.ndarray:
        """Open an array as a memory map."""
        try:
            return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"Cannot read {self.folder / name}.npy: {error}") from error
