"""A cascade: all images run at a small budget first, and only uncertain ones at larger budgets.

Shapes: B images, S stages.
"""

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from hf_visual_perceiver.modeling import Budget, ElasticConfig
from hf_visual_perceiver.modeling.query_selection import as_number
from hf_visual_perceiver.utils.files import write_json


NAME = re.compile(r"(?:(?P<first>cascade)(?: to (?P<to>.+?))?|(?P<only>.+?))(?P<mirror> ?\+ ?mirror)? at (?P<p>[\d.]+)")


@dataclass(frozen=True)
class CascadeOutput:
    """The output of a cascade.

    Attributes:
        logits: (B, labels), from each image's last stage; of mirrored images the mean of both views.
        used: (B,) how much the last stage used, such as the number of queries.
        stage: (B,) the stage at which each image stopped; the number of stages if it was mirrored after them.
    """

    logits: torch.Tensor
    used: torch.Tensor
    stage: torch.Tensor


@dataclass(frozen=True)
class Rerun:
    """Stands in for the result of `start`, for models that have to start over at each budget."""

    model: Any
    pixel_values: torch.Tensor

    def extend(self, **knobs: Any) -> Any:
        """The model's output at a budget.

        Raises:
            ValueError: If it is a tensor.
        """
        output = self.model(self.pixel_values, **self.model.config.resolve(**knobs))
        if isinstance(output, torch.Tensor):  # timm's models say nothing about what images used
            raise ValueError(
                f"Expected a transformers classifier, or a model that has `start`, got {type(self.model).__name__}."
            )
        return output

    def __getitem__(self, images: torch.Tensor) -> "Rerun":
        return Rerun(self.model, self.pixel_values[images])


