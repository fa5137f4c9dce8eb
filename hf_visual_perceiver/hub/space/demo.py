"""What the app shows of one image: what each query reads, which ones are used, the answer, its cost and its time.

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
from hf_visual_perceiver.evaluation.evaluate import Evaluation, read_evaluation
from hf_visual_perceiver.hub.page import EXAMPLES, PICTURES
from hf_visual_perceiver.inference.loading import load_model
from hf_visual_perceiver.modeling import Budget
from hf_visual_perceiver.modeling.query_selection import cosine_similarities
from hf_visual_perceiver.training.folder import create_image_processor


# Seconds that timing an answer should take: moving a knob has to feel immediate.
TIMING = 0.25
LEAST_REPETITIONS, MOST_REPETITIONS = 3, 7
# Of a checkpoint's repository, what the app reads; its code is not among it.
READ = ["config.json", "model.safetensors", "evaluation.json", f"{EXAMPLES}/*"]


@dataclass(frozen=True)
class Picture:
    """An image, and all that does not depend on the knobs.

    Attributes:
        pixels: (1, C, H, W), normalised.
        view: What the model sees: H x W pixels.
        attention: (Q, h, w), what each query reads: distributions over the patches, averaged over heads.
        similarities: (Q, Q) cosines between what the queries have read, which selection compares with t.
        full_probabilities: (labels,) of all queries.
        full_seconds: About what all queries take, by which an answer's repetitions are chosen.
    """

    pixels: torch.Tensor
    view: Image.Image
    attention: np.ndarray
    similarities: np.ndarray
    full_probabilities: np.ndarray
    full_seconds: float


@dataclass(frozen=True)
class Answer:
    """What a setting of the knobs makes of a picture.

    Attributes:
        num_active_queries: K.
        dqs_threshold: t; None is without selection.
        probabilities: (labels,).
        active: (Q,) bool, the queries used.
        nearest: (Q,) of each query, which of those that selection compares it with has read the most similar; 0 of the first.
        macs: Multiply-accumulates; with t they include reading and comparing all K.
        full_macs: Those of all queries.
        seconds: Median over repetitions.
        full_seconds: Of all queries, in turns with the setting.
        relative_time: Median over repetitions of the ratio of the two.
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
    """Where on the trade-off curves a setting lies, on average over a dataset.

    Attributes:
        macs: Mean multiply-accumulates of one image.
        accuracy: A fraction.
        measured: At this very setting; else interpolated between the nearest two.
    """

    macs: float
    accuracy: float
    measured: bool


class Demo:
    """A checkpoint to be shown.

    Args:
        model: In eval mode. Its operating point is where the knobs start.
        name: What to call it.
        evaluation: What was measured of it.
        examples: Image files to start from.

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
        self.start = self.config.operating_point()
        self.all_queries = self.config.resolve()
        self.processor = create_image_processor(self.config)

    @classmethod
    def load(cls, name: str, revision: str | None = None, device: str = "cpu") -> "Demo":
        """A checkpoint with its measurements and examples, by folder or Hub id.

        Args:
            name: A folder or Hub id. Its code is not run.
            revision: Of a Hub id: a commit, tag or branch.
            device: torch's name.

        Raises:
            ValueError: If there is no such checkpoint, or it is damaged.
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
        """What answers and is timed: the optimised form, or the model where that needs what is not installed."""
        try:
            return self.model.optimize_for_inference()
        except ImportError:
            return self.model

    @torch.inference_mode()
    def look(self, image: Image.Image) -> Picture:
        """Let all queries read an image.

        Args:
            image: RGB, of any size.
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
        """Classify a picture with the first K queries, less those that selection drops at t, and time it.

        Raises:
            ValueError: If K or t is out of its range.
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
        """Accuracy and mean MACs at a setting, as far as they were measured.

        Between two measured K, or two measured t at all queries, both are interpolated; elsewhere nothing is claimed.
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
        knobs, costs, accuracies = zip(*known, strict=True)
        return Expected(float(np.interp(at, knobs, costs)), float(np.interp(at, knobs, accuracies)), measured=False)

    def _probabilities(self, logits: torch.Tensor) -> np.ndarray:
        return logits[0].float().softmax(-1).cpu().numpy()

    def _nearest(self, similarities: np.ndarray, active: np.ndarray) -> np.ndarray:
        compared = np.tri(len(active), k=-1, dtype=bool)  # with earlier ones
        if self.config.dqs_reference == "kept":
            compared &= active
        return np.where(compared, similarities, -2).argmax(1)

    def _view(self, pixels: torch.Tensor) -> Image.Image:
        """The normalised pixels as an image again."""
        mean, std = (
            torch.tensor(values)[:, None, None] for values in (self.processor.image_mean, self.processor.image_std)
        )
        colours = (pixels[0].float().cpu() * std + mean).clamp(0, 1)  # (3, H, W)
        return Image.fromarray((255 * colours).round().byte().permute(1, 2, 0).numpy())
