"""Load a checkpoint's folder with transformers but without this package, and save the logits.

`folder_check.py` runs this as source text in a separate process, so it imports nothing from this package:

    python -c "$(cat without_package.py)" FOLDER INPUTS OUTPUTS

INPUTS is a safetensors file with `pixel_values`; its metadata hold the operating points. OUTPUTS receives the logits.
"""

import base64
import importlib.util
import io
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


class Hidden:
    """Hides this package and timm from imports, even if they are installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] in ("hf_visual_perceiver", "timm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(folder: str, inputs: str, outputs: str) -> None:
    """Compute the logits at every operating point, and check a request to the folder's handler.py."""
    sys.meta_path.insert(0, Hidden())
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

    with safe_open(inputs, "pt") as file:
        pixels, points = file.get_tensor("pixel_values"), json.loads(file.metadata()["points"])
        torch.set_num_threads(int(file.metadata()["threads"]))  # as in the process whose logits are compared
    # Its code is trusted because the user asked to publish this folder; this process checks whether that code works.
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, use_safetensors=True).eval()
    base = AutoModel.from_pretrained(folder, trust_remote_code=True, use_safetensors=True).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    height, width = model.config.image_height_width
    picture = Image.new("RGB", (width + 7, height + 3), (200, 120, 40))
    if tuple(processor(images=picture, return_tensors="pt")["pixel_values"].shape[2:]) != (height, width):
        raise ValueError(f"Expected the folder's processor to make {height}x{width} images.")
    with torch.no_grad():
        logits = {str(i): model(pixels, **point).logits for i, point in enumerate(points)}
        alone, inside = base(pixels), model.base_model(pixels)
        if not all(torch.equal(alone[name], inside[name]) for name in ("last_hidden_state", "pooler_output")):
            raise ValueError("Expected AutoModel and AutoModelForImageClassification to load the same weights.")
    save_file(logits, outputs)

    # Load the handler as an Inference Endpoint does.
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", Path(folder) / "handler.py")
    assert spec is not None
    assert spec.loader is not None
    handler = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(handler)
    png = io.BytesIO()
    picture.save(png, "png")
    request = {"inputs": base64.b64encode(png.getvalue()).decode(), "parameters": points[2]}
    answer = handler.EndpointHandler(folder)(request)
    with torch.no_grad():
        pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
        used = int(model(pixels, **points[2]).used[0])
    if answer[0][f"{model.config.unit}_used"] != used:
        raise ValueError(f"Expected handler.py to use {used} {model.config.unit} when asked to, got {answer[0]}.")


if __name__ == "__main__":
    main(*sys.argv[1:])
