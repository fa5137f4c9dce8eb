"""Perceiver (Jaegle et al. 2021) and Perceiver IO (Jaegle et al. 2022) for images: latents that read every pixel.

Shapes: B images, M input tokens (pixels), C their channels, K active latents, D their width, H heads.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_iterative_perceiver import IterativePerceiverConfig
from .elastic import check_keywords, check_pixel_values
from .family_config import FamilyConfig  # noqa: F401  transformers 5.4 copies what this file imports alone
from .layers import MLP, attend, split_heads
from .optimized import OptimizableModel
from .query_selection import as_number  # noqa: F401  likewise


@dataclass
class IterativePerceiverModelOutput(ModelOutput):
    """What `IterativePerceiverModel` returns.

    Attributes:
        last_hidden_state: (B, K, D) latents after the last iteration.
        pooler_output: (B, D) their mean, or what the decoder's query reads from them.
        used: (B,) the number of latents, K.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    used: torch.Tensor | None = None


@dataclass
class IterativePerceiverImageClassifierOutput(ModelOutput):
    """What `IterativePerceiverForImageClassification` returns.

    Attributes:
        loss: The classification loss, if `labels` were given.
        logits: (B, labels).
        used: (B,) the number of latents that each image used.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    used: torch.Tensor | None = None


def fourier_features(side: int, bands: int, max_resolution: int) -> torch.Tensor:
    """Positions of a square image's pixels: coordinates, then sines, then cosines, of axis 1 before axis 2.

    Args:
        side: Pixels of a side.
        bands: K; frequencies go from 1 to half of `max_resolution`.
        max_resolution: Twice the highest frequency.

    Returns:
        (side^2, 2 (2 K + 1)).

    Example:
        >>> round(fourier_features(32, 8, 32).square().sum().item(), 2)
        17110.71
    """
    axis = torch.linspace(-1, 1, side)
    places = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(-1, 2)
    frequencies = torch.linspace(1.0, max_resolution / 2, bands)
    angles = (torch.pi * places[:, :, None] * frequencies).flatten(1)  # (M, 2 K)
    return torch.cat([places, angles.sin(), angles.cos()], dim=1)


class CrossAttend(nn.Module):
    """Queries (B, n, D) read inputs (B, m, C): attention of `attention` channels, then an MLP, both with residuals."""

    def __init__(self, config: IterativePerceiverConfig, channels: int, attention: int):
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.config, self.heads = config, config.num_cross_attention_heads
        self.norm_queries = nn.LayerNorm(D, eps=eps)
        self.norm_inputs = nn.LayerNorm(channels, eps=eps)
        self.query = nn.Linear(D, attention)
        self.key = nn.Linear(channels, attention)
        self.value = nn.Linear(channels, attention)
        self.proj = nn.Linear(attention, D)
        self.norm = nn.LayerNorm(D, eps=eps)
        self.mlp = MLP(D, D * config.widening_factor, D, config.hidden_act)

    def forward(self, x: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        inputs = self.norm_inputs(inputs)
        query, key = self.query(self.norm_queries(x)), self.key(inputs)
        H, value = self.heads, self.value(inputs)
        y, _ = attend(split_heads(query, H), split_heads(key, H), split_heads(value, H), self.config)
        x = x + self.proj(y)
        return x + self.mlp(self.norm(x))


class IterativePerceiverLayer(GradientCheckpointingLayer):
    """Self-attention of the latents: (B, K, D) -> (B, K, D)."""

    def __init__(self, config: IterativePerceiverConfig):
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.config, self.heads = config, config.num_attention_heads
        self.norm1 = nn.LayerNorm(D, eps=eps)
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)
        self.norm2 = nn.LayerNorm(D, eps=eps)
        self.mlp = MLP(D, D * config.widening_factor, D, config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        y, _ = attend(query, key, value, self.config)
        x = x + self.proj(y)
        return x + self.mlp(self.norm2(x))


def new_stem(config: IterativePerceiverConfig) -> nn.Sequential:
    """What makes tokens of the pixels: (B, 3, S, S) -> (B, channels, side, side)."""
    channels, width = config.num_channels, config.stem_channels
    parts: dict[str, nn.Module] = {}
    if config.inputs == "learned":
        parts = {"conv": nn.Conv2d(channels, width, 1)}
    elif config.inputs == "conv":
        parts = {
            "conv": nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False),
            "norm": nn.BatchNorm2d(width),
            "act": nn.ReLU(),
            "pool": nn.MaxPool2d(3, stride=2),  # without padding, as transformers has it: 224 pixels are 55 tokens wide
        }
    return nn.Sequential(OrderedDict(parts))


class IterativePerceiverNetwork(nn.Module):
    """The network, a base of transformers' and timm's model classes."""

    config: IterativePerceiverConfig
    positions: torch.Tensor | None

    def build_parts(self, config: IterativePerceiverConfig) -> None:
        """Create the submodules; their names are those of the state dict in both libraries."""
        self.latents = nn.Parameter(torch.empty(config.num_queries, config.hidden_size))
        self.stem = new_stem(config)
        self.register_buffer("positions", self.computed_positions(config), persistent=False)
        if config.inputs == "learned":
            self.position_embeddings = nn.Parameter(torch.empty(config.token_side**2, config.stem_channels))
        shared = config.share_weights
        crosses = min(config.num_cross_attends, 2) if shared else config.num_cross_attends
        layers = config.num_self_attends_per_block * (1 if shared else config.num_blocks)
        channels, attention = config.input_channels, config.attention_channels
        self.cross_attends = nn.ModuleList(CrossAttend(config, channels, attention) for _ in range(crosses))
        self.layers = nn.ModuleList(IterativePerceiverLayer(config) for _ in range(layers))
        if config.decoder_type == "query":
            D = config.hidden_size
            self.output_query = nn.Parameter(torch.empty(1, D))
            self.decoder = CrossAttend(config, D, D)

    @staticmethod
    def computed_positions(config: IterativePerceiverConfig) -> torch.Tensor | None:
        """(M, 2 (2 K + 1)) Fourier features of the tokens' places; None if positions are learned."""
        side = config.token_side
        learned = config.inputs == "learned"
        return None if learned else fourier_features(side, config.num_frequency_bands, config.max_resolution or side)

    def run(self, pixel_values: torch.Tensor, num_active_queries: int, num_iterations: int) -> torch.Tensor:
        """The first K latents after the first iterations: (B, 3, S, S) -> (B, K, D)."""
        return self.read(self.tokens(pixel_values), num_active_queries, num_iterations)

    def tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The tokens that latents read, each with its position, so that their order does not matter: (B, 3, S, S) -> (B, M, C).

        Raises:
            ValueError: If the images are not of the config's size.
        """
        check_pixel_values(pixel_values, self.config)
        pixels = self.stem(pixel_values.to(self.latents.dtype)).flatten(2).transpose(1, 2)  # (B, M, channels)
        positions = self.position_embeddings if self.positions is None else self.positions
        return torch.cat([pixels, positions.to(pixels.dtype).expand(pixels.shape[0], -1, -1)], dim=-1)

    def read(self, inputs: torch.Tensor, num_active_queries: int, num_iterations: int) -> torch.Tensor:
        """The first K latents after the first iterations, from all tokens or some of them: (B, m, C) -> (B, K, D)."""
        B, s = inputs.shape[0], self.config.num_self_attends_per_block
        # A copy: torch's FLOP counter fails on an expanded parameter.
        x, reads = self.latents[:num_active_queries].clone().expand(B, -1, -1), 0
        for i in range(num_iterations):
            if self.config.reads_at(i):
                x = self.cross_attends[min(reads, len(self.cross_attends) - 1)](x, inputs)
                reads += 1
            first = 0 if self.config.share_weights else i * s
            for layer in self.layers[first : first + s]:
                x = layer(x)
        return x

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """(B, K, D) -> (B, D)."""
        if self.config.decoder_type == "mean":
            return x.mean(1)
        return self.decode(x, self.output_query.clone())[:, 0]

    def decode(self, latents: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """What output queries read from the latents, each independently of the others (Perceiver IO).

        Args:
            latents: (B, K, D), such as `last_hidden_state`.
            queries: (n, D), the same for all images, or (B, n, D).

        Returns:
            (B, n, D).

        Raises:
            ValueError: If there is no decoder, or the shapes are not as described.
        """
        if self.config.decoder_type != "query":
            raise ValueError(f"Expected `decoder_type` 'query' to decode, got {self.config.decoder_type!r}.")
        B, D = latents.shape[0], self.config.hidden_size  # `len` would fix the batch size of an exported graph
        fits = queries.shape[-1:] == (D,) and (queries.ndim == 2 or (queries.ndim == 3 and len(queries) == B))
        if not fits:
            raise ValueError(f"Expected queries of shape (n, {D}) or ({B}, n, {D}), got {tuple(queries.shape)}.")
        return self.decoder(queries.expand(B, -1, -1), latents)


class IterativePerceiverPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and saving."""

    config: IterativePerceiverConfig
    config_class = IterativePerceiverConfig
    base_model_prefix = "iterative_perceiver"
    main_input_name = "pixel_values"
    input_modalities = "image"
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _no_split_modules = ["CrossAttend", "IterativePerceiverLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights, as in transformers' Perceiver; uses transformers' setters, which skip loaded weights."""
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            if isinstance(module, nn.BatchNorm2d):
                statistics: Any = module  # typed as optional
                init.zeros_(statistics.running_mean)
                init.ones_(statistics.running_var)
                init.zeros_(statistics.num_batches_tracked)
        elif isinstance(module, IterativePerceiverNetwork):
            init.trunc_normal_(module.latents, std=std)
            features = module.computed_positions(module.config)
            if module.positions is None or features is None:
                init.trunc_normal_(module.position_embeddings, std=std)
            else:
                init.copy_(module.positions, features)
            if module.config.decoder_type == "query":
                init.trunc_normal_(module.output_query, std=std)


class IterativePerceiverModel(IterativePerceiverPreTrainedModel, IterativePerceiverNetwork):
    """Perceiver or Perceiver IO without a head.

    Example:
        >>> model = IterativePerceiverModel(IterativePerceiverConfig()).eval()
        >>> model(torch.zeros(2, 3, 32, 32), num_active_queries=4).last_hidden_state.shape
        torch.Size([2, 4, 128])
    """

    def __init__(self, config: IterativePerceiverConfig):
        super().__init__(config)
        self.build_parts(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        num_active_queries: int | None = None,
        num_iterations: int | None = None,
        **kwargs: Any,
    ) -> IterativePerceiverModelOutput:
        """Compute the latents.

        Args:
            pixel_values: (B, C, S, S), normalised.
            num_active_queries: Use the first K latents; None is the config's value, or all.
            num_iterations: Number of iterations; None is the config's value, or all.
            **kwargs: transformers' `return_dict` and `num_items_in_batch`.

        Raises:
            ValueError: If the images or a knob are not as described, or another keyword would be ignored.
        """
        check_keywords(self, kwargs)
        knobs = self.config.knobs_for(num_active_queries=num_active_queries, num_iterations=num_iterations)
        x = self.run(pixel_values, **knobs)
        used = torch.full((x.shape[0],), x.shape[1], device=x.device)
        return IterativePerceiverModelOutput(last_hidden_state=x, pooler_output=self.pool(x), used=used)


class IterativePerceiverForImageClassification(IterativePerceiverPreTrainedModel, OptimizableModel):
    """Perceiver or Perceiver IO with a linear classifier.

    Example:
        >>> model = IterativePerceiverForImageClassification(IterativePerceiverConfig(num_labels=10)).eval()
        >>> model(torch.zeros(2, 3, 32, 32), num_iterations=2).logits.shape
        torch.Size([2, 10])
    """

    accepts_loss_kwargs = False  # the loss is a mean over the batch
    # Class of transformers that `from_transformers` takes -> `inputs`.
    transformers_classes: ClassVar = {
        "PerceiverForImageClassificationLearned": "learned",
        "PerceiverForImageClassificationFourier": "fourier",
        "PerceiverForImageClassificationConvProcessing": "conv",
    }

    def __init__(self, config: IterativePerceiverConfig):
        super().__init__(config)
        self.num_labels = len(config.label_names)
        self.iterative_perceiver = IterativePerceiverModel(config)
        self.head = nn.Linear(config.hidden_size, len(config.label_names))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_active_queries: int | None = None,
        num_iterations: int | None = None,
        **kwargs: Any,
    ) -> IterativePerceiverImageClassifierOutput:
        """Classify images with the first latents and iterations.

        Args:
            pixel_values: (B, C, S, S), normalised.
            labels: (B,) class indices.
            num_active_queries: As in `IterativePerceiverModel.forward`.
            num_iterations: As in `IterativePerceiverModel.forward`.
            **kwargs: transformers' `return_dict` and `num_items_in_batch`.

        Raises:
            ValueError: If the images or a knob are not as described, or another keyword would be ignored.
        """
        check_keywords(self, kwargs)
        outputs = self.iterative_perceiver(pixel_values, num_active_queries, num_iterations, **kwargs)
        logits = self.head(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return IterativePerceiverImageClassifierOutput(loss=loss, logits=logits, used=outputs.used)

    def blocks(self) -> Iterable[nn.Module]:
        """The self-attention layers."""
        return self.iterative_perceiver.layers

    @classmethod
    def from_transformers(cls, model: Any) -> "IterativePerceiverForImageClassification":
        """Convert one of transformers' `PerceiverForImageClassification` classes, with its weights.

        DeepMind's published weights come in that form. transformers' attention dropout is left out, which changes nothing in
        evaluation. Learned positions get the projection that follows them there.

        Args:
            model: A loaded `PerceiverForImageClassificationLearned`, `...Fourier` or `...ConvProcessing`.

        Raises:
            ValueError: If the model is of another kind, or has settings that this family lacks.
        """
        name = type(model).__name__
        if name not in cls.transformers_classes:
            given = name if isinstance(model, nn.Module) else repr(model)
            raise ValueError(
                f"Expected a loaded model of transformers' {' or '.join(cls.transformers_classes)}, got {given}."
            )
        c = model.config
        for field, expected in TRANSFORMERS_SETTINGS.items():
            if getattr(c, field) != expected:
                raise ValueError(f"Expected a Perceiver with `{field}` {expected!r}, got {getattr(c, field)!r}.")
        inputs = cls.transformers_classes[name]
        preprocessor = model.perceiver.input_preprocessor
        fields: dict[str, Any] = {"stem_channels": preprocessor.out_channels, "image_size": c.image_size}
        if inputs != "learned":
            embedding = preprocessor.position_embeddings
            resolution = embedding.max_resolution[0]
            fields |= {"num_frequency_bands": embedding.num_bands, "max_resolution": resolution}
            fields["image_size"] = resolution * (4 if inputs == "conv" else 1)
        own = IterativePerceiverConfig(
            inputs=inputs,
            num_queries=c.num_latents,
            hidden_size=c.d_latents,
            num_attention_heads=c.num_self_attention_heads,
            num_blocks=c.num_blocks,
            num_self_attends_per_block=c.num_self_attends_per_block,
            num_cross_attends=1,
            decoder_type="query",
            hidden_act=c.hidden_act,
            id2label=c.id2label,
            label2id=c.label2id,
            **fields,
        )
        network = cls(own)
        network.load_state_dict(from_transformers_weights(model.state_dict(), own))
        return network.eval()


# What transformers' config can vary and this family cannot; its decoder has one head and this width whatever the config says.
TRANSFORMERS_SETTINGS = {
    "qk_channels": None,
    "v_channels": None,
    "cross_attention_shape_for_attention": "kv",
    "num_cross_attention_heads": 1,
    "cross_attention_widening_factor": 1,
    "self_attention_widening_factor": 1,
    "use_query_residual": True,
}


def from_transformers_weights(
    theirs: dict[str, torch.Tensor], config: IterativePerceiverConfig
) -> dict[str, torch.Tensor]:
    """transformers' state dict under this family's names."""
    ours: dict[str, torch.Tensor] = {}

    def block(source: str, target: str, fused: bool) -> None:
        attention = f"{source}.attention.self"
        names = {"attention.output.dense": "proj", "mlp.dense1": "mlp.fc1", "mlp.dense2": "mlp.fc2"}
        names |= {
            "attention.self.layernorm1": "norm1" if fused else "norm_queries",
            "layernorm": "norm2" if fused else "norm",
        }
        if not fused:
            names |= {"attention.self.layernorm2": "norm_inputs"}
            names |= {f"attention.self.{part}": part for part in ("query", "key", "value")}
        for kind in ("weight", "bias"):
            for old, new in names.items():
                ours[f"{target}.{new}.{kind}"] = theirs[f"{source}.{old}.{kind}"]
            if fused:
                parts = [theirs[f"{attention}.{part}.{kind}"] for part in ("query", "key", "value")]
                ours[f"{target}.qkv.{kind}"] = torch.cat(parts)

    base, encoder, decoder = "iterative_perceiver", "perceiver.encoder", "perceiver.decoder.decoder"
    preprocessor = "perceiver.input_preprocessor"
    stem = {"convnet_1x1": "conv", "convnet.conv": "conv", "convnet.batchnorm": "norm"}
    for old, new in stem.items():
        found = {key for key in theirs if key.startswith(f"{preprocessor}.{old}.")}
        ours |= {f"{base}.stem.{new}.{key.rpartition('.')[2]}": theirs[key] for key in found}
    if config.inputs == "learned":
        positions = theirs[f"{preprocessor}.position_embeddings.position_embeddings"].double()
        weight, bias = (theirs[f"{preprocessor}.positions_projection.{kind}"] for kind in ("weight", "bias"))
        ours[f"{base}.position_embeddings"] = positions @ weight.double().T + bias.double()
    ours[f"{base}.latents"] = theirs["perceiver.embeddings.latents"]
    block(f"{encoder}.cross_attention", f"{base}.cross_attends.0", fused=False)
    for i in range(config.num_self_attends_per_block):
        block(f"{encoder}.self_attends.{i}", f"{base}.layers.{i}", fused=True)
    ours[f"{base}.output_query"] = theirs[f"{decoder}.output_position_encodings.position_embeddings"]
    block(f"{decoder}.decoding_cross_attention", f"{base}.decoder", fused=False)
    for kind in ("weight", "bias"):
        ours[f"head.{kind}"] = theirs[f"{decoder}.final_layer.{kind}"]
    return ours


__all__ = [
    "IterativePerceiverForImageClassification",
    "IterativePerceiverModel",
    "IterativePerceiverPreTrainedModel",
]
