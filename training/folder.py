"""Hub-ready checkpoint folders, written atomically."""

from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from hf_visual_perceiver.data.image_processor import create_image_processor
from hf_visual_perceiver.training.timm_network import TimmNetwork
from hf_visual_perceiver.utils.files import folder_written_aside


def save_folder(
    model: Any,
    folder: str | Path,
    files: dict[str, str] | None = None,
) -> Path:
    """Save a checkpoint that transformers, timm and the Hub can load: config, weights, processor and code.

    Args:
        model: The model to save. A timm network gets no processor file, as transformers reads it from the config.
        folder: Target folder. A checkpoint that it holds is replaced once the new one is complete.
        files: Additional text files, by name.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder holds something other than a checkpoint.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "config.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"Expected {folder} to be new, empty or a checkpoint; it holds something else.")
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        with folder_written_aside(folder) as aside:
            model.save_pretrained(aside)
            if not isinstance(model, TimmNetwork):
                create_image_processor(model.config).save_pretrained(aside)
            for name, text in (files or {}).items():
                (aside / name).write_text(text)
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    return folder
