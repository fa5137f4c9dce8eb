"""Hub-ready folders: what a checkpoint consists of, written so that it is whole or absent."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import ViTImageProcessor
from transformers.utils import logging as transformers_logging

from .modeling import VisualPerceiverConfig, VisualPerceiverForImageClassification


# timm's names of resampling filters, as PIL's numbers, which preprocessor_config.json holds.
RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def create_image_processor(config: VisualPerceiverConfig) -> ViTImageProcessor:
    """The processor that prepares images as timm does for the same checkpoint."""
    cfg = config.timm_pretrained_cfg
    height, width = config.image_height_width
    return ViTImageProcessor(
        size={"height": height, "width": width},
        resample=RESAMPLING[cfg["interpolation"]],
        image_mean=list(cfg["mean"]),
        image_std=list(cfg["std"]),
    )


def save_folder(
    model: VisualPerceiverForImageClassification, folder: str | Path, files: dict[str, Any] | None = None
) -> Path:
    """Save a checkpoint that transformers, timm and the Hub can load: config, weights, processor and code.

    Args:
        model: What to save.
        folder: Replaced if it is there already, once the new one is complete.
        files: More text files, by name.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    verbosity = transformers_logging.get_verbosity()
    try:
        transformers_logging.set_verbosity_error()
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        model.save_pretrained(aside)
        if bars:
            transformers_logging.enable_progress_bar()
        create_image_processor(model.config).save_pretrained(aside)
        for name, text in (files or {}).items():
            (aside / name).write_text(text)
        aside.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
    finally:
        transformers_logging.set_verbosity(verbosity)
        shutil.rmtree(aside, ignore_errors=True)
    return folder
