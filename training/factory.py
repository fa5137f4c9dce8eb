"""Build a recipe's network and optimiser."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import nn

from hf_visual_perceiver.data.images import seed_everything
from hf_visual_perceiver.modeling import Budget, family_of
from hf_visual_perceiver.training.recipe import Recipe
from hf_visual_perceiver.training.schedules import Schedule, step_macs
from hf_visual_perceiver.training.timm_network import TimmNetwork


# An elastic classifier of one of our families, or a `TimmNetwork`.
Network: TypeAlias = Any


def create_model(recipe: Recipe, label_names: list[str]) -> Network:
    """Create the recipe's model for these labels, with weights initialised from the recipe's seed."""
    seed_everything(recipe.seed)
    if recipe.timm_name is not None:
        return TimmNetwork.create(recipe.timm_name, recipe.config, label_names)
    config = recipe.model_config(
        id2label=dict(enumerate(label_names)), label2id={name: i for i, name in enumerate(label_names)}
    )
    model = family_of(recipe.architecture).classifier(config)
    if recipe.attention is not None:
        try:
            model.set_attn_implementation(recipe.attention)
        except (ImportError, ValueError) as error:
            raise ValueError(f"Cannot use `attention` {recipe.attention!r}: {error}") from error
        if model.config._attn_implementation != recipe.attention:  # older transformers only warn
            raise ValueError(f"Cannot use `attention` {recipe.attention!r}: transformers does not know it.")
    return model


class InputFacts(NamedTuple):
    """The input that a network expects.

    Attributes:
        image_size: Height and width.
        preprocessing: `mean`, `std` and `interpolation`, in timm's terms.
    """

    image_size: tuple[int, int]
    preprocessing: dict[str, Any]


def input_facts(model: Network) -> InputFacts:
    """The network's image size and preprocessing."""
    if isinstance(model, TimmNetwork):
        return InputFacts(model.image_height_width, model.config.pretrained_cfg)
    return InputFacts(model.config.image_height_width, model.config.timm_pretrained_cfg)


def ladder_of(model: Network) -> list[Budget]:
    """The budgets that a schedule draws from, ascending."""
    return [Budget()] if isinstance(model, TimmNetwork) else model.config.ladder()


def knobs_of(model: Network) -> Mapping[str, str]:
    """Short names of the network's knobs."""
    return {} if isinstance(model, TimmNetwork) else model.config.knobs


def block_ends(model: Network) -> list[int] | None:
    """The steps K of the ladder whose logits one pass returns together; None if the network has no such passes."""
    return None if isinstance(model, TimmNetwork) else model.config.nested_steps


def compile_blocks(model: Network) -> None:
    """Compile the network's blocks, which take most of a step's time, for batches of any size."""
    for block in model.blocks():
        block.compile(dynamic=True)


def mean_macs(model: Network, schedule: Schedule, steps: int) -> float:
    """Multiply-accumulates per image of a step's forward passes, averaged over steps."""
    if isinstance(model, TimmNetwork):
        return model.count_macs()
    sampled = range(0, steps, max(steps // 1000, 1))
    return sum(step_macs(model.config, schedule, step) for step in sampled) / len(sampled)


def create_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Create timm's optimiser of that name; as in timm, biases, norms, positions and queries are not decayed."""
    spared = {name for name, _ in model.named_parameters() if name.endswith(("queries", "position_embeddings"))}
    groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=spared)
    try:
        return create_optimizer_v2(groups, opt=recipe.optimizer, lr=recipe.learning_rate, weight_decay=0.0)
    except (ValueError, KeyError, AssertionError) as error:
        raise ValueError(
            f"Expected `optimizer` to be a name of timm's optimisers, got {recipe.optimizer!r}."
        ) from error
