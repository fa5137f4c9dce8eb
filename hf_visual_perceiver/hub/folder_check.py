"""Checks that a checkpoint's folder gives the same logits when it is loaded in three ways."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_visual_perceiver.inference.loading import load_model
from hf_visual_perceiver.modeling import ElasticConfig


# timm and other machines may compute in another order; differences above rounding errors mean another model.
TOLERANCE = 1e-4


def check_folder(folder: Path, timeout: float = 300) -> dict[str, float]:
    """Load a folder with this package, with its own code without this package, and with timm, and compare the logits.

    The folder's own code runs in a separate process in which this package and timm cannot be imported, with no token in
    its environment, without access to the Hub, and with its own cache. `trust_remote_code` is only turned on there, for
    the folder that its owner asked to publish.

    Args:
        folder: A Hub-ready checkpoint with a handler.py.
        timeout: Time limit of that process in seconds.

    Returns:
        The largest difference of a logit from this package's, for each of the other ways of loading.

    Raises:
        ValueError: If the folder cannot be loaded in one of the ways, or its logits differ.

    Example:
        >>> check_folder(Path("checkpoints/visual_perceiver_nano_cifar10"))  # doctest: +SKIP
        {'transformers, without this package': 0.0, 'timm': 0.0}
    """
    model = load_model(str(folder))
    config = model.config
    height, width = config.image_height_width
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(4, config.num_channels, height, width, generator=generator)
    points = check_points(config)
    with torch.no_grad():
        expected = [model(pixels, **point).logits for point in points]
    found = {
        "transformers, without this package": _logits_without_package(folder, pixels, points, timeout),
        "timm": _logits_of_timm(folder, pixels, points),
    }
    differences = {}
    for way, logits in found.items():
        worst = 0.0
        for point, ours, theirs in zip(points, expected, logits, strict=True):
            difference = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"Expected equal logits of {folder} when loaded by {way}, got a difference of {difference:.2g} at "
                    f"{point or 'its defaults'}."
                )
            worst = max(worst, difference)
        differences[way] = worst
    return differences


def check_points(config: ElasticConfig) -> list[dict[str, Any]]:
    """The arguments to compare at: the folder's default budget, the full network, a middle budget, an adaptive one."""
    budgets, adaptive = config.budgets(), config.adaptive_budgets()
    some = [budgets[len(budgets) // 2], *adaptive[len(adaptive) // 2 :][:1]]
    return [{}, config.resolve(), *(budget.kwargs for budget in some)]


def _logits_of_timm(folder: Path, pixels: torch.Tensor, points: list[dict[str, Any]]) -> list[torch.Tensor]:
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise ValueError(f"timm cannot load {folder}: {str(error).strip().splitlines()[0]}") from error
    with torch.no_grad():
        return [model(pixels, **point) for point in points]


def _logits_without_package(
    folder: Path, pixels: torch.Tensor, points: list[dict[str, Any]], timeout: float
) -> list[torch.Tensor]:
    script = Path(__file__).with_name("without_package.py").read_text()
    with tempfile.TemporaryDirectory(prefix="visual-perceiver-check-") as scratch:
        inputs, outputs = Path(scratch, "inputs.safetensors"), Path(scratch, "outputs.safetensors")
        metadata = {"points": json.dumps(points), "threads": str(torch.get_num_threads())}
        save_file({"pixel_values": pixels}, inputs, metadata=metadata)
        environment = {name: value for name, value in os.environ.items() if "TOKEN" not in name.upper()}
        environment |= {"HF_HOME": scratch, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(scratch, "modules"))}
        try:
            process = subprocess.run(
                [sys.executable, "-c", script, str(folder.resolve()), str(inputs), str(outputs)],
                env=environment,
                cwd=scratch,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"Loading {folder} without this package took more than {timeout:g} seconds.") from error
        if process.returncode:
            last = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"Without this package, transformers cannot load {folder}: {last}")
        logits = load_file(outputs)
    return [logits[str(i)] for i in range(len(points))]
