"""What a recipe trains, and with which optimiser."""

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay

from hf_visual_perceiver.modeling import VisualPerceiverForImageClassification

from .data import seed_everything
from .recipe import Recipe


def create_model(recipe: Recipe, label_names: list[str]) -> VisualPerceiverForImageClassification:
    """The recipe's model with seeded weights, for these labels."""
    seed_everything(recipe.seed)
    config = recipe.model_config(
        id2label=dict(enumerate(label_names)), label2id={name: i for i, name in enumerate(label_names)}
    )
    model = VisualPerceiverForImageClassification(config)
    if recipe.attention is not None:
        try:
            model.set_attn_implementation(recipe.attention)
        except (ImportError, ValueError) as error:
            raise ValueError(f"Cannot use `attention` {recipe.attention!r}: {error}") from error
        if model.config._attn_implementation != recipe.attention:  # older transformers only warn
            raise ValueError(f"Cannot use `attention` {recipe.attention!r}: transformers does not know it.")
    return model


def create_optimizer(model: VisualPerceiverForImageClassification, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimiser of that name; biases, norms, positions and queries are not decayed, as timm does for its models."""
    spared = {name for name, _ in model.named_parameters() if name.endswith(("queries", "position_embeddings"))}
    groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=spared)
    try:
        return create_optimizer_v2(groups, opt=recipe.optimizer, lr=recipe.learning_rate, weight_decay=0.0)
    except (ValueError, KeyError, AssertionError) as error:
        raise ValueError(
            f"Expected `optimizer` to be a name of timm's optimisers, got {recipe.optimizer!r}."
        ) from error
