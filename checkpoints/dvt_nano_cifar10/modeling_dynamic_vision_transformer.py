"""The Dynamic Vision Transformer (Wang et al. 2021, "Not All Images are Worth 16x16 Words"): early exits that grow finer.

An image goes through a transformer of few tokens. If that is not sure of its answer, the image goes through the next one, of
more tokens, which reuses the tokens and the attention scores of the one before. Images that are done leave the batch.
The transformers are DeiT's or T2T-ViT's, which differ in how an image becomes tokens (`stem`).

Shapes: B images, E exits, T tokens of an exit (its grid and a class token), D width, H heads, L layers.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_dynamic_vision_transformer import DynamicVisionTransformerConfig
from .elastic import Pass, check_keywords, check_pixel_values
from .family_config import FamilyConfig  # noqa: F401  transformers 5.4 copies what this file imports alone
from .layers import MLP, DropPath, attend, drop_path_rates, split_heads
from .optimized import OptimizableModel
from .query_selection import as_number  # noqa: F401  likewise
from .tokens_to_token import TokenPerformer, TokensToToken, sinusoids


@dataclass
class DynamicVisionTransformerModelOutput(ModelOutput):
    """What `DynamicVisionTransformerModel` returns.

    Attributes:
        last_hidden_state: (B, T, D) tokens of the last exit, normalised.
        pooler_output: (B, D) its class tokens.
        used: (B,) the number of exits that each image went through.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    used: torch.Tensor | None = None


@dataclass
class DynamicVisionTransformerImageClassifierOutput(ModelOutput):
    """What `DynamicVisionTransformerForImageClassification` returns.

    Attributes:
        loss: If `labels` were given: without thresholds the sum of the losses of all exits, otherwise that of `logits`.
        logits: (B, labels) of the exit at which each image stopped.
        exits: (B,) that exit, from 1.
        exit_logits: The (B, labels) of every exit, without thresholds.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    exits: torch.Tensor | None = None
    exit_logits: tuple[torch.Tensor, ...] | None = None

    @property
    def used(self) -> torch.Tensor:
        """(B,) the number of exits that each image went through."""
        assert self.exits is not None
        return self.exits


def enlarge(x: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """A class token, kept, and patches on a grid, resampled to a finer grid: (A, 1 + h w, C) to (A, 1 + h' w', C).

    The paper says "upsample"; this is the rule of its code: nearest neighbours at twice the size, then average pooling.
    Channels stay last in memory, as torch's pooling is slow on CPUs otherwise.
    """
    if old == new:
        return x
    grid = x[:, 1:].unflatten(1, old).permute(0, 3, 1, 2)
    grid = F.adaptive_avg_pool2d(F.interpolate(grid, scale_factor=2.0, mode="nearest"), new)
    return torch.cat([x[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class Enlarge(nn.Module):
    """`enlarge`, or the same as a product with a constant matrix where pooling is slow: in its backward pass and in graphs."""

    matrix: torch.Tensor

    def __init__(self, old: tuple[int, int], new: tuple[int, int]):
        super().__init__()
        self.old, self.new = old, new
        self.register_buffer("matrix", self.computed_matrix(), persistent=False)

    def computed_matrix(self) -> torch.Tensor:
        """(1 + h' w', 1 + h w)."""
        return enlarge(torch.eye(1 + math.prod(self.old))[None], self.old, self.new)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad or torch.compiler.is_exporting():
            return self.matrix.to(x.dtype) @ x
        return enlarge(x, self.old, self.new)


class Reused(NamedTuple):
    """What an exit passes to the next one.

    Attributes:
        tokens: (B, T, D) after the last layer, before the final norm.
        scores: (B, L H, T, T) of the attention, before softmax.
    """

    tokens: torch.Tensor
    scores: torch.Tensor


Answer = Callable[[int, torch.Tensor, Reused | None], tuple[torch.Tensor, Reused | None]]


class RelationReuse(nn.Module):
    """Maps attention scores of an exit to scores that the next one adds to its own: (B, L H, T', T') -> (B, L H, T, T)."""

    def __init__(self, maps: int, old: tuple[int, int], new: tuple[int, int]):
        super().__init__()
        self.enlarge = Enlarge(old, new)
        self.fc1 = nn.Conv2d(maps, 3 * maps, 1)
        self.fc2 = nn.Conv2d(3 * maps, maps, 1)

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        x = self.fc2(F.gelu(self.fc1(scores))).permute(0, 2, 3, 1).contiguous()  # (B, T', T', L H)
        B, _, T, maps = x.shape
        x = self.enlarge(x.flatten(2)).unflatten(2, (T, maps))  # who reads
        x = self.enlarge(x.flatten(0, 1)).unflatten(0, (B, -1))  # what is read
        return x.permute(0, 3, 1, 2)


class FeatureReuse(nn.Module):
    """Maps tokens of an exit to inputs of a layer of the next: (B, T', D) -> (B, T, e), zero for the class token."""

    def __init__(self, config: DynamicVisionTransformerConfig, old: tuple[int, int], new: tuple[int, int]):
        super().__init__()
        self.enlarge = Enlarge(old, new)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.reuse_hidden_size, config.reuse_size, config.hidden_act)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.enlarge(self.mlp(self.norm(tokens)))
        return F.pad(x[:, 1:], (0, 0, 1, 0))


