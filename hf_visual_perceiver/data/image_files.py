"""Images given to a command: files, folders of files, or one image on stdin."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from hf_visual_perceiver.modeling.handler import open_image


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
STDIN = "-"


def list_images(names: Sequence[str]) -> list[str]:
    """List the image files that `names` stand for: files as they are, and the image files in folders.

    Raises:
        ValueError: If a folder has no images, a name is a URL, or stdin is named twice.
    """
    files: list[str] = []
    for name in names:
        if re.match(r"[a-z][a-z0-9+.-]*://", name, flags=re.IGNORECASE):
            raise ValueError(f"Expected image files, folders or - for stdin, got the URL {name!r}; download it first.")
        if Path(name).is_dir():
            found = sorted(p for p in Path(name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise ValueError(f"Expected images in {name}, found none.")
            files += map(str, found)
        else:
            files.append(name)
    if files.count(STDIN) > 1:
        raise ValueError(f"Expected one image on stdin, got {files.count(STDIN)} times -.")
    return files


def read_image(name: str) -> Image.Image:
    """Read an RGB image.

    Raises:
        ValueError: If it cannot be read; the message names the file.
    """
    try:
        if name == STDIN:
            return open_image(sys.stdin.buffer.read())
        with open(name, "rb") as file:
            return open_image(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot read {'stdin' if name == STDIN else name} as an image: {error}") from error
