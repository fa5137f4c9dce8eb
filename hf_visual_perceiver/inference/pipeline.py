"""Image classification at a chosen compute budget, as a task for transformers' `pipeline`."""

import math
import os
from collections.abc import Mapping
from typing import Any

from huggingface_hub.utils import get_session
from PIL import Image
from transformers import ImageClassificationPipeline
from transformers.modeling_outputs import ModelOutput

from hf_visual_perceiver.modeling import Budget
from hf_visual_perceiver.modeling.handler import open_image
from hf_visual_perceiver.modeling.query_selection import as_number


TASK = "adaptive-image-classification"


class AdaptiveImageClassificationPipeline(ImageClassificationPipeline):
    """`image-classification` with additional arguments, for the pipeline or for a call, and one more result.

    - The knobs of the model, such as `num_active_queries` and `dqs_threshold`.
    - `target_macs`: instead of a budget, a fraction in (0, 1] of the full network's multiply-accumulates; the largest
      budget within it is used.

    Besides `label` and `score`, each result has the image's usage, such as `queries_used`.

    Raises:
        ValueError: If a budget and `target_macs` are both given, a value is out of range, or an image is too large.

    Example:
        >>> import hf_visual_perceiver
        >>> from hf_visual_perceiver.inference.loading import default_model
        >>> from PIL import Image
        >>> from transformers import pipeline
        >>> classifier = pipeline("adaptive-image-classification", model=default_model())
        >>> classifier(Image.new("RGB", (32, 32)), target_macs=0.25, top_k=1)[0]["queries_used"]
        2
    """

    # The four steps of a pipeline. As in other tasks, the arguments are named where the base class has `**kwargs`.

    def _sanitize_parameters(  # type: ignore[override]
        self, target_macs: float | None = None, **arguments: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        knobs = {name: arguments.pop(name, None) for name in self.model.config.knobs.values()}
        preprocess, _, postprocess = super()._sanitize_parameters(**arguments)  # TypeError for unknown arguments
        given = {**knobs, "target_macs": target_macs}
        return preprocess, {name: value for name, value in given.items() if value is not None}, postprocess

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:  # type: ignore[override]
        """Prepare the pixels of an image: a PIL image, a file name, base64 text or a URL, which is fetched."""
        if isinstance(image, Image.Image):
            image = open_image(image)
        elif isinstance(image, str) and os.path.isfile(image):
            with open(image, "rb") as file:
                image = open_image(file)
        elif isinstance(image, str) and image.startswith(("http://", "https://")):
            # transformers would also fetch it, but would clip high-bit-depth greyscale images.
            image = open_image(get_session().get(image, timeout=timeout, follow_redirects=True).content)
        elif isinstance(image, str):
            try:
                image = open_image(image)
            except ValueError as error:
                raise ValueError(
                    f"Expected a file, a URL or an image in base64, got {image[:80]!r}: {error}"
                ) from error
        return super().preprocess(image, timeout=timeout)

    def _forward(self, model_inputs: Any, target_macs: float | None = None, **knobs: Any) -> Any:  # type: ignore[override]
        if target_macs is not None:
            config: Any = self.model.config
            knobs = config.resolve(**budget_for_macs(config, target_macs, knobs).kwargs)
        output = self.model(**model_inputs, **knobs)
        return ModelOutput(logits=output.logits, used=output.used)

    def postprocess(  # type: ignore[override]
        self, model_outputs: Any, function_to_apply: Any = None, top_k: int | None = 5
    ) -> list[dict[str, Any]]:
        """Return the stock pipeline's labels and scores, each with the image's usage."""
        used = int(model_outputs["used"][0])
        answers = super().postprocess(model_outputs, function_to_apply=function_to_apply, top_k=top_k)
        return [{**answer, f"{self.model.config.unit}_used": used} for answer in answers]


def budget_for_macs(config: Any, share: float, knobs: Mapping[str, Any] | None = None) -> Budget:
    """Find the largest budget that costs at most a share of the full network's multiply-accumulates.

    Args:
        config: The model's config.
        share: Share of the full network's multiply-accumulates, in (0, 1].
        knobs: Further knobs, such as a threshold; by default those of the config's default budget that make it
            adaptive. Their cost is counted and their savings are not, so that every image stays within the target.

    Raises:
        ValueError: If the share is out of range or too small for any budget, or a knob is given that the share sets.

    Example:
        >>> from hf_visual_perceiver import VisualPerceiverConfig
        >>> budget_for_macs(VisualPerceiverConfig(num_labels=10), 0.25)
        Budget(num_active_queries=15)
    """
    share = as_number(share)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ValueError(f"Expected `target_macs` to be in (0, 1], got {share!r}.")
    turned = {name for budget in config.ladder() for name in budget.kwargs}
    given = {name: value for name, value in (knobs or {}).items() if value is not None}
    if both := turned & given.keys():
        names = ", ".join(sorted(both))
        raise ValueError(f"Expected `{names}` or `target_macs`, got both: {given[min(both)]} and {share}.")
    own = {name: value for name, value in config.default_budget.kwargs.items() if name not in turned}
    budget = config.budget_for(share, **{**own, **given})
    least, full = config.count_macs(budget), config.count_macs(Budget())
    if least > share * full:
        least_share = math.ceil(1e4 * least / full) / 1e4
        raise ValueError(
            f"Expected `target_macs` to be at least {least_share}, the cost of the smallest budget, got {share!r}."
        )
    return budget
