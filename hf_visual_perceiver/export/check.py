"""Checks that an exported file gives the same results as the model, at several budgets."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from hf_visual_perceiver.modeling import Budget
from hf_visual_perceiver.modeling.elastic import reference_model


TOLERANCE = 1e-4  # largest difference of a logit, for logits of order one
INT8_TOLERANCE = 0.25  # mean difference of a logit, in standard deviations of the logits


@torch.inference_mode()
def check_export(classify: Callable[..., Any], model: Any, fixed: dict[str, Any] | None = None) -> float:
    """Compare an exported classifier with its model, on images drawn from a fixed seed.

    Args:
        classify: The exported classifier, called with pixels (B, C, H, W) and the knobs.
        model: The classifier that was exported.
        fixed: Knobs that are fixed in the graph.

    Returns:
        The largest difference of a logit.

    Raises:
        ValueError: If a logit differs by more than `TOLERANCE` (times the largest logit, if that is above 1), or the
            graph reports another usage, such as other active queries.
    """
    reference, largest = reference_model(model), 0.0
    for pixels in check_images(model, (1, 3)):
        for budget in checked_budgets(reference, pixels, fixed):
            knobs = model.config.resolve(**budget.kwargs)
            expected, given = reference(pixels, **knobs), classify(pixels, **knobs)
            difference = (given.logits - expected.logits).abs().max().item()
            where = f"for {len(pixels)} images at {budget.short(model.config.knobs)}"
            if not difference <= TOLERANCE * max(1.0, expected.logits.abs().max().item()):  # nor NaN
                raise ValueError(
                    f"Expected the exported logits to equal PyTorch's, got a difference of {difference:.3g} {where}."
                )
            for name, value in getattr(given, "records", {}).items():
                if not value.equal(getattr(expected, name)):
                    raise ValueError(
                        f"Expected the exported graph to use the same {model.config.unit} as PyTorch, got others {where}."
                    )
            largest = max(largest, difference)
    return largest


@torch.inference_mode()
def check_quantised(classify: Callable[..., Any], model: Any, fixed: dict[str, Any] | None = None) -> float:
    """Check that a quantised classifier is still close to the model; its accuracy has to be measured on data.

    Returns:
        The mean difference of a logit, in standard deviations of the model's logits: the largest over budgets.

    Raises:
        ValueError: If that is above `INT8_TOLERANCE`.
    """
    reference, largest, config = reference_model(model), 0.0, model.config
    (pixels,) = check_images(model, (16,))
    for budget in checked_budgets(reference, pixels, fixed):
        if config.is_adaptive(budget):
            continue
        knobs = config.resolve(**budget.kwargs)
        expected, given = reference(pixels, **knobs).logits, classify(pixels, **knobs).logits
        difference = ((given - expected).abs().mean() / expected.std()).item()
        if not difference <= INT8_TOLERANCE:
            raise ValueError(
                f"Expected int8 logits within {INT8_TOLERANCE:g} deviations of float32's on average, "
                f"got {difference:.3g} at {budget.short(config.knobs)}; quantising changes the answers of this model too much."
            )
        largest = max(largest, difference)
    return largest


def checked_budgets(model: Any, pixel_values: torch.Tensor, fixed: dict[str, Any] | None) -> list[Budget]:
    """The budgets to compare at, with the fixed knobs applied."""
    return list(dict.fromkeys(Budget(**{**b.kwargs, **(fixed or {})}) for b in model.check_budgets(pixel_values)))


def check_images(model: Any, batches: tuple[int, ...]) -> list[torch.Tensor]:
    """Batches of random normalised images; they are smooth, since pure noise looks the same to most queries."""
    generator = torch.Generator().manual_seed(0)
    height, width = model.config.image_height_width
    images = []
    for batch in batches:
        coarse = torch.randn(batch, model.config.num_channels, 5, 5, generator=generator)
        images.append(F.interpolate(coarse, size=(height, width), mode="bilinear"))
    return images
