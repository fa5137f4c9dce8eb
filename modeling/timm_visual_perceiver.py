"""The Visual Perceiver as a timm model.

Importing this file registers the architectures with timm, so the import must come before `create_model`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.models import register_notrace_function
from timm.models._features import feature_take_indices
from torch import nn
from torch.fx import Proxy

from .configuration_visual_perceiver import VisualPerceiverConfig
from .elastic import check_pixel_values
from .modeling_visual_perceiver import OptimizedVisualPerceiver, VisualPerceiverPreTrainedModel
from .timm_family import TimmClassifier, register_architectures
from .visual_perceiver_incremental import IncrementalState
from .visual_perceiver_layers import adapt_checkpoint_tensor, resample_positions
from .visual_perceiver_network import ActiveTokens, DenseTokens, PerceiverNetwork


try:  # newer timm models keep a record of their input size for export
    from timm.models import _input
except ImportError:
    _input = None  # type: ignore[assignment]

__all__ = ["VisualPerceiver"]

OTHER_SIZES = "`set_input_size`, or `img_size=...` of `create_model`, takes other sizes"

# Compares shapes in Python, which torch.fx cannot trace.
register_notrace_function(check_pixel_values)


class VisualPerceiver(PerceiverNetwork, TimmClassifier):
    """Visual Perceiver with timm's interface.

    Args:
        global_pool: `"token"` decodes with the output query; `""` returns the (B, K, D) tokens.
        **arguments: Arguments of `TimmClassifier`: the fields of `VisualPerceiverConfig`, some of them by timm's names
            (`embed_dim`, `depth`, `num_heads`, `num_cross_heads`, `act_layer`, `norm_eps`, `proj_drop_rate`,
            `attn_drop_rate`), and `mlp_ratio`, the width of every MLP relative to D.

    Example:
        >>> import timm
        >>> model = timm.create_model("visual_perceiver_nano_patch4_32").eval()
        >>> model(torch.zeros(2, 3, 32, 32), num_active_queries=8).shape
        torch.Size([2, 10])
    """

    pretrained_class = VisualPerceiverPreTrainedModel
    output_fmt = "NLC"  # latent tokens have no spatial map
    feature_cfg = {"out_indices": 3, "feature_cls": "getter", "output_fmt": "NLC"}

    def __init__(self, global_pool: str = "token", **arguments: Any):
        super().__init__(**arguments)
        self.global_pool = _check_pool(global_pool)
        info = {"num_chs": self.embed_dim, "reduction": self.config.patch_size}
        self.feature_info = [{"module": f"layers.{i}", **info} for i in range(len(self.layers))]

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

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new classifier, and another `global_pool` unless None."""
        if global_pool and self.decoder is None:
            raise ValueError(f"Expected `global_pool` to be '' once the decoder is pruned, got {global_pool!r}.")
        if global_pool is not None:
            self.global_pool = _check_pool(global_pool)
        super().reset_classifier(num_classes)

    def adapt_tensor(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Resample positions of another image size, and take the first queries of more."""
        source = getattr(self, "pretrained_cfg", {}).get("input_size", ())[-2:]
        return adapt_checkpoint_tensor(name, value, self.config, source)

    def set_input_size(self, img_size: int | Sequence[int] | None = None, patch_size: int | None = None) -> None:
        """Take images of another size from now on, resampling the positions; the number of queries stays."""
        if patch_size not in (None, self.config.patch_size):
            raise ValueError(f"Expected `patch_size` to stay {self.config.patch_size}, got {patch_size}.")
        if img_size is None:
            return
        old = self.config.grid
        size = list(img_size) if isinstance(img_size, Sequence) else img_size
        new = VisualPerceiverConfig(image_size=size, patch_size=self.config.patch_size)  # validates
        self.config.image_size = new.image_size
        positions = self.embeddings.position_embeddings
        self.embeddings.position_embeddings = nn.Parameter(
            resample_positions(positions.detach(), old, new.grid),
            requires_grad=positions.requires_grad,
        )
        if _input is not None:
            _input.update_model_input_size(self, new.image_height_width)

    def _begin(
        self, x: torch.Tensor, num_active_queries: int | torch.Tensor | None, dqs_threshold: float | None
    ) -> ActiveTokens:
        # torch.fx passes a placeholder for each argument that is not in its `concrete_args`. Selection changes the graph's
        # structure, so a graph that is traced without them runs at the config's operating point.
        K, threshold = self.config.operating_point(
            None if isinstance(num_active_queries, Proxy) else num_active_queries,
            None if isinstance(dqs_threshold, Proxy) else dqs_threshold,
        )
        check_pixel_values(x, self.config, advice=OTHER_SIZES)
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

        Rows of zeros are removed queries, which are not read.
        """
        return self._classify(DenseTokens(x, keep=x.ne(0).any(dim=-1)), pre_logits)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, num_active_queries: int | torch.Tensor | None = None, dqs_threshold: float | None = None
    ) -> torch.Tensor:
        """Classify images: (B, C, H, W) -> (B, classes).

        Args:
            x: Normalised images.
            num_active_queries: K in [1, Q]: use the first K queries; or (B,) with a K for each image.
            dqs_threshold: Drop, per image, queries more similar than this to an earlier one.

        Raises:
            ValueError: If the images, K or the threshold are not as described.
        """
        return self._classify(self.process(self._begin(x, num_active_queries, dqs_threshold)))

    @torch.jit.ignore
    def start(self, x: torch.Tensor) -> IncrementalState:
        """Read images, to classify them with few queries and later with more; see `VisualPerceiverForImageClassification`.

        Args:
            x: Normalised images, (B, C, H, W).

        Raises:
            ValueError: If the images are not of the model's size, or the decoder is pruned or not in use (`global_pool=""`).
        """
        self._check_decodes()
        check_pixel_values(x, self.config, advice=OTHER_SIZES)
        return IncrementalState.read(self, self, x)

    def _check_decodes(self) -> None:
        if self.decoder is None or not self.global_pool:
            raise ValueError(f"Expected a model with `global_pool` 'token', got {self.global_pool!r}.")

    @torch.jit.ignore
    def optimize_for_inference(
        self,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        num_threads: int | None = None,
        int8: bool | None = None,
    ) -> "OptimizedClassifier":
        """A faster copy of this classifier for inference; see `VisualPerceiverForImageClassification`.

        Args:
            dtype: Dtype to compute in; None is the model's.
            backend: `"onnxruntime"` or `"torch"`; None is onnxruntime where it supports the settings.
            num_threads: Threads of onnxruntime; None is torch's number.
            int8: Have onnxruntime compute linears in 8 bits.

        Raises:
            ValueError: If the decoder is pruned or not in use (`global_pool=""`), or the backend does not take the settings.
            ImportError: If onnxruntime is not installed.
        """
        self._check_decodes()
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
            stop_early: Do not run the blocks after the last chosen one.
            output_fmt: `"NLC"`; latent tokens have no spatial map.
            intermediates_only: Return only the list, without the final tokens.
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
        """Remove modules that `forward_intermediates` does not need for these blocks; returns the blocks' indices."""
        take_indices, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        if prune_head and self.decoder is not None:
            self.norm = nn.Identity() if prune_norm else self.decoder.norm_inputs
            self.decoder = None
            self.reset_classifier(0, "")
        return take_indices


class OptimizedClassifier(OptimizedVisualPerceiver):
    """The result of `optimize_for_inference` for timm's model: (B, C, H, W) -> logits (B, classes)."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, num_active_queries: int | torch.Tensor | None = None, dqs_threshold: float | None = None
    ) -> torch.Tensor:
        return self.classify(x, num_active_queries, dqs_threshold)[0]


def _check_pool(global_pool: str) -> str:
    if global_pool not in ("token", ""):
        raise ValueError(f"Expected `global_pool` to be 'token' or '', got {global_pool!r}.")
    return global_pool


register_architectures(VisualPerceiver)
