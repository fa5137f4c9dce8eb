"""The computations of the app for one image: attention, selected queries, prediction, cost and time.

Shapes: Q learned queries, (h, w) patches.
"""

import math
import statistics
import time
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from PIL import Image

from hf_visual_perceiver.benchmark.timing import interleaved, median_ratio
from hf_visual_perceiver.data.image_processor import create_image_processor
from hf_visual_perceiver.evaluation.evaluate import Evaluation, read_evaluation
from hf_visual_perceiver.hub.page import EXAMPLES, PICTURES
from hf_visual_perceiver.inference.loading import load_model
from hf_visual_perceiver.modeling import Budget, ElasticConfig
from hf_visual_perceiver.modeling.query_selection import cosine_similarities


# Seconds that timing a setting should take: moving a knob has to feel immediate.
TIMING = 0.25
LEAST_REPETITIONS, MOST_REPETITIONS = 3, 7
# The files that the app downloads from a checkpoint's repository; its code is not among them.
READ = ["config.json", "model.safetensors", "evaluation.json", f"{EXAMPLES}/*"]
# The knobs that the app has sliders for.
SLIDERS = {"num_active_queries", "dqs_threshold"}


def check_sliders(config: ElasticConfig) -> None:
    """Raise a `ValueError` unless the app can show a model with this config."""
    if set(config.knobs.values()) != SLIDERS:
        knobs = f"the knobs {', '.join(config.knobs.values())}" if config.knobs else "no knobs"
        raise ValueError(
            "Expected a model with the knobs num_active_queries and dqs_threshold, for which the app has sliders, got "
            f"one with {knobs}."
        )


@dataclass(frozen=True)
class Picture:
    """An image, and everything that does not depend on the knobs.

    Attributes:
        pixels: (1, C, H, W), normalised.
        view: The model's input as an image of H x W pixels.
        attention: (Q, h, w) attention of each query: distributions over the patches, averaged over heads.
        similarities: (Q, Q) cosines between the queries' cross-attention outputs, which selection compares with t.
        full_probabilities: (labels,) probabilities with all queries.
        full_seconds: Approximate time with all queries, from which the number of repetitions is chosen.
    """

    pixels: torch.Tensor
    view: Image.Image
    attention: np.ndarray
    similarities: np.ndarray
    full_probabilities: np.ndarray
    full_seconds: float


@dataclass(frozen=True)
class Answer:
    """The result of one setting of the knobs on a picture.

    Attributes:
        num_active_queries: K.
        dqs_threshold: t; None is without selection.
        probabilities: (labels,).
        active: (Q,) bool, the queries in use.
        nearest: (Q,) for each query, the most similar of the queries that selection compares it with; 0 for the first.
        macs: Multiply-accumulates; with t they include the cross-attention and the comparison of all K.
        full_macs: Multiply-accumulates of all queries.
        seconds: Time of the setting, median over repetitions.
        full_seconds: Time of all queries, measured in turn with the setting, median over repetitions.
        relative_time: Ratio of the two times, median over repetitions.
        repetitions: How often both were timed.
    """

    num_active_queries: int
    dqs_threshold: float | None
    probabilities: np.ndarray
    active: np.ndarray
    nearest: np.ndarray
    macs: int
    full_macs: int
    seconds: float
    full_seconds: float
    relative_time: float
    repetitions: int


@dataclass(frozen=True)
class Expected:
    """The position of a setting on the trade-off curves, on average over a dataset.

    Attributes:
        macs: Mean multiply-accumulates per image.
        accuracy: Accuracy, as a fraction.
        measured: Whether exactly this setting was measured; otherwise it is interpolated between the nearest two.
    """

    macs: float
    accuracy: float
    measured: bool


