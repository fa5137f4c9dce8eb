"""Classification of images with a model and its image processor."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from hf_visual_perceiver.data.image_processor import create_image_processor
from hf_visual_perceiver.inference.cascade import Cascade
from hf_visual_perceiver.modeling import Budget


@torch.inference_mode()
def classify(
    model: Any, images: Sequence[Image.Image], budget: Budget | Cascade | None, top_k: int
) -> list[dict[str, Any]]:
    """Classify images; returns for each the most probable labels, its usage in the config's `unit`, and its MACs.

    Args:
        model: A model in eval mode.
        images: RGB images.
        budget: The budget, or a cascade of the model; None is the model's default budget.
        top_k: Number of labels per image.
    """
    config = model.config
    names, budget = config.label_names, config.default_budget if budget is None else budget
    pixels = create_image_processor(config)(images=list(images), return_tensors="pt")["pixel_values"]
    pixels = pixels.to(model.device, model.dtype)
    if isinstance(budget, Cascade):
        output = budget(pixels)
        macs = torch.tensor(budget.count_macs())[output.stage.cpu()]
    else:
        output = model(pixels, **config.resolve(**budget.kwargs))
        macs = config.count_macs(budget, output)
    probabilities, labels = output.logits.float().softmax(-1).topk(min(top_k, len(names)))
    rows = zip(labels, probabilities, output.used.tolist(), macs.tolist(), strict=True)
    return [
        {
            "labels": {names[i]: p for i, p in zip(indices.tolist(), ps.tolist(), strict=True)},
            "used": used,
            "macs": macs,
        }
        for indices, ps, used, macs in rows
    ]
