"""The Visual Perceiver as a timm model: the parts of `modeling_visual_perceiver.py` behind timm's verbs.

Importing this file registers the architectures. timm has no entry points, so the import must come before `create_model`.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers import use_fused_attn
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
)
from timm.models._features import feature_take_indices
from torch import nn
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

from .configuration_visual_perceiver import ARCHITECTURES, TIMM_ARGUMENTS, VisualPerceiverConfig
from .elastic import check_pixel_values
from .modeling_visual_perceiver import OptimizedVisualPerceiver
from .visual_perceiver_layers import VisualPerceiverLayer, adapt_checkpoint_tensor, init_weights, resample_positions
from .visual_perceiver_network import ActiveTokens, DenseTokens, PerceiverNetwork


try:  # newer timm models keep a record of their input size for export
    from timm.models import _input
except ImportError:
    _input = None  # type: ignore[assignment]

__all__ = ["VisualPerceiver"]

# Tests the shape in Python, which torch.fx cannot trace.
register_notrace_function(check_pixel_values)


class VisualPerceiver(nn.Module, PerceiverNetwork):
    """Visual Perceiver with timm's interface; same parameters and names as `VisualPerceiverForImageClassification`.

    Example:
        >>> import timm
        >>> model = timm.create_model("visual_perceiver_nano_patch4_32").eval()
        >>> model(torch.zeros(2, 3, 32, 32), num_active_queries=8).shape
        torch.Size([2, 10])
    """

    # Latent tokens have no spatial map.
    output_fmt = "NLC"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        num_queries: int = 64,
        num_cross_heads: int = 1,
        act_layer: str = "gelu",
        qkv_bias: bool = True,
        stem: str = "patch",
        stem_widths: Sequence[Sequence[int]] | None = None,
        stem_downsample: str = "pool",
        stem_residual: bool = False,
        level_starts: Sequence[int] | None = None,
        level_widths: Sequence[int] | None = None,
        trunk_attention: str = "full",
        query_blocks: Sequence[int] | None = None,
        decoder_reads: str = "all",
        query_init: str = "random",
        attention_init: str = "random",
        norm_eps: float = 1e-6,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        num_active_queries: int | None = None,
        dqs_threshold: float | None = None,
        dqs_reference: str = "all",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Build the model.

        Args:
            img_size: Pixels, or (height, width); a multiple of `patch_size`.
            patch_size: Pixels.
            in_chans: Channels of an image.
            num_classes: Outputs of the classifier; 0 for none.
            global_pool: `"token"` decodes with the output query; `""` returns the (B, K, D) tokens.
            embed_dim: D.
            depth: Number of self-attention blocks.
            num_heads: Number of heads of the blocks and of the decoder.
            mlp_ratio: Width of every MLP relative to D.
            num_queries: Q.
            num_cross_heads: Number of heads of the cross-attention.
            act_layer: Name of the activation, in transformers' terms.
            qkv_bias: Whether the query, key and value projections have a bias.
            stem: `"patch"`, a linear map of patches, or `"conv"`, stages of convolutions.
            stem_widths: Output channels of the convolutions of each stage; the patch size is 2 ** (stages - 1).
            stem_downsample: Between stages, `"pool"` or `"stride"`.
            stem_residual: Give convolutions that keep their shape a shortcut.
            level_starts: Queries from which on a further level of the stem is read; None is one level.
            level_widths: Channels that each further level adds to the stem's second convolution, and in proportion to later ones.
            trunk_attention: Which queries see each other, `"full"` or `"block_causal"`.
            query_blocks: Where blocks of queries end; None is 1, 2, 4, 8, ... up to Q.
            decoder_reads: What the output query reads, `"all"` tokens or those of the `"last_block"`.
            query_init: How queries begin, `"random"` or `"spatial"`.
            attention_init: How attention in the blocks begins, `"random"` or `"mimetic"`.
            norm_eps: Epsilon of every layer norm.
            drop_rate: Dropout before the classifier.
            proj_drop_rate: Dropout after projections, MLPs and position embeddings.
            attn_drop_rate: Dropout of attention weights.
            drop_path_rate: Stochastic depth of the last block; grows linearly from 0 at the first.
            num_active_queries: What `forward` takes for K when not told; None is Q.
            dqs_threshold: What `forward` takes for t when not told; None is no selection.
            dqs_reference: Which earlier queries count in the selection, `"all"` or `"kept"`.
            device: Where to create the parameters.
            dtype: Dtype of the parameters.
        """
        super().__init__()
        fields: dict[str, Any] = {
            "image_size": img_size,
            "patch_size": patch_size,
            "num_channels": in_chans,
            "num_labels": num_classes,
            "hidden_size": embed_dim,
            "num_hidden_layers": depth,
            "num_attention_heads": num_heads,
            "intermediate_size": round(embed_dim * mlp_ratio),
            "num_queries": num_queries,
            "num_cross_attention_heads": num_cross_heads,
            "hidden_act": act_layer,
            "qkv_bias": qkv_bias,
            "stem": stem,
            "stem_widths": None if stem_widths is None else [list(stage) for stage in stem_widths],
            "stem_downsample": stem_downsample,
            "stem_residual": stem_residual,
            "level_starts": None if level_starts is None else list(level_starts),
            "level_widths": None if level_widths is None else list(level_widths),
            "trunk_attention": trunk_attention,
            "query_blocks": None if query_blocks is None else list(query_blocks),
            "decoder_reads": decoder_reads,
            "query_init": query_init,
            "attention_init": attention_init,
            "layer_norm_eps": norm_eps,
            "hidden_dropout_prob": proj_drop_rate,
            "attention_probs_dropout_prob": attn_drop_rate,
            "drop_path_rate": drop_path_rate,
            "num_active_queries": num_active_queries,
            "dqs_threshold": dqs_threshold,
            "dqs_reference": dqs_reference,
        }
        self.config = VisualPerceiverConfig(**fields)
        self.config._attn_implementation = "sdpa" if use_fused_attn() else "eager"
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = _check_pool(global_pool)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": patch_size} for i in range(depth)
        ]
        with torch.device(device) if device is not None else nullcontext():
            self.build_parts(self.config)
            self.head_drop = nn.Dropout(drop_rate)
            self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.to(dtype=dtype)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise every parameter anew, as transformers does for this model."""
        self.apply(partial(init_weights, std=self.config.initializer_range))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should spare."""
        return {"embeddings.position_embeddings", "cross_attention.queries", "decoder.queries"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort the parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^embeddings|^cross_attention",
            "blocks": [(r"^layers\.(\d+)", None), (r"^decoder|^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        for layer in self.layers:
            assert isinstance(layer, VisualPerceiverLayer)
            layer.gradient_checkpointing = enable
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new classifier, and another `global_pool` unless None."""
        if global_pool is not None:
            if global_pool and self.decoder is None:
                raise ValueError(f"Expected `global_pool` to be '' once the decoder is pruned, got {global_pool!r}.")
            self.global_pool = _check_pool(global_pool)
        self.num_classes = self.config.num_labels = num_classes
        like = self.cross_attention.queries
        self.head = (
            nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            if num_classes > 0
            else nn.Identity()
        )
        self.head.train(self.training)

    def set_input_size(self, img_size: int | Sequence[int] | None = None, patch_size: int | None = None) -> None:
        """Take images of another size from now on, resampling the positions; the number of queries stays."""
        if patch_size not in (None, self.config.patch_size):
            raise ValueError(f"Expected `patch_size` to stay {self.config.patch_size}, got {patch_size}.")
        if img_size is None:
            return
        old = _grid(self.config.image_size, self.config.patch_size)
        size = list(img_size) if isinstance(img_size, Sequence) else img_size
        new = VisualPerceiverConfig(image_size=size, patch_size=self.config.patch_size)  # validates
        self.config.image_size = new.image_size
        positions = self.embeddings.position_embeddings
        self.embeddings.position_embeddings = nn.Parameter(
            resample_positions(positions.detach(), old, _grid(new.image_size, new.patch_size)),
            requires_grad=positions.requires_grad,
        )
        if _input is not None:
            _input.update_model_input_size(self, new.image_height_width)

    def _begin(
        self, x: torch.Tensor, num_active_queries: int | torch.Tensor | None, dqs_threshold: float | None
    ) -> ActiveTokens:
        # torch.fx passes a placeholder for each argument that is not among its `concrete_args`. Selection is part of a
        # graph's structure, so a graph traced without them runs at the config's operating point.
        K, threshold = self.config.operating_point(
            None if isinstance(num_active_queries, Proxy) else num_active_queries,
            None if isinstance(dqs_threshold, Proxy) else dqs_threshold,
        )
        check_pixel_values(
            x, self.config, advice="`set_input_size`, or `img_size=...` of `create_model`, takes other sizes"
        )
        return self.begin(x, K, threshold)

    def _classify(self, active: ActiveTokens, pre_logits: bool = False) -> torch.Tensor:
        x = self.decode(active) if self.global_pool else active.dense()
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward_features(
        self, x: torch.Tensor, num_active_queries: int | torch.Tensor | None = None, dqs_threshold: float | None = None
    ) -> torch.Tensor:
        """Tokens before the decoder: (B, C, H, W) -> (B, K, D), rows of removed queries zero."""
        return self.process(self._begin(x, num_active_queries, dqs_threshold)).dense()

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Decode and classify tokens: (B, K, D) -> (B, classes), or (B, D) with `pre_logits`.

        Rows that are zero throughout are those of removed queries, and are not read.
        """
        return self._classify(DenseTokens(x, keep=x.ne(0).any(dim=-1)), pre_logits)

    def forward(
        self, x: torch.Tensor, num_active_queries: int | torch.Tensor | None = None, dqs_threshold: float | None = None
    ) -> torch.Tensor:
        """Classify images: (B, C, H, W) -> (B, classes).

        Args:
            x: Normalised images.
            num_active_queries: K in [1, Q]: use the first K queries; or a K for each image, (B,).
            dqs_threshold: Drop, per image, queries more similar than this to an earlier one.

        Raises:
            ValueError: If the images, K or the threshold are not as described.
        """
        return self._classify(self.process(self._begin(x, num_active_queries, dqs_threshold)))

    @torch.jit.ignore
    def optimize_for_inference(
        self,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        num_threads: int | None = None,
        int8: bool | None = None,
    ) -> "OptimizedClassifier":
        """A snapshot of this classifier that answers faster; see `VisualPerceiverForImageClassification`.

        Args:
            dtype: Dtype to compute in; None is the model's.
            backend: `"onnxruntime"` or `"torch"`; None is onnxruntime where it can.
            num_threads: Threads of onnxruntime; None is torch's number.
            int8: Have onnxruntime compute linears in 8 bits.

        Raises:
            ValueError: If the decoder is pruned or not in use (`global_pool=""`), or the backend does not take the settings.
            ImportError: If onnxruntime is not installed.
        """
        if self.decoder is None or not self.global_pool:
            raise ValueError(f"Expected a model with `global_pool` 'token', got {self.global_pool!r}.")
        settings = {"backend": backend, "num_threads": num_threads, "int8": int8 or None}
        return OptimizedClassifier(self, self.head, dtype=dtype, **settings)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NLC",
        intermediates_only: bool = False,
        output_dict: bool = False,
        num_active_queries: int | None = None,
        dqs_threshold: float | None = None,
    ) -> Any:
        """Tokens after chosen blocks, each (B, K, D).

        Args:
            x: Normalised images, (B, C, H, W).
            indices: The last n blocks if an int, all if None, else the blocks of these indices.
            norm: Normalise the intermediates as the decoder does before it reads them.
            stop_early: Leave out the blocks after the last chosen one.
            output_fmt: `"NLC"`; latent tokens have no spatial map.
            intermediates_only: Return the list alone, without the final tokens.
            output_dict: Return `image_features` and `image_intermediates` in a dictionary.
            num_active_queries: As in `forward`.
            dqs_threshold: As in `forward`.

        Returns:
            (final tokens, list of intermediates), unless the flags say otherwise.
        """
        if output_fmt != "NLC":
            raise ValueError(f"Expected `output_fmt` to be 'NLC', as latent tokens have no map, got {output_fmt!r}.")
        take_indices, last = feature_take_indices(len(self.layers), indices)
        active = self._begin(x, num_active_queries, dqs_threshold)
        x, intermediates = active.tokens, []
        mask, layout = self.trunk_masks(active)
        path_scales = self.draw_paths(active)
        for i, layer in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x = layer(x, mask, layout, path_scales=path_scales[i])
            if i in take_indices:
                tokens = self._norm_tokens(x) if norm else x
                intermediates.append(replace(active, tokens=tokens).dense())
        final = replace(active, tokens=x).dense()
        if output_dict:
            features = {} if intermediates_only else {"image_features": final}
            return {"image_intermediates": intermediates, **features}
        return intermediates if intermediates_only else (final, intermediates)

    def _norm_tokens(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) if self.decoder is None else self.decoder.norm_inputs(x)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what `forward_intermediates` does not need for these blocks; returns the blocks' indices."""
        take_indices, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        if prune_head and self.decoder is not None:
            self.norm = nn.Identity() if prune_norm else self.decoder.norm_inputs
            self.decoder = None
            self.reset_classifier(0, "")
        return take_indices


class OptimizedClassifier(OptimizedVisualPerceiver):
    """What `optimize_for_inference` makes of timm's model: (B, C, H, W) -> logits (B, classes)."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, num_active_queries: int | torch.Tensor | None = None, dqs_threshold: float | None = None
    ) -> torch.Tensor:
        return self.classify(x, num_active_queries, dqs_threshold)[0]


def _check_pool(global_pool: str) -> str:
    if global_pool not in ("token", ""):
        raise ValueError(f"Expected `global_pool` to be 'token' or '', got {global_pool!r}.")
    return global_pool


def _grid(image_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches."""
    height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
    return height // patch_size, width // patch_size


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: VisualPerceiver) -> dict[str, torch.Tensor]:
    """Make a checkpoint fit `model`: transformers' prefix, positions of another image size, more queries than needed."""
    state_dict = {name.removeprefix("visual_perceiver."): value for name, value in state_dict.items()}
    source = getattr(model, "pretrained_cfg", {}).get("input_size", ())[-2:]
    return {name: adapt_checkpoint_tensor(name, value, model.config, source) for name, value in state_dict.items()}


def _default_cfg(fields: dict[str, Any]) -> dict[str, Any]:
    num_labels = 10 if fields.get("image_size", 32) == 32 else 1000
    cfg = VisualPerceiverConfig(**{**fields, "num_labels": num_labels}).timm_pretrained_cfg
    return {"url": "", "pool_size": None, "license": "apache-2.0", **cfg, "input_size": tuple(cfg["input_size"])}


default_cfgs = generate_default_cfgs({name: _default_cfg(fields) for name, fields in ARCHITECTURES.items()})


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> VisualPerceiver:
    fields = {**ARCHITECTURES[variant]}
    width = fields.get("hidden_size", VisualPerceiverConfig.hidden_size)
    arguments = {argument: fields[field] for argument, field in TIMM_ARGUMENTS.items() if field in fields}
    if "intermediate_size" in fields:
        arguments["mlp_ratio"] = fields["intermediate_size"] / width
    return build_model_with_cfg(
        VisualPerceiver,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter", "output_fmt": "NLC"},
        **{**arguments, **kwargs},
    )


@register_model
def visual_perceiver_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisualPerceiver:
    """Visual Perceiver of width 96 and 6 blocks, 64 queries, for 32x32 images and CPUs."""
    return _create("visual_perceiver_nano_patch4_32", pretrained, **kwargs)


@register_model
def visual_perceiver_tiny_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisualPerceiver:
    """The paper's Visual Perceiver: DeiT-Tiny's width and blocks, 64 queries, for 32x32 images."""
    return _create("visual_perceiver_tiny_patch4_32", pretrained, **kwargs)


@register_model
def visual_perceiver_nano_conv_32(pretrained: bool = False, **kwargs: Any) -> VisualPerceiver:
    """Visual Perceiver of width 96 and 6 blocks with a light convolutional stem, for 32x32 images and CPUs."""
    return _create("visual_perceiver_nano_conv_32", pretrained, **kwargs)


@register_model
def visual_perceiver_micro_conv_32(pretrained: bool = False, **kwargs: Any) -> VisualPerceiver:
    """Visual Perceiver of width 128 and 8 blocks with a light convolutional stem, for 32x32 images and CPUs."""
    return _create("visual_perceiver_micro_conv_32", pretrained, **kwargs)


@register_model
def visual_perceiver_micro_levels_32(pretrained: bool = False, **kwargs: Any) -> VisualPerceiver:
    """Visual Perceiver of width 128 and 4 blocks whose convolutional stem goes deeper for later queries, for 32x32 images."""
    return _create("visual_perceiver_micro_levels_32", pretrained, **kwargs)


@register_model
def visual_perceiver_tiny_conv_32(pretrained: bool = False, **kwargs: Any) -> VisualPerceiver:
    """Visual Perceiver of width 192 and 8 blocks with a residual convolutional stem, for 32x32 images."""
    return _create("visual_perceiver_tiny_conv_32", pretrained, **kwargs)


@register_model
def visual_perceiver_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisualPerceiver:
    """Visual Perceiver of DeiT-Tiny's width, 196 queries, for 224x224 images."""
    return _create("visual_perceiver_tiny_patch16_224", pretrained, **kwargs)


@register_model
def visual_perceiver_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisualPerceiver:
    """Visual Perceiver of DeiT-Small's width, 196 queries, for 224x224 images."""
    return _create("visual_perceiver_small_patch16_224", pretrained, **kwargs)


@register_model
def visual_perceiver_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisualPerceiver:
    """Visual Perceiver of DeiT-Base's width, 196 queries, for 224x224 images."""
    return _create("visual_perceiver_base_patch16_224", pretrained, **kwargs)
