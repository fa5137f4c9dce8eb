"""Image classification at a chosen compute budget, as a task of transformers' `pipeline`."""

import math
import os
from bisect import bisect_right
from typing import Any

from huggingface_hub.utils import get_session
from PIL import Image
from transformers import ImageClassificationPipeline

from hf_visual_perceiver.modeling import VisualPerceiverConfig, count_macs
from hf_visual_perceiver.modeling.handler import open_image
from hf_visual_perceiver.modeling.query_selection import as_number


TASK = "adaptive-image-classification"


class AdaptiveImageClassificationPipeline(ImageClassificationPipeline):
    """`image-classification` with three more arguments, of the pipeline or of a call, and one more result.

    - `num_active_queries`: K, use the first K queries.
    - `dqs_threshold`: t, drop per image the queries more similar than this to an earlier one.
    - `target_macs`: instead of K, a fraction in (0, 1] of the multiply-accumulates that all queries take; the largest K
      that fits is used.

    Each answer has, beside `label` and `score`, `queries_used`: how many queries its image used.

    Raises:
        ValueError: If K and `target_macs` are both given, a value is out of its range, or an image is too large.

    Example:
        >>> import hf_visual_perceiver
        >>> from hf_visual_perceiver.inference.loading import default_model
        >>> from PIL import Image
        >>> from transformers import pipeline
        >>> classifier = pipeline("adaptive-image-classification", model=default_model())
        >>> classifier(Image.new("RGB", (32, 32)), target_macs=0.25, top_k=1)[0]["queries_used"]
        15
    """

    # The four steps of a pipeline; each task names its own arguments where the base class has `**kwargs`.

    def _sanitize_parameters(  # type: ignore[override]
        self,
        num_active_queries: int | None = None,
        dqs_threshold: float | None = None,
        target_macs: float | None = None,
        **stock: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess, _, postprocess = super()._sanitize_parameters(**stock)  # a TypeError for what is unknown
        given = {
            "num_active_queries": num_active_queries,
            "dqs_threshold": dqs_threshold,
            "target_macs": target_macs,
        }
        return preprocess, {name: value for name, value in given.items() if value is not None}, postprocess

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:  # type: ignore[override]
        """Pixels of a picture: a PIL image, a file's name, base64 text or an address, which is fetched."""
        if isinstance(image, Image.Image):
            image = open_image(image)
        elif isinstance(image, str) and os.path.isfile(image):
            with open(image, "rb") as file:
                image = open_image(file)
        elif isinstance(image, str) and image.startswith(("http://", "https://")):
            # transformers would fetch it too, but clip deep grey.
            image = open_image(get_session().get(image, timeout=timeout, follow_redirects=True).content)
        elif isinstance(image, str):
            try:
                image = open_image(image)
            except ValueError as error:
                raise ValueError(
                    f"Expected a file, an address or an image in base64, got {image[:80]!r}: {error}"
                ) from error
        return super().preprocess(image, timeout=timeout)

    def _forward(  # type: ignore[override]
        self,
        model_inputs: Any,
        num_active_queries: int | None = None,
        dqs_threshold: float | None = None,
        target_macs: float | None = None,
    ) -> Any:
        if target_macs is not None:
            if num_active_queries is not None:
                raise ValueError(
                    f"Expected `num_active_queries` or `target_macs`, got both: {num_active_queries} and {target_macs}."
                )
            selects = self.model.config.operating_point(None, dqs_threshold)[1] is not None
            num_active_queries = queries_for_macs(self.model.config, target_macs, selects)
        return self.model(**model_inputs, num_active_queries=num_active_queries, dqs_threshold=dqs_threshold)

    def postprocess(  # type: ignore[override]
        self, model_outputs: Any, function_to_apply: Any = None, top_k: int | None = 5
    ) -> list[dict[str, Any]]:
        """Labels and scores as the stock pipeline gives them, with `queries_used` in each."""
        used = int(model_outputs["active_queries"][0].sum())
        answers = super().postprocess(model_outputs, function_to_apply=function_to_apply, top_k=top_k)
        return [{**answer, "queries_used": used} for answer in answers]


def queries_for_macs(config: VisualPerceiverConfig, fraction: float, selects: bool = False) -> int:
    """The largest K whose multiply-accumulates are at most `fraction` of those of all Q queries.

    Args:
        config: The model's config.
        fraction: In (0, 1].
        selects: Count what Dynamic Query Selection costs as well. It is counted as if it dropped nothing, so that
            every image stays below the target; with it, K is below Q even at a fraction of 1.

    Raises:
        ValueError: If the fraction is out of its range, or too small for one query.

    Example:
        >>> queries_for_macs(VisualPerceiverConfig(num_labels=10), 0.25)
        15
    """
    fraction = as_number(fraction)
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise ValueError(f"Expected `target_macs` to be in (0, 1], got {fraction!r}.")
    full = count_macs(config, config.num_queries)

    def share(K: int) -> float:
        return count_macs(config, K, K if selects else None) / full

    # MACs grow with K.
    K = bisect_right(range(1, config.num_queries + 1), fraction, key=share)
    if K == 0:
        raise ValueError(
            f"Expected `target_macs` to be at least {math.ceil(1e4 * share(1)) / 1e4}, which one query takes, got {fraction!r}."
        )
    return K