class DynamicVisionTransformerLayer(GradientCheckpointingLayer):
    """A layer of one exit's transformer, pre-norm; its MLP reads reused features beside the tokens."""

    def __init__(self, config: DynamicVisionTransformerConfig, exit: int, drop_path: float):
        super().__init__()
        D = config.hidden_size
        self.config, self.heads, self.dropout = config, config.num_attention_heads, config.attention_probs_dropout_prob
        reuses = exit > 0 and config.feature_reuse
        self.reuse = FeatureReuse(config, *config.grids[exit - 1 : exit + 1]) if reuses else None
        width = D + config.reuse_size if reuses else D
        self.norm1 = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(D, 3 * D, bias=config.qkv_bias)
        self.proj = nn.Linear(D, D)
        self.proj_drop = nn.Dropout(config.hidden_dropout_prob)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MLP(width, config.intermediate_size, D, config.hidden_act, config.hidden_dropout_prob)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: torch.Tensor, relation: torch.Tensor | None, tokens: torch.Tensor | None, need_scores: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One layer.

        Args:
            x: (B, T, D).
            relation: (B, H, T, T) scores to add to this layer's, or None.
            tokens: (B, T', D) of the exit before, or None.
            need_scores: Return the scores of the attention, for the next exit.
        """
        parts = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        query, key, value = (split_heads(part, self.heads) for part in parts)
        dropout = self.dropout if self.training else 0.0
        y, scores = attend(query, key, value, self.config, relation, dropout, need_scores)
        x = x + self.drop_path(self.proj_drop(self.proj(y)))
        z = x if self.reuse is None or tokens is None else torch.cat([x, self.reuse(tokens)], dim=-1)
        return x + self.drop_path(self.mlp(self.norm2(z))), scores


class DynamicVisionTransformerExit(nn.Module):
    """One exit's transformer: images (B, C, S, S), and what the exit before passes on, to tokens (B, T, D)."""

    position_embeddings: torch.Tensor

    def __init__(self, config: DynamicVisionTransformerConfig, exit: int):
        super().__init__()
        D, (rows, columns) = config.hidden_size, config.grids[exit]
        self.leaves = exit + 1 < config.num_exits  # whether the next exit reuses something
        tokens = rows * columns + 1
        self.projection: nn.Module
        if config.stem == "t2t":
            self.projection = TokensToToken(config, exit)
        else:
            kernel, stride, padding = (config.patches or [])[exit]
            self.projection = nn.Conv2d(config.num_channels, D, kernel, stride, padding)
        self.class_token = nn.Parameter(torch.empty(1, 1, D))
        if config.positions == "learned":
            self.position_embeddings = nn.Parameter(torch.empty(1, tokens, D))
        else:
            self.register_buffer("position_embeddings", sinusoids(tokens, D), persistent=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        maps = config.num_hidden_layers * config.num_attention_heads
        reuses = exit > 0 and config.relation_reuse
        self.relation = RelationReuse(maps, *config.grids[exit - 1 : exit + 1]) if reuses else None
        rates = drop_path_rates(config.drop_path_rate, config.num_hidden_layers)
        self.layers = nn.ModuleList(DynamicVisionTransformerLayer(config, exit, rate) for rate in rates)
        self.norm = nn.LayerNorm(D, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor, reused: Reused | None) -> tuple[torch.Tensor, Reused | None]:
        x = self.projection(pixel_values).flatten(2).transpose(1, 2)  # (B, D, h, w) or (B, D, N) -> (B, N, D)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.dropout(x + self.position_embeddings.to(x.dtype))
        relations: Sequence[torch.Tensor | None] = [None] * len(self.layers)
        if self.relation is not None and reused is not None:
            relations = self.relation(reused.scores).chunk(len(self.layers), dim=1)
        tokens, scores = None if reused is None else reused.tokens, []
        for layer, relation in zip(self.layers, relations, strict=True):
            x, s = layer(x, relation, tokens, self.leaves)
            scores.append(s)
        left = Reused(x, torch.cat(scores, dim=1)) if self.leaves else None
        return self.norm(x), left


class DynamicVisionTransformerParts:
    """The network, mixed into transformers' and timm's model classes."""

    config: DynamicVisionTransformerConfig
    exits: nn.ModuleList

    def build_parts(self, config: DynamicVisionTransformerConfig) -> None:
        """Create the submodules; their names are those of the state dict in both libraries."""
        self.exits = nn.ModuleList(DynamicVisionTransformerExit(config, i) for i in range(config.num_exits))

    def run(
        self, pixel_values: torch.Tensor, answer: Answer, max_exit: int, thresholds: Sequence[float]
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """Classify images, each at the first exit that is sure enough.

        Args:
            pixel_values: (B, C, S, S).
            answer: Runs an exit: its number, images and what the exit before passed on, to logits and what it passes on.
            max_exit: All images stop here.
            thresholds: Threshold of each exit but the last; an image stops where its top probability is at least this.

        Returns:
            Logits (B, labels), exits (B,), and the logits of each exit if no image could stop early, else none.
        """
        check_pixel_values(pixel_values, self.config)
        x, reused, every = pixel_values, None, []
        early = any(t != math.inf for t in thresholds[: max_exit - 1])
        images = torch.arange(x.shape[0], device=x.device)
        logits = exits = None
        for i in range(max_exit):
            answers, reused = answer(i, x, reused)
            every.append(answers)
            if not early:
                continue
            if logits is None or exits is None:
                logits, exits = answers.new_zeros(pixel_values.shape[0], answers.shape[-1]), torch.zeros_like(images)
            sure = torch.ones(answers.shape[0], dtype=torch.bool, device=x.device)
            if i + 1 < max_exit:
                sure = answers.float().softmax(-1).amax(-1) >= thresholds[i]
            logits = logits.index_put((images[sure],), answers[sure])
            exits[images[sure]] = i + 1
            if sure.all():
                break
            images, x = images[~sure], x[~sure]
            reused = None if reused is None else Reused(*(part[~sure] for part in reused))
        if logits is None or exits is None:
            return every[-1], torch.full_like(images, max_exit), tuple(every)
        return logits, exits, ()

    def answer_with(self, heads: Sequence[nn.Module]) -> Answer:
        """`run`'s `answer` by the exits and these classifiers of theirs."""

        def answer(exit: int, pixel_values: torch.Tensor, reused: Reused | None) -> tuple[torch.Tensor, Reused | None]:
            tokens, passed = self.exits[exit](pixel_values, reused)
            return heads[exit](tokens[:, 0]), passed

        return answer


class DynamicVisionTransformerPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and saving."""

    config: DynamicVisionTransformerConfig
    config_class = DynamicVisionTransformerConfig
    base_model_prefix = "dynamic_vision_transformer"
    main_input_name = "pixel_values"
    input_modalities = "image"
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _no_split_modules = ["DynamicVisionTransformerLayer", "TokenPerformer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """DeiT's initialisation; uses transformers' setters, which skip loaded weights."""
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, DynamicVisionTransformerExit):
            init.trunc_normal_(module.class_token, std=std)
            if self.config.positions == "learned":
                init.trunc_normal_(module.position_embeddings, std=std)
            else:
                init.copy_(module.position_embeddings, sinusoids(*module.position_embeddings.shape[1:]))
        elif isinstance(module, Enlarge):
            init.copy_(module.matrix, module.computed_matrix())
        elif isinstance(module, TokenPerformer):  # orthogonal, and as long as T2T-ViT's
            directions = torch.empty_like(module.directions, dtype=torch.float32)  # half precision has no QR on CPUs
            init.copy_(module.directions, nn.init.orthogonal_(directions, gain=len(directions) ** 0.5))


class DynamicVisionTransformerModel(DynamicVisionTransformerPreTrainedModel, DynamicVisionTransformerParts):
    """The Dynamic Vision Transformer without classifiers, all exits one after the other.

    Example:
        >>> model = DynamicVisionTransformerModel(DynamicVisionTransformerConfig()).eval()
        >>> model(torch.zeros(2, 3, 32, 32)).last_hidden_state.shape
        torch.Size([2, 65, 64])
    """

    def __init__(self, config: DynamicVisionTransformerConfig):
        super().__init__(config)
        self.build_parts(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        max_exit: int | None = None,
        exit_thresholds: Sequence[float] | float | None = None,
        **kwargs: Any,
    ) -> DynamicVisionTransformerModelOutput:
        """The tokens of the last exit, or of the exit `max_exit`.

        Args:
            pixel_values: (B, C, S, S), normalised.
            max_exit: In [1, E]; None is the config's, or E.
            exit_thresholds: None or infinity: without classifiers no image can stop early.
            **kwargs: transformers' `return_dict` and `num_items_in_batch`.

        Raises:
            ValueError: If the images or a knob are not as described, or another keyword would be ignored.
        """
        check_keywords(self, kwargs)
        check_pixel_values(pixel_values, self.config)
        last = self.config.max_exit if max_exit is None else max_exit
        knobs = self.config.resolve(max_exit=last, exit_thresholds=exit_thresholds)
        if any(t != math.inf for t in knobs["exit_thresholds"]):
            raise ValueError(f"Expected no `exit_thresholds`, as there are no classifiers, got {exit_thresholds}.")
        last = knobs["max_exit"]
        reused = None
        for stage in self.exits[:last]:
            x, reused = stage(pixel_values, reused)
        used = torch.full((x.shape[0],), last, device=x.device)
        return DynamicVisionTransformerModelOutput(last_hidden_state=x, pooler_output=x[:, 0], used=used)


class DynamicVisionTransformerStep(nn.Module):
    """One exit with its classifier, as a module of tensors only."""

    passed = Reused._fields  # inputs from the exit before, and outputs for the next

    def __init__(self, model: "DynamicVisionTransformerForImageClassification", exit: int):
        super().__init__()
        self.model, self.exit = model, exit

    def forward(
        self, pixel_values: torch.Tensor, tokens: torch.Tensor | None = None, scores: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Logits (B, labels), and what the next exit reuses."""
        reused = None if tokens is None or scores is None else Reused(tokens, scores)
        answer = self.model.dynamic_vision_transformer.answer_with(list(self.model.heads))
        logits, left = answer(self.exit, pixel_values, reused)
        return (logits, *(left or ()))


class DynamicVisionTransformerForImageClassification(DynamicVisionTransformerPreTrainedModel, OptimizableModel):
    """The Dynamic Vision Transformer with a linear classifier at each exit.

    Example:
        >>> model = DynamicVisionTransformerForImageClassification(DynamicVisionTransformerConfig(num_labels=10)).eval()
        >>> output = model(torch.zeros(2, 3, 32, 32), exit_thresholds=[0.0, 0.0])
        >>> output.logits.shape, output.exits
        (torch.Size([2, 10]), tensor([1, 1]))
    """

    accepts_loss_kwargs = False  # the loss is a mean over the batch

    def __init__(self, config: DynamicVisionTransformerConfig):
        super().__init__(config)
        self.num_labels = len(config.label_names)
        self.dynamic_vision_transformer = DynamicVisionTransformerModel(config)
        self.heads = nn.ModuleList(
            nn.Linear(config.hidden_size, len(config.label_names)) for _ in range(config.num_exits)
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        exit_thresholds: Sequence[float] | float | None = None,
        max_exit: int | None = None,
        **kwargs: Any,
    ) -> DynamicVisionTransformerImageClassifierOutput:
        """Classify images, each at the first exit that is sure enough.

        Args:
            pixel_values: (B, C, S, S), normalised.
            labels: (B,) class indices.
            exit_thresholds: An image stops at an exit where its top probability is at least the threshold, one for each exit
                but the last, or one for all. None is the config's, or no early stops; infinity is no stop.
            max_exit: In [1, E]: all images stop here at the latest. None is the config's, or E.
            **kwargs: transformers' `return_dict` and `num_items_in_batch`.

        Raises:
            ValueError: If the images or a knob are not as described, or another keyword would be ignored.
        """
        check_keywords(self, kwargs)
        knobs = self.config.knobs_for(exit_thresholds=exit_thresholds, max_exit=max_exit)
        answer = self.dynamic_vision_transformer.answer_with(list(self.heads))
        output = self.run_exits(answer, pixel_values, **knobs)
        if labels is not None:
            every = output.exit_logits or (output.logits,)
            output.loss = torch.stack([self.loss_function(labels, logits, self.config) for logits in every]).sum()
        return output

    def run_exits(
        self, answer: Answer, pixel_values: torch.Tensor, max_exit: int, exit_thresholds: Sequence[float]
    ) -> DynamicVisionTransformerImageClassifierOutput:
        """Classify images with another way to run an exit, such as a graph; see `forward`, and `run` for `answer`."""
        logits, exits, every = self.dynamic_vision_transformer.run(pixel_values, answer, max_exit, exit_thresholds)
        return DynamicVisionTransformerImageClassifierOutput(logits=logits, exits=exits, exit_logits=every or None)

    def forward_budgets(self, pixel_values: torch.Tensor, passes: Sequence[Pass]) -> list[torch.Tensor]:
        """The logits (n, labels) of each pass's n images; passes over the whole batch without thresholds share one run."""
        knobs = [self.config.resolve(**p.budget.kwargs) for p in passes]
        shared = all(set(k["exit_thresholds"]) <= {math.inf} for k in knobs)
        if not shared or any(p.images != slice(None) for p in passes):
            return super().forward_budgets(pixel_values, passes)
        last = max(k["max_exit"] for k in knobs)
        every = self(pixel_values, max_exit=last, exit_thresholds=math.inf).exit_logits
        return [every[k["max_exit"] - 1] for k in knobs]

    def exit_step(self, exit: int) -> nn.Module:
        """An exit that can be exported alone; `run_exits` puts exits together."""
        return DynamicVisionTransformerStep(self, exit)

    def blocks(self) -> Iterable[nn.Module]:
        """The layers of all exits."""
        stages: Any = self.dynamic_vision_transformer.exits
        return [layer for stage in stages for layer in stage.layers]


__all__ = [
    "DynamicVisionTransformerForImageClassification",
    "DynamicVisionTransformerModel",
    "DynamicVisionTransformerPreTrainedModel",
]