class Cascade:
    """Runs budgets in turn; an image stops once its top probability reaches the stage's threshold, the others continue.

    Images that have stopped leave the batch, so they cost nothing further. The others continue from their state if the
    model supports that (`start`), as the Visual Perceiver does, in which only the new queries then attend to the image;
    otherwise they are computed again. (MSDNet and DVT also stop by the top probability: Huang et al. 2018, Wang et al.
    2021.)

    Args:
        model: Model in eval mode; its own default budget is ignored.
        stages: Fixed budgets, at which all images cost the same, ascending in cost.
        thresholds: One per stage except the last: the top probability at which an image stops there. 0 stops all
            images, a value above 1 none. The last stage stops all; with `mirror` it has a threshold too.
        mirror: Whether the images below the last stage's threshold are classified once more at that stage, mirrored left
            to right, and answer with the mean of the logits of both views. It fits classes that a mirror does not change.

    Raises:
        ValueError: If the stages or the thresholds are not as described.

    Example:
        >>> from hf_visual_perceiver import VisualPerceiverConfig, VisualPerceiverForImageClassification
        >>> model = VisualPerceiverForImageClassification(VisualPerceiverConfig(num_labels=10)).eval()
        >>> cascade = Cascade(model, stages=[Budget(num_active_queries=8), Budget()], thresholds=[0.0])
        >>> cascade(torch.zeros(2, 3, 32, 32)).used.tolist()
        [8, 8]
    """

    def __init__(self, model: Any, stages: Sequence[Budget], thresholds: Sequence[float], mirror: bool = False):
        self.model, self.mirror = model, mirror
        self.stages = check_stages(model.config, stages)
        if len(thresholds) != (count := len(stages) - 1 + mirror):
            views = " and a mirrored view" if mirror else ""
            raise ValueError(f"Expected {count} thresholds for {len(stages)} stages{views}, got {len(thresholds)}.")
        self.thresholds = [as_number(threshold) for threshold in thresholds]
        for threshold in self.thresholds:
            if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < math.inf:
                raise ValueError(f"Expected thresholds of at least 0, got {threshold!r}.")

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor) -> CascadeOutput:
        """Classify images.

        Args:
            pixel_values: (B, C, H, W), normalised.
        """
        state = self.start(pixel_values)
        B, device = pixel_values.shape[0], pixel_values.device
        going = torch.arange(B, device=device)  # images still in the batch
        logits: torch.Tensor | None = None
        used, stopped = (torch.zeros(B, dtype=torch.long, device=device) for _ in range(2))
        for stage, budget in enumerate(self.stages):
            output = state.extend(**budget.kwargs)
            answer = output.logits
            if logits is None:
                logits = answer.new_zeros(B, answer.shape[1])
            # Written at each stage; later stages overwrite the logits of images that continue.
            logits = logits.index_copy(0, going, answer)
            used[going], stopped[going] = output.used, stage
            if stage == len(self.thresholds):
                break
            on = top_probability(answer) < self.thresholds[stage]
            going, answer = going[on], answer[on]
            if len(going) == 0:
                break
            state = state[on]
        assert logits is not None, "a cascade has at least one stage"
        if self.mirror and len(going):
            mirrored = self.start(pixel_values[going].flip(-1)).extend(**self.stages[-1].kwargs)
            logits = logits.index_copy(0, going, (answer + mirrored.logits) / 2)
            stopped[going] = len(self.stages)
        return CascadeOutput(logits, used, stopped)

    def start(self, pixel_values: torch.Tensor) -> Any:
        """The state from which images go on from budget to budget."""
        start = getattr(self.model, "start", None)
        return Rerun(self.model, pixel_values) if start is None else start(pixel_values)

    def count_macs(self) -> list[int]:
        """Multiply-accumulates of an image that stops at each stage, and last those of one that is mirrored, if any is."""
        macs = self.model.config.count_stages(self.stages)
        return [*macs, macs[-1] + self.model.config.count_macs(self.stages[-1])] if self.mirror else macs

    @classmethod
    def parse(cls, model: Any, text: str) -> "Cascade":
        """The cascade of a name, with one threshold for all stages.

        Args:
            model: Model in eval mode.
            text: "cascade at 0.9" for all of the model's `budgets()`, "cascade to K=16 at 0.9" for those up to K = 16, and
                "K=16 + mirror at 0.9" or "cascade to K=16 + mirror at 0.9" with `mirror`.

        Raises:
            ValueError: If the text is not of this form, or does not fit the model.
        """
        if (match := NAME.fullmatch(text.strip())) is None:
            raise ValueError(f'Expected a cascade such as "cascade to K=16 + mirror at 0.99", got {text!r}.')
        config, mirror = model.config, match["mirror"] is not None
        stages = [config.parse_budget(match["only"] or match["to"] or "full")]
        if match["first"]:
            cost = config.count_macs(stages[0])
            stages = [budget for budget in config.budgets() if config.count_macs(budget) < cost] + stages
        if not (count := len(stages) - 1 + mirror):
            raise ValueError(f'Expected several stages or "+ mirror", without which no threshold counts, got {text!r}.')
        try:
            return cls(model, stages, [float(match["p"])] * count, mirror)
        except ValueError as error:
            raise ValueError(f"{text!r} is not a cascade of this model: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the stages and thresholds as JSON, such as `cascade.json` in the checkpoint's folder."""
        stages = [stage.kwargs for stage in self.stages]
        write_json(path, {"stages": stages, "thresholds": self.thresholds, "mirror": self.mirror})

    @classmethod
    def load(cls, model: Any, path: str | Path) -> "Cascade":
        """The inverse of `save`.

        Raises:
            ValueError: If the file is not as `save` writes it, or does not fit the model.
        """
        try:
            values = json.loads(Path(path).read_text())
            stages, thresholds = [Budget(**stage) for stage in values["stages"]], list(values["thresholds"])
            mirror = bool(values.get("mirror", False))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Expected {path} to contain the stages and thresholds of a cascade, got {error!r}."
            ) from error
        return cls(model, stages, thresholds, mirror)


def check_stages(config: ElasticConfig, stages: Sequence[Budget]) -> list[Budget]:
    """Return the stages as a list; raise a `ValueError` unless they are fixed budgets that ascend in cost."""
    for stage in stages:
        if config.is_adaptive(stage):
            raise ValueError(
                f"Expected stages at which all images have the same cost, got {stage.short(config.knobs)}."
            )
    costs = [config.count_macs(stage) for stage in stages]
    if not costs or any(a >= b for a, b in itertools.pairwise(costs)):
        names = ", ".join(stage.short(config.knobs) for stage in stages)
        raise ValueError(f"Expected ascending stages, at least one, got {names or 'none'}.")
    return list(stages)


def top_probability(logits: torch.Tensor) -> torch.Tensor:
    """The probability of the most likely class, as confidence: (B, labels) -> (B,), in float32."""
    return F.softmax(logits.float(), dim=-1).amax(dim=-1)