class Demo:
    """A checkpoint to show in the app.

    Args:
        model: A Visual Perceiver in eval mode. The knobs start at its operating point.
        name: Name to display.
        evaluation: The checkpoint's evaluation, if there is one.
        examples: Example image files.

    Raises:
        ValueError: If the model has other knobs.

    Example:
        >>> from hf_visual_perceiver.inference.loading import default_model
        >>> demo = Demo.load(default_model())
        >>> picture = demo.look(Image.new("RGB", (32, 32)))
        >>> int(demo.answer(picture, num_active_queries=16).active.sum())
        16
    """

    def __init__(
        self,
        model: Any,
        name: str,
        evaluation: Evaluation | None = None,
        examples: list[Path] | None = None,
    ):
        self.model, self.name, self.evaluation, self.examples = model, name, evaluation, examples or []
        self.config = model.config
        check_sliders(self.config)
        self.start = self.config.operating_point()
        self.all_queries = self.config.resolve()
        self.processor = create_image_processor(self.config)

    @classmethod
    def load(cls, name: str, revision: str | None = None, device: str = "cpu") -> "Demo":
        """Load a checkpoint with its evaluation and examples, by folder or Hub id.

        Args:
            name: A folder or Hub id. Its code is not run.
            revision: Commit, tag or branch, for a Hub id.
            device: torch's name of the device.

        Raises:
            ValueError: If there is no such checkpoint, it is damaged, or its model has other knobs.
        """
        folder = Path(name)
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(name, revision=revision, allow_patterns=READ))
            except (OSError, ValueError, HFValidationError, HfHubHTTPError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ValueError(f"Expected a folder or Hub id of a checkpoint, got {name!r}: {reason}") from error
        measured = folder / "evaluation.json"
        return cls(
            load_model(str(folder), device),
            Path(name).resolve().name if Path(name).is_dir() else name,
            read_evaluation(measured) if measured.is_file() else None,
            sorted(p for p in (folder / EXAMPLES).glob("*") if p.suffix.lower() in PICTURES),
        )

    @cached_property
    def network(self) -> Any:
        """The network that is run and timed: the optimised form, or the model if that form's packages are missing."""
        try:
            return self.model.optimize_for_inference()
        except ImportError:
            return self.model

    @torch.inference_mode()
    def look(self, image: Image.Image) -> Picture:
        """Run all queries on an image.

        Args:
            image: An RGB image of any size.
        """
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"].to(self.model.device)
        y, attention = self.model.look(pixels)
        seconds = []
        for _ in range(3):  # the first warms up
            began = time.perf_counter()
            full = self._probabilities(self.network(pixels, **self.all_queries).logits)
            seconds.append(time.perf_counter() - began)
        return Picture(
            pixels=pixels,
            view=self._view(pixels),
            attention=attention[0].float().cpu().numpy(),  # (Q, h, w)
            similarities=cosine_similarities(y)[0].cpu().numpy(),
            full_probabilities=full,
            full_seconds=min(seconds),
        )

    @torch.inference_mode()
    def answer(
        self, picture: Picture, num_active_queries: int | None = None, dqs_threshold: float | None = None
    ) -> Answer:
        """Classify a picture with the first K queries, without those that selection drops at t, and time it.

        Raises:
            ValueError: If K or t is out of range.
        """
        budget = Budget(num_active_queries=num_active_queries, dqs_threshold=dqs_threshold)
        knobs = self.config.resolve(**budget.kwargs)
        K, t = knobs["num_active_queries"], None if dqs_threshold is None else knobs["dqs_threshold"]
        run = partial(self.network, picture.pixels, **knobs)
        output = run()
        active = output.active_queries[0].cpu().numpy()
        repetitions = max(LEAST_REPETITIONS, min(MOST_REPETITIONS, int(TIMING / (2 * picture.full_seconds))))
        runs = {"full": partial(self.network, picture.pixels, **self.all_queries), "setting": run}
        seconds = interleaved(runs, repetitions, self.model.device, progress=False)
        return Answer(
            num_active_queries=K,
            dqs_threshold=t,
            probabilities=self._probabilities(output.logits),
            active=active,
            nearest=self._nearest(picture.similarities, active),
            macs=int(self.config.count_macs(budget, output)[0]),
            full_macs=self.config.count_macs(Budget()),
            seconds=statistics.median(seconds["setting"]),
            full_seconds=statistics.median(seconds["full"]),
            relative_time=median_ratio(seconds["setting"], seconds["full"]),
            repetitions=repetitions,
        )

    def expected(self, num_active_queries: int, dqs_threshold: float | None = None) -> Expected | None:
        """Look up the accuracy and mean MACs at a setting.

        Between two measured K, or two measured t with all queries, both are interpolated; elsewhere the result is None.
        """
        rows = [] if self.evaluation is None else self.evaluation.rows
        Q, off = self.config.num_queries, math.inf
        points = [(self.config.resolve(**row.budget.kwargs), row.macs, row.accuracy) for row in rows]
        measured = [(p["num_active_queries"], p["dqs_threshold"], macs, accuracy) for p, macs, accuracy in points]
        t = off if dqs_threshold is None else dqs_threshold
        for K, threshold, macs, accuracy in measured:
            if (K, threshold) == (num_active_queries, t):
                return Expected(macs, accuracy, measured=True)
        if t == off:
            known = sorted((K, *rest) for K, threshold, *rest in measured if threshold == off)
            at: float = num_active_queries
        elif num_active_queries == Q:
            known = sorted((threshold, *rest) for K, threshold, *rest in measured if threshold != off and K == Q)
            at = t
        else:
            return None
        if not known or not known[0][0] <= at <= known[-1][0]:
            return None
        places, costs, accuracies = zip(*known, strict=True)
        return Expected(float(np.interp(at, places, costs)), float(np.interp(at, places, accuracies)), measured=False)

    def _probabilities(self, logits: torch.Tensor) -> np.ndarray:
        return logits[0].float().softmax(-1).cpu().numpy()

    def _nearest(self, similarities: np.ndarray, active: np.ndarray) -> np.ndarray:
        compared = np.tri(len(active), k=-1, dtype=bool)  # with earlier ones
        if self.config.dqs_reference == "kept":
            compared &= active
        return np.where(compared, similarities, -2).argmax(1)

    def _view(self, pixels: torch.Tensor) -> Image.Image:
        """Convert normalised pixels back to an image."""
        mean, std = (
            torch.tensor(values)[:, None, None] for values in (self.processor.image_mean, self.processor.image_std)
        )
        colours = (pixels[0].float().cpu() * std + mean).clamp(0, 1)  # (3, H, W)
        return Image.fromarray((255 * colours).round().byte().permute(1, 2, 0).numpy())
