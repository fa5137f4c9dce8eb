"""timm classifiers in our training loop, to train teachers."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from hf_visual_perceiver.modeling import ElasticModel, Pass
from hf_visual_perceiver.modeling.elastic import default_preprocessing


class TimmNetwork(ElasticModel, TimmWrapperForImageClassification):
    """A timm classifier with the methods that a training step calls. It is saved as transformers' `TimmWrapper`.

    It has one budget, which counts as K = 1.

    Example:
        >>> network = TimmNetwork.create("resnet18", {"channels": [8, 8, 8, 8]}, ["cat", "dog"])
        >>> network.forward_budgets(torch.zeros(2, 3, 32, 32), [Pass()])[0].shape
        torch.Size([2, 2])
    """

    @classmethod
    def create(cls, name: str, arguments: dict[str, Any], label_names: list[str]) -> "TimmNetwork":
        """Create a timm model with random weights.

        Args:
            name: timm's name of the model, such as resnet18.
            arguments: Arguments of `timm.create_model`, such as output_stride; and image_size, the height and width of
                the images (default 32).
            label_names: Names of the classes.

        Raises:
            ValueError: If timm has no such model, or the model does not accept these arguments.
        """
        model_args = {key: value for key, value in arguments.items() if key != "image_size"}
        image_size = arguments.get("image_size", 32)
        size = (3, image_size, image_size)
        config = TimmWrapperConfig(
            architecture=name,
            model_args=model_args,
            id2label=dict(enumerate(label_names)),
            label2id={label: i for i, label in enumerate(label_names)},
            # A list, as it will be after a round trip through JSON.
            pretrained_cfg={**default_preprocessing(image_size), "input_size": list(size)},  # type: ignore[call-arg]
        )
        try:
            network = cls(config)
            with torch.no_grad():
                network.eval()(torch.zeros(1, *size))
        except (RuntimeError, TypeError, ValueError, AssertionError, KeyError, IndexError, ImportError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"Expected `architecture` to be timm/ and a classifier of timm for {image_size}x{image_size} images, with its "
                f"arguments in `config`, got timm/{name} with {model_args}: {reason}"
            ) from error
        return network.train()

    def forward_budgets(self, pixel_values: torch.Tensor, passes: Sequence[Pass]) -> list[torch.Tensor]:
        """The logits (n, labels) of each pass's n images; the budgets are ignored, as there is only one."""
        return [self(pixel_values[p.images]).logits for p in passes]

    def blocks(self) -> list[Any]:
        """The whole network, as one block."""
        return [self.timm_model]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as a `TimmWrapperForImageClassification`, so that transformers loads it without this package."""
        plain = copy.copy(self)
        plain.__class__ = TimmWrapperForImageClassification  # type: ignore[assignment]
        plain.save_pretrained(*args, **kwargs)

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Height and width of the images that it takes."""
        height, width = self.config.pretrained_cfg["input_size"][1:]
        return height, width

    @torch.no_grad()
    def count_macs(self) -> float:
        """Multiply-accumulates of one image, as torch counts them (half of its operations)."""
        training, counter = self.training, FlopCounterMode(display=False)
        with counter:
            self.eval()(torch.zeros(1, 3, *self.image_height_width, device=self.device))
        self.train(training)
        return counter.get_total_flops() / 2
