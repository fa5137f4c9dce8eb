"""Serve the folder that this file lies in as a Hugging Face Inference Endpoint.

The endpoint loads this file by its path and calls `EndpointHandler(folder)` once, then the object for every request:

    {"inputs": "<an image in base64>", "parameters": {"num_active_queries": 16, "dqs_threshold": 0.8, "top_k": 3}}

The handler opens no files outside the folder and no sockets: images come in the request, never as addresses. On a CPU with the
packages hf_visual_perceiver and onnxruntime, ONNX Runtime computes the same answers faster.
"""

import base64
import binascii
import io
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification


# 100 MB after decoding. A small file can hold a huge image, so the size is checked before decoding.
MAX_PIXELS = 2**25
# The largest numbers of 1 to 4 bytes; the last is signed, as Pillow's integers are.
WHOLE_BYTES = (2**8 - 1, 2**16 - 1, 2**24 - 1, 2**31 - 1)


class EndpointHandler:
    """Classify the images of a request, at the compute budget that the request asks for.

    Args:
        path: The checkpoint's folder, on this machine.

    Raises:
        ValueError: If there is no such folder.
    """

    def __init__(self, path: str = ""):
        if not (Path(path) / "config.json").is_file():
            raise ValueError(f"Expected the folder of a checkpoint, got {str(path)!r}.")
        # The endpoint already runs this file of the folder, so trusting the other files adds no risk.
        model = AutoModelForImageClassification.from_pretrained(path, trust_remote_code=True, use_safetensors=True)
        self.processor = AutoImageProcessor.from_pretrained(path)
        self.model = model.eval().cuda() if torch.cuda.is_available() else on_cpu(model.eval(), path)

    def __call__(self, data: dict[str, Any]) -> list[Any]:
        """Answer one request.

        Args:
            data: `inputs`: an image, or a list of images, each as base64 text, bytes or PIL image. `parameters`, all
                optional: the knobs, such as `num_active_queries` (by default those of config.json), and `top_k` (5).

        Returns:
            For one image its most probable labels, `[{"label": ..., "score": ..., "queries_used": ...}, ...]`; for a
            list of images a list of these.

        Raises:
            ValueError: If the request is not as described; the endpoint answers it with the message and status 400.
        """
        if "inputs" not in data:
            raise ValueError(f"Expected `inputs` in the request, got {sorted(data)}.")
        config = self.model.config
        knobs, top_k = read_parameters(data.get("parameters") or {}, list(config.knobs.values()))
        inputs = data["inputs"]
        images = [open_image(image) for image in (inputs if isinstance(inputs, list) else [inputs])]
        if not images:
            raise ValueError("Expected at least one image in `inputs`, got an empty list.")
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            output = self.model(pixels.to(self.model.device), **knobs)
        scores, labels = output.logits.float().softmax(-1).topk(min(top_k, output.logits.shape[-1]))
        used = output.used.tolist()
        names = config.label_names
        answers = [
            [{"label": names[i], "score": p, f"{config.unit}_used": used[b]} for p, i in zip(*row, strict=True)]
            for b, row in enumerate(zip(scores.tolist(), labels.tolist(), strict=True))
        ]
        return answers if isinstance(inputs, list) else answers[0]


def on_cpu(model: Any, path: str) -> Any:
    """The network in ONNX Runtime if that is installed and its logits agree with the model's; otherwise the model.

    Args:
        model: The model, loaded by the folder's code.
        path: The folder.
    """
    try:
        from hf_visual_perceiver.inference.loading import load_optimized

        fast = load_optimized(path)
        height, width = model.config.image_height_width
        image = torch.linspace(-1, 1, model.config.num_channels * height * width).reshape(1, -1, height, width)
        with torch.inference_mode():
            logits, expected = fast(image).logits, model(image.to(model.dtype)).logits.float()
        # The package's version may differ from that of the folder's code, to which the weights belong.
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    except (ImportError, ValueError, AssertionError) as error:
        logging.getLogger(__name__).info("Answers come from PyTorch: %s", error)
        return model
    return fast


