"""QnA-ViT (Arar et al. 2022): local attention with learned queries, whose windows cost as little as a convolution.

Shapes: B images, (S, S) positions, C channels in and F out, n queries, h heads, d = F / h, k x k windows.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_qna_vit import QnAViTConfig
from .elastic import check_keywords, check_pixel_values
from .family_config import FamilyConfig  # noqa: F401  transformers 5.4 copies what this file imports alone
from .layers import MLP, DropPath, attend, drop_path_rates
from .optimized import OptimizableModel
from .query_selection import without_autocast


@dataclass
class QnAViTModelOutput(ModelOutput):
    """What `QnAViTModel` returns.

    Attributes:
        last_hidden_state: (B, N, D) positions of the last stage, normalised.
        pooler_output: (B, D) their mean.
        used: (B,) ones.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    used: torch.Tensor | None = None


@dataclass
class QnAViTImageClassifierOutput(ModelOutput):
    """What `QnAViTForImageClassification` returns.

    Attributes:
        loss: The classification loss, if `labels` were given.
        logits: (B, labels).
        used: (B,) ones: every image uses the whole network.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    used: torch.Tensor | None = None


class QnALayer(nn.Module):
    """Attention of learned queries to the k x k window around each position: (B, S, S, C) -> (B, S', S', F).

    out = sum over queries of [sum_w a_w exp(s_w + r_w) v_w] / [sum_w exp(s_w + r_w)], with scores s, relative bias r, and a
    learned scale a. Scores do not depend on the window, so both sums are depthwise convolutions.
    """

    def __init__(self, config: QnAViTConfig, in_features: int, out_features: int, heads: int, stride: int):
        super().__init__()
        n, k = config.num_queries, config.kernel_size
        self.n, self.heads, self.k, self.stride = n, heads, k, stride
        self.queries = nn.Parameter(torch.empty(n, out_features))
        self.key = nn.Linear(in_features, out_features, bias=False)
        self.value = nn.Linear(in_features, out_features, bias=False)
        self.proj = nn.Linear(out_features, out_features, bias=False)
        self.relative_bias = nn.Parameter(torch.empty(k**2, n * heads))
        self.scale = nn.Parameter(torch.empty(k**2, n * heads))

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, S, C) -> (B, S, S, n h): no key is formed, as (W_k x) q = x (W_k^T q)."""
        d = self.queries.shape[1] // self.heads
        queries = self.queries.unflatten(1, (self.heads, d))  # (n, h, d)
        queries = queries * (queries.square().sum(-1, keepdim=True) + 1e-6).rsqrt() * d**-0.5
        weight = self.key.weight.unflatten(0, (self.heads, d))  # (h, d, C)
        return x @ torch.einsum("nhd,hdc->cnh", queries, weight).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        d = self.queries.shape[1] // self.heads
        scores, value = self.scores(x).permute(0, 3, 1, 2), self.value(x).permute(0, 3, 1, 2)
        # Half precision would overflow, so this runs in float32 and subtracts the image's largest score, which cancels in the
        # quotient. Scores far below it are clamped, so that no window's sum vanishes.
        with without_autocast(x.device):
            scores, values = scores.float(), value.float()
            weights = (scores - scores.amax((2, 3), keepdim=True)).clamp(min=-60.0).exp()  # (B, n h, S, S)
            near = self.relative_bias.float().exp()
            B, _, S, T = weights.shape
            weighted = weights.unflatten(1, (self.n, self.heads, 1)) * values.unflatten(1, (1, self.heads, d))
            above = self.convolve(weighted.reshape(B, -1, S, T), (near * self.scale.float()).repeat_interleave(d, 1))
            below = self.convolve(weights, near)
            y = above.unflatten(1, (self.n, self.heads, d)) / below.unflatten(1, (self.n, self.heads, 1))
            y = y.sum(1).flatten(1, 2)
        return self.proj(y.permute(0, 2, 3, 1).to(value.dtype))

    def convolve(self, x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        """A depthwise convolution with a (k^2, channels) kernel; places outside of the image add nothing."""
        weight = kernel.t().reshape(-1, 1, self.k, self.k)
        return F.conv2d(x, weight, stride=self.stride, padding=self.k // 2, groups=x.shape[1])


class QnABlock(GradientCheckpointingLayer):
    """The QnA layer and an MLP, pre-norm; with a stride of 2 width and heads double: (B, S, S, C) -> (B, S', S', F)."""

    def __init__(self, config: QnAViTConfig, in_features: int, out_features: int, heads: int, stride: int, rate: float):
        super().__init__()
        eps = config.layer_norm_eps
        self.norm1 = nn.LayerNorm(in_features, eps=eps)
        self.attention = QnALayer(config, in_features, out_features, heads, stride)
        self.skip = nn.Conv2d(in_features, out_features, 1, stride, bias=False) if stride > 1 else None
        self.norm2 = nn.LayerNorm(out_features, eps=eps)
        self.mlp = MLP(out_features, config.mlp_ratio * out_features, out_features, config.hidden_act)
        self.drop_path = DropPath(rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.attention(self.norm1(x))
        if self.skip is not None:  # stochastic depth does not drop a change of resolution
            x, change = self.skip(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), y
        else:
            change = self.drop_path(y)
        y = x + change
        return y + self.drop_path(self.mlp(self.norm2(y)))


class LocalBlock(GradientCheckpointingLayer):
    """Self-attention within windows, without overlap, and an MLP, pre-norm: (B, S, S, C) -> (B, S, S, C)."""

    index: torch.Tensor

    def __init__(self, config: QnAViTConfig, width: int, heads: int, window: int, rate: float):
        super().__init__()
        self.config, self.heads, self.window = config, heads, window
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.relative_bias = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        self.register_buffer("index", self.computed_index(window), persistent=False)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MLP(width, config.mlp_ratio * width, width, config.hidden_act)
        self.drop_path = DropPath(rate)

    @staticmethod
    def computed_index(window: int) -> torch.Tensor:
        """(w^2, w^2) the row of the table of biases for each pair of places in a window."""
        places = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        apart = places[:, None] - places + window - 1
        return apart[..., 0] * (2 * window - 1) + apart[..., 1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, S, T, C = x.shape
        w = self.window
        y = (
            self.norm1(x).reshape(B, S // w, w, T // w, w, C).transpose(2, 3).reshape(-1, w * w, C)
        )  # (B windows, w^2, C)
        # The channels of each head are ordered query, key, value.
        query, key, value = self.qkv(y).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        bias = self.relative_bias[self.index].permute(2, 0, 1)[None].to(query.dtype)  # (1, h, w^2, w^2)
        y = self.proj(attend(query, key, value, self.config, bias)[0])
        y = y.reshape(B, S // w, T // w, w, w, C).transpose(2, 3).reshape(B, S, T, C)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class QnAViTParts:
    """The network, mixed into transformers' and timm's model classes."""

    config: QnAViTConfig

    def build_parts(self, config: QnAViTConfig) -> None:
        """Create the submodules; their names are those of the state dict in both libraries."""
        stages, last = config.stages, len(config.stages) - 1
        local, qna = config.local_depths or [], config.qna_depths or []
        rates = iter(drop_path_rates(config.drop_path_rate, sum(local) + sum(qna) + last))
        heads, local_heads, windows = config.qna_heads or [], config.local_heads or [], config.window_sizes or []
        self.stem = nn.Conv2d(config.num_channels, stages[0][0], config.stem_stride, config.stem_stride, bias=False)
        self.layers = nn.ModuleList()
        for i, (width, _) in enumerate(stages):
            self.layers.extend(
                LocalBlock(config, width, local_heads[i], windows[i], next(rates)) for _ in range(local[i])
            )
            self.layers.extend(QnABlock(config, width, width, heads[i], 1, next(rates)) for _ in range(qna[i]))
            if i < last:
                self.layers.append(QnABlock(config, width, 2 * width, heads[i + 1], 2, next(rates)))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def run(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Positions of the last stage, normalised: (B, C, S, S) -> (B, N, D)."""
        check_pixel_values(pixel_values, self.config)
        x = self.stem(pixel_values).permute(0, 2, 3, 1)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).flatten(1, 2)


class QnAViTPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and saving."""

    config: QnAViTConfig
    config_class = QnAViTConfig
    base_model_prefix = "qna_vit"
    main_input_name = "pixel_values"
    input_modalities = "image"
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _no_split_modules = ["QnABlock", "LocalBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The authors' initialisation; uses transformers' setters, which skip loaded weights."""
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in = module.weight[0].numel()
            init.trunc_normal_(module.weight, std=fan_in**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, QnALayer):
            init.trunc_normal_(module.queries, std=(module.queries.shape[1] // module.heads) ** -0.5)
            init.zeros_(module.relative_bias)
            init.normal_(module.scale, std=std)
        elif isinstance(module, LocalBlock):
            init.zeros_(module.relative_bias)
            init.copy_(module.index, module.computed_index(module.window))


class QnAViTModel(QnAViTPreTrainedModel, QnAViTParts):
    """QnA-ViT without a head.

    Example:
        >>> model = QnAViTModel(QnAViTConfig()).eval()
        >>> model(torch.zeros(2, 3, 32, 32)).last_hidden_state.shape
        torch.Size([2, 16, 128])
    """

    def __init__(self, config: QnAViTConfig):
        super().__init__(config)
        self.build_parts(config)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> QnAViTModelOutput:
        """Compute the positions of the last stage.

        Args:
            pixel_values: (B, C, S, S), normalised.
            **kwargs: transformers' `return_dict` and `num_items_in_batch`.

        Raises:
            ValueError: If the images are not as described, or another keyword would be ignored.
        """
        check_keywords(self, kwargs)
        x = self.run(pixel_values)
        used = torch.ones(x.shape[0], dtype=torch.long, device=x.device)
        return QnAViTModelOutput(last_hidden_state=x, pooler_output=x.mean(1), used=used)


class QnAViTForImageClassification(QnAViTPreTrainedModel, OptimizableModel):
    """QnA-ViT with a linear classifier.

    Example:
        >>> model = QnAViTForImageClassification(QnAViTConfig(num_labels=10)).eval()
        >>> model(torch.zeros(2, 3, 32, 32)).logits.shape
        torch.Size([2, 10])
    """

    accepts_loss_kwargs = False  # the loss is a mean over the batch

    def __init__(self, config: QnAViTConfig):
        super().__init__(config)
        self.num_labels = len(config.label_names)
        self.qna_vit = QnAViTModel(config)
        self.head = nn.Linear(config.hidden_size, len(config.label_names))
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> QnAViTImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (B, C, S, S), normalised.
            labels: (B,) class indices.
            **kwargs: transformers' `return_dict` and `num_items_in_batch`.

        Raises:
            ValueError: If the images are not as described, or another keyword would be ignored.
        """
        check_keywords(self, kwargs)
        outputs = self.qna_vit(pixel_values, **kwargs)
        logits = self.head(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return QnAViTImageClassifierOutput(loss=loss, logits=logits, used=outputs.used)

    def blocks(self) -> Iterable[nn.Module]:
        """The blocks of all stages."""
        return self.qna_vit.layers


__all__ = ["QnAViTForImageClassification", "QnAViTModel", "QnAViTPreTrainedModel"]
