"""What a model says of some images."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from hf_visual_perceiver.data.image_processor import create_image_processor
from hf_visual_perceiver.modeling import OptimizedVisualPerceiver, VisualPerceiverForImageClassification, count_macs


@torch.inference_mode()
def classify(
    model: VisualPerceiverForImageClassification | OptimizedVisualPerceiver,
    images: Sequence[Image.Image],
    num_active_queries: int | None,
    dqs_threshold: float | None,
    top_k: int,
) -> list[dict[str, Any]]:
    """The most probable labels of each image, and what it cost."""
    names = model.config.label_names
    pixels = create_image_processor(model.config)(images=list(images), return_tensors="pt")["pixel_values"]
    K, t = model.config.operating_point(num_active_queries, dqs_threshold)
    output = model(pixels.to(model.device, model.dtype), num_active_queries=K, dqs_threshold=t)
    probabilities, labels = output.logits.float().softmax(-1).topk(min(top_k, len(names)))
    return [
        {
            "labels": {names[i]: p for i, p in zip(indices.tolist(), ps.tolist(), strict=True)},
            "queries_used": used,
            "macs": count_macs(model.config, used, None if t is None else K),
        }
        for indices, ps, used in zip(labels, probabilities, output.active_queries.sum(1).tolist(), strict=True)
    ]