def read_parameters(parameters: dict[str, Any], knobs: list[str]) -> tuple[dict[str, Any], int]:
    """Knobs and `top_k` of a request. Numbers may be text, as parameters in an address are.

    Example:
        >>> read_parameters({"dqs_threshold": "0.8"}, ["num_active_queries", "dqs_threshold"])
        ({'dqs_threshold': 0.8}, 5)
    """
    if unknown := sorted(set(parameters) - {*knobs, "top_k"}):
        raise ValueError(f"Expected `parameters` among {', '.join([*knobs, 'top_k'])}, got {unknown}.")
    values: dict[str, Any] = {}
    for name, value in parameters.items():
        try:
            values[name] = _number(value) if isinstance(value, str) else value
        except ValueError as error:
            raise ValueError(f"Expected `{name}` to be a number, got {value!r}.") from error
    top_k = values.pop("top_k", 5)
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise ValueError(f"Expected `top_k` to be an integer of at least 1, got {top_k!r}.")
    return {name: value for name, value in values.items() if value is not None}, top_k


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def open_image(image: Any) -> Image.Image:
    """An upright RGB image of base64 text, bytes, a binary file or a PIL image.

    A JPEG of more than `MAX_PIXELS` pixels is reduced to a half, a quarter or an eighth of its sides while it is decoded.

    Raises:
        ValueError: If the image cannot be read, has more than `MAX_PIXELS` pixels, or has values that `to_rgb` does not take.
    """
    if isinstance(image, str):
        try:
            image = base64.b64decode(image.partition("base64,")[2] or image, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"Expected an image in base64, got text that is not: {error}.") from error
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    if isinstance(image, Image.Image):
        return _decode(image)
    if not hasattr(image, "read"):
        raise ValueError(f"Expected an image as base64 text, bytes or PIL image, got {type(image).__name__}.")
    return _read(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB.

    Pillow's `convert` clips grey of more than 8 bits to white; here it is scaled. The range of a mode's values is taken
    to be:

    - I;16, in either byte order: 0 to 65,535.
    - I, integers of 32 bits: 0 to the largest number of as few whole bytes as hold the image's largest value.
    - F, floats: 0 to 1 if no value is above 1, otherwise as for I.

    Raises:
        ValueError: If values are out of that range, infinite or not a number.

    Example:
        >>> to_rgb(Image.new("I;16", (1, 1), 257 * 100)).getpixel((0, 0))
        (100, 100, 100)
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image.convert("RGB")
    values = np.asarray(image).astype(np.float32)
    low, high = values.min(), values.max()
    ranges = {"I": WHOLE_BYTES, "F": (1, *WHOLE_BYTES)}.get(image.mode, (65535,))
    white = next((most for most in ranges if high <= most), None)
    if white is None or not low >= 0:  # NaN fails both
        raise ValueError(
            f"Expected values from 0 to {ranges[-1]:,} in a grey image of mode {image.mode}, got {low:g} to {high:g}."
        )
    return Image.fromarray(np.round(values * (255 / white)).astype(np.uint8)).convert("RGB")


def _read(file: BinaryIO) -> Image.Image:
    with _reading():
        image = Image.open(file)
    with image:
        width, height = image.size
        divisors = (d for d in (1, 2, 4, 8) if math.ceil(width / d) * math.ceil(height / d) <= MAX_PIXELS)
        divisor = next(divisors, 1)
        if divisor > 1:
            image.draft(None, (width // divisor, height // divisor))  # affects JPEG only
        return _decode(image)


def _decode(image: Image.Image) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(f"{width}x{height}")
    with _reading():
        image = ImageOps.exif_transpose(image)  # upright, as transformers' pipelines take it
    return to_rgb(image)


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except Image.DecompressionBombError:
        raise _too_large("more than Pillow opens") from None
    except Exception as error:  # Pillow raises nearly every kind of exception for broken bytes
        raise ValueError(f"damaged, or no image: {error}") from error


def _too_large(found: str) -> ValueError:
    return ValueError(f"Expected an image of at most {MAX_PIXELS:,} pixels, got {found}.")
