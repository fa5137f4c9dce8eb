"""The Visual Perceiver (Dancette & Cord 2022): image models that read patches with a variable number of queries.

An image becomes N patch tokens; Q learned queries read them once by cross-attention; the first K of them, or those that
Dynamic Query Selection keeps, go through the self-attention blocks; one output query reads the result.

Shapes: B images, N input tokens, Q learned queries, K active queries, D width, H heads, d = D / H, T tokens of a packed
batch. `PerceiverNetwork` and its layers are shared by the `PreTrainedModel`s in this file and by timm's model in
`timm_visual_perceiver.py`, so that one file of weights serves both.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import PreTrainedModel, load_state_dict
from transformers.processing_utils import Unpack
from transformers.utils.generic import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_visual_perceiver import VisualPerceiverConfig
from .conv_stem import ConvBlock, level_channels
from .elastic import Budget, ElasticModel, GraphPlan, Pass, check_keywords, check_pixel_values, reference_model
from .engines import ENGINES
from .family_config import FamilyConfig  # noqa: F401  transformers 5.4 copies what this file imports alone
from .macs import count_macs  # noqa: F401  likewise
from .optimized import OptimizedModel, check_in_memory, create_engine
from .query_selection import cosine_similarities, keep_dissimilar
from .ragged import PackedLayout  # noqa: F401  likewise
from .spatial_init import token_features  # noqa: F401  likewise
from .visual_perceiver_incremental import (
    IncrementalState,
    VisualPerceiverImageClassifierOutput,
    VisualPerceiverModelOutput,
)
from .visual_perceiver_layers import (
    VisualPerceiverCrossAttention,
    VisualPerceiverLayer,
    VisualPerceiverSelfAttention,
    adapt_checkpoint_tensor,
    init_weights,
)
from .visual_perceiver_network import PerceiverNetwork


class VisualPerceiverPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and saving; what each class supports."""

    config: VisualPerceiverConfig
    config_class = VisualPerceiverConfig
    base_model_prefix = "visual_perceiver"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisualPerceiverEmbeddings", "VisualPerceiverCrossAttention", "VisualPerceiverLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": VisualPerceiverLayer,
        "attentions": VisualPerceiverSelfAttention,
        "cross_attentions": OutputRecorder(VisualPerceiverCrossAttention, index=1, layer_name="cross_attention"),
    }

    def get_input_embeddings(self) -> nn.Module:
        """The projection to tokens. Adapters with gradient checkpointing make its output need a gradient."""
        base: Any = self.base_model
        return base.embeddings.patch_embeddings.projection

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the projection to tokens."""
        base: Any = self.base_model
        base.embeddings.patch_embeddings.projection = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.config.initializer_range)

    @staticmethod
    def _load_pretrained_model(
        model: Any,
        state_dict: Any,
        checkpoint_files: list[str] | None,
        load_config: Any,
        expected_keys: list[str] | None = None,
    ) -> tuple[Any, Any]:
        """Load as transformers does, then adapt tensors of another size where possible."""
        info, offloaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )
        config, cfg = model.config, model.config.pretrained_cfg or {}
        for mismatch in sorted(info.mismatched_keys, key=str):
            name = mismatch[0]
            if not name.endswith(("embeddings.position_embeddings", "cross_attention.queries")):
                continue
            files = [state_dict] if state_dict is not None else map(load_state_dict, checkpoint_files or ())
            value = next(
                tensors[key] for tensors in files for key in tensors if key.endswith(name) or name.endswith(key)
            )
            try:
                value = adapt_checkpoint_tensor(name, value, config, cfg.get("input_size", ())[-2:])
            except ValueError:
                if load_config.ignore_mismatched_sizes:
                    continue  # its weights stay fresh, as transformers does it
                raise
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            place = next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))
            before = getattr(module, attribute)
            if value.shape != before.shape:
                continue
            parameter: Any = nn.Parameter(value.to(place, before.dtype), requires_grad=before.requires_grad)
            parameter._is_hf_initialized = True
            setattr(module, attribute, parameter)
            info.mismatched_keys.discard(mismatch)
        return info, offloaded


class VisualPerceiverModel(VisualPerceiverPreTrainedModel, PerceiverNetwork):
    """The Visual Perceiver without a head.

    Example:
        >>> model = VisualPerceiverModel(VisualPerceiverConfig()).eval()
        >>> output = model(torch.zeros(2, 3, 32, 32), num_active_queries=16)
        >>> output.last_hidden_state.shape, output.pooler_output.shape
        (torch.Size([2, 16, 192]), torch.Size([2, 192]))
    """

    def __init__(self, config: VisualPerceiverConfig):
        super().__init__(config)
        self.build_parts(config)
        self.post_init()
        # transformers initialises modules that own parameters; these two also set parameters of their children.
        if not self.cross_attention.queries.is_meta:
            for module in self.modules():
                if isinstance(module, (ConvBlock, VisualPerceiverSelfAttention)):
                    self._init_weights(module)

    # `hidden_states[-1]` is the last block's output as it is, with the rows of removed queries not yet zeroed.
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        num_active_queries: int | torch.Tensor | None = None,
        dqs_threshold: float | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VisualPerceiverModelOutput:
        """Compute the tokens of the active queries and what the output query reads from them.

        Args:
            pixel_values: (B, C, H, W), normalised.
            num_active_queries: K in [1, Q]: use the first K queries; or (B,) with a K for each image. None is the config's value,
                or Q.
            dqs_threshold: Drop, per image, the queries whose cross-attention output has a cosine above this with that of an
                earlier query (section 3.4); at least -1, and 1 keeps all. None is the config's value, or no selection;
                infinity turns selection off. If hidden states or attentions are recorded, dropped queries are masked instead.
            interpolate_pos_encoding: Allow images of any multiple of the patch size, by resampling the positions.
            **kwargs: transformers' `output_hidden_states`, `output_attentions`, `return_dict` and `num_items_in_batch`.

        Raises:
            ValueError: If the images, K or the threshold are not as described, or another keyword would be ignored.
        """
        check_keywords(self, kwargs)
        K, threshold = self.config.operating_point(num_active_queries, dqs_threshold)
        need_weights, need_states = (
            bool(getattr(self.config, name, False) if kwargs.get(name) is None else kwargs[name])
            for name in ("output_attentions", "output_hidden_states")
        )
        # Recorded tensors are dense, (B, K, ...), so recording takes the masked form.
        record = {"need_weights": True} if need_weights else {}
        masked = need_weights or need_states
        active = self.begin(pixel_values, K, threshold, interpolate_pos_encoding, need_weights, masked)
        active = self.process(active, **record)
        return VisualPerceiverModelOutput(
            last_hidden_state=active.dense(),
            pooler_output=self.decode(active),
            active_queries=self.active_queries(active),
        )


class OptimizedVisualPerceiver(OptimizedModel):
    """A classifier that `optimize_for_inference` makes from a copy of the weights; it is called like the model."""

    def __init__(self, parts: PerceiverNetwork, head: nn.Module, **settings: Any):
        check_weights(parts)
        like = parts.cross_attention.queries
        super().__init__(parts.config, create_engine(ENGINES, (parts, head), like, **settings))

    def classify(
        self,
        pixel_values: torch.Tensor,
        num_active_queries: int | torch.Tensor | None = None,
        dqs_threshold: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, labels) and the active queries (B, Q)."""
        K, threshold = self.config.operating_point(num_active_queries, dqs_threshold)
        self.check_images(pixel_values)
        return self.engine(pixel_values, K, threshold)

    def start(self, pixel_values: torch.Tensor) -> Any:
        """Read images, to classify them with few queries and later with more, as the model's `start` does."""
        self.check_images(pixel_values)
        if hasattr(self.engine, "start"):
            return self.engine.start(pixel_values)
        return IncrementalState.read(self.engine.parts, self.engine, pixel_values.to(self.dtype))

    def forward(  # type: ignore[override]
        self,
        pixel_values: torch.Tensor,
        num_active_queries: int | torch.Tensor | None = None,
        dqs_threshold: float | None = None,
    ) -> VisualPerceiverImageClassifierOutput:
        """Classify images, as `VisualPerceiverForImageClassification` does, without gradients or recorded states."""
        logits, active = self.classify(pixel_values, num_active_queries, dqs_threshold)
        return VisualPerceiverImageClassifierOutput(logits=logits, active_queries=active)


class VisualPerceiverForImageClassification(VisualPerceiverPreTrainedModel, ElasticModel):
    """The Visual Perceiver with a linear classifier on the output query's token.

    Example:
        >>> config = VisualPerceiverConfig(num_labels=10)
        >>> model = VisualPerceiverForImageClassification(config).eval()
        >>> model(torch.zeros(2, 3, 32, 32), num_active_queries=8).logits.shape
        torch.Size([2, 10])
    """

    # The loss is a mean over the batch, so transformers' Trainer must divide what it accumulates by the number of batches.
    accepts_loss_kwargs = False

    def __init__(self, config: VisualPerceiverConfig):
        super().__init__(config)
        self.num_labels = len(config.label_names)
        self.visual_perceiver = VisualPerceiverModel(config)
        self.head = nn.Linear(config.hidden_size, self.num_labels) if self.num_labels > 0 else nn.Identity()
        self.post_init()

    @property
    def ragged_backend(self) -> str:
        """See `PerceiverNetwork.ragged_backend`.

        Example:
            >>> VisualPerceiverForImageClassification(VisualPerceiverConfig()).ragged_backend
            'grouped'
        """
        return self.visual_perceiver.ragged_backend

    def set_ragged_backend(self, backend: str = "auto") -> None:
        """See `PerceiverNetwork.set_ragged_backend`."""
        self.visual_perceiver.set_ragged_backend(backend)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_active_queries: int | torch.Tensor | None = None,
        dqs_threshold: float | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VisualPerceiverImageClassifierOutput:
        """Classify images at the compute budget that `num_active_queries` and `dqs_threshold` set.

        Args:
            pixel_values: (B, C, H, W), normalised.
            labels: (B,) class indices, -100 for images that do not count; or what the config's `problem_type` asks for, (B, labels).
            num_active_queries: As in `VisualPerceiverModel.forward`.
            dqs_threshold: As in `VisualPerceiverModel.forward`.
            interpolate_pos_encoding: As in `VisualPerceiverModel.forward`.
            **kwargs: transformers' `output_hidden_states`, `output_attentions`, `return_dict` and `num_items_in_batch`.

        Raises:
            ValueError: If the images, K, the threshold or, on a CPU, the labels are not as described, or another keyword would be ignored.
        """
        check_keywords(self, kwargs)
        outputs = self.visual_perceiver(
            pixel_values,
            num_active_queries=num_active_queries,
            dqs_threshold=dqs_threshold,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **kwargs,
        )
        logits = self.head(outputs.pooler_output)
        loss = None
        if labels is not None:
            if self.config.problem_type in (None, "single_label_classification") and self.num_labels > 1:
                check_labels(labels, self.num_labels)
            loss = self.loss_function(labels, logits, self.config)
        return VisualPerceiverImageClassifierOutput(
            loss=loss,
            logits=logits,
            active_queries=outputs.active_queries,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )

    def forward_budgets(self, pixel_values: torch.Tensor, passes: Sequence[Pass]) -> list[torch.Tensor]:
        """The logits (n, labels) of each pass's n images, which are read once; see `PerceiverNetwork.forward_passes`.

        Example:
            >>> from hf_visual_perceiver.modeling.elastic import Budget
            >>> model = VisualPerceiverForImageClassification(VisualPerceiverConfig(num_labels=10)).eval()
            >>> full, half = model.forward_budgets(torch.zeros(2, 3, 32, 32), [Pass(), Pass(Budget(num_active_queries=32))])
            >>> half.shape
            torch.Size([2, 10])
        """
        pooled = self.visual_perceiver.forward_passes(pixel_values, passes, self.packs_passes)
        return [self.head(x) for x in pooled]

    @property
    def skips_parameters(self) -> bool:
        """Whether the stem has levels, which small budgets leave unused."""
        return self.config.num_levels > 1

    @property
    def stem(self) -> nn.Module:
        """The stem before the projection to tokens; a convolutional one can be trained alone."""
        return self.visual_perceiver.embeddings.patch_embeddings.stem

    @property
    def stem_channels(self) -> list[int]:
        """Channels of the stem's features at each of its levels, ascending; empty without a convolutional stem."""
        if self.config.stem == "patch":
            return []
        levels = level_channels(self.config.stem_widths or [], self.config.level_widths or [])
        return list(accumulate(level[-1] for level in levels))

    @contextmanager
    def captured_features(self) -> Iterator[list[torch.Tensor]]:
        """Collect the features (B, C, h, w) of the levels that each forward pass computes, while the context is open."""
        if self.config.stem == "patch":
            raise ValueError("Expected `stem` to be 'conv', whose features can be captured, got 'patch'.")
        features: list[torch.Tensor] = []
        embeddings = self.visual_perceiver.embeddings
        hook = embeddings.register_forward_hook(lambda *call: features.append(call[-1][1][-1]))
        try:
            yield features
        finally:
            hook.remove()

    def blocks(self) -> Iterable[nn.Module]:
        """The self-attention blocks."""
        return self.visual_perceiver.layers

    def as_graph(self, budget: Budget | None = None) -> GraphPlan:
        """A graph with t as an input, and K as another unless the budget fixes it; see `ElasticModel.as_graph`."""
        config = self.config
        K, t = config.operating_point()
        inputs, fixed = {"dqs_threshold": torch.tensor(1.0)}, {}
        if budget is None:
            inputs["num_active_queries"] = torch.tensor(config.num_queries)
        else:
            knobs = config.resolve(**budget.kwargs)
            if knobs["dqs_threshold"] != math.inf:
                raise ValueError(
                    f"Expected a budget of K, as t is an input of the graph, got {budget.short(config.knobs)}."
                )
            K = fixed["num_active_queries"] = knobs["num_active_queries"]
        facts = {
            "num_queries": config.num_queries,
            "num_active_queries": fixed.get("num_active_queries"),
            "default_num_active_queries": K,
            "default_dqs_threshold": 1.0 if t is None else t,
        }
        module = VisualPerceiverGraph(self, fixed.get("num_active_queries"))
        return GraphPlan(module, inputs, fixed, ("logits", "active_queries"), facts)

    @torch.inference_mode()
    def check_budgets(self, pixel_values: torch.Tensor) -> list[Budget]:
        """Several K, each without and with thresholds that are not near a cosine of these images."""
        Q = self.config.num_queries
        cosines = cosine_similarities(self.visual_perceiver.read(pixel_values, Q))
        thresholds = [None, *(clear_threshold(cosines, t) for t in (0.6, 0.8, 0.95))]
        budgets = [*(K for K in (1, 2, 7, 16, 64) if Q > K), Q]
        return [Budget(num_active_queries=K, dqs_threshold=t) for K in budgets for t in thresholds]

    def forward_chosen(
        self, pixel_values: torch.Tensor, budgets: Sequence[Budget], choose: Callable[[torch.Tensor], torch.Tensor]
    ) -> VisualPerceiverImageClassifierOutput:
        """Classify each image at a budget that depends on what its queries read.

        Args:
            pixel_values: (B, C, H, W), normalised.
            budgets: Ascending budgets that set K only.
            choose: Maps the cross-attention outputs at the last budget, (B, K, D), to indices into `budgets`, (B,).
        """
        parts = self.visual_perceiver
        steps = [self.config.resolve(**budget.kwargs)["num_active_queries"] for budget in budgets]
        y = parts.read(pixel_values, steps[-1])
        K = torch.tensor(steps, device=y.device)[choose(y)]
        active = parts.process(parts.keep_queries(y, torch.arange(y.shape[1], device=y.device) < K[:, None]))
        return VisualPerceiverImageClassifierOutput(
            logits=self.head(parts.decode(active)), active_queries=parts.active_queries(active)
        )

    def look(self, pixel_values: torch.Tensor, budget: Budget | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-attention outputs of the first K queries, (B, K, D), and weights (B, K, rows, columns), the mean over heads.

        Args:
            pixel_values: (B, C, H, W), normalised.
            budget: Sets K; None is all queries.
        """
        K = self.config.resolve(**(budget or Budget()).kwargs)["num_active_queries"]
        y, weights = self.visual_perceiver.look(pixel_values, K)
        assert weights is not None, "look needs them"
        return y, weights.mean(1).unflatten(-1, self.config.grid)  # (B, H, K, N) -> (B, K, h, w)

    def start(self, pixel_values: torch.Tensor) -> IncrementalState:
        """Read images, to classify them with few queries and later with more by `state.extend(K)`.

        Args:
            pixel_values: (B, C, H, W), normalised.

        Raises:
            ValueError: If the images are not of the config's size.

        Example:
            >>> config = VisualPerceiverConfig(num_labels=10, trunk_attention="block_causal")
            >>> model = VisualPerceiverForImageClassification(config).eval()
            >>> state = model.start(torch.zeros(2, 3, 32, 32))
            >>> few, more = state.extend(4), state.extend(16)  # 12 more queries; nothing is computed twice
            >>> torch.allclose(more.logits, model(torch.zeros(2, 3, 32, 32), num_active_queries=16).logits, atol=1e-5)
            True
        """
        check_pixel_values(pixel_values, self.config)
        return IncrementalState.read(self.visual_perceiver, self, pixel_values)

    def optimize_for_inference(
        self,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        num_threads: int | None = None,
        int8: bool | None = None,
    ) -> OptimizedVisualPerceiver:
        """A faster copy of this model for inference; later changes of this model do not change the copy.

        onnxruntime's logits equal this model's to 1e-4 in float32. The copy has no gradients, hidden states or attentions.

        Args:
            dtype: Dtype to compute in, such as `torch.bfloat16` on CPUs that have it; None is the model's.
            backend: `"onnxruntime"`, which computes in float32 on CPUs, or `"torch"`, this model's own modules. None is onnxruntime where it supports the settings, if hf_visual_perceiver is imported.
            num_threads: Threads of onnxruntime; None is torch's number.
            int8: Have onnxruntime compute linears in 8 bits.

        Raises:
            ValueError: If the backend does not take the settings, weights are offloaded, or a linear has been replaced, as
                an adapter does until it is merged.
            ImportError: If onnxruntime is not installed.

        Example:
            >>> model = VisualPerceiverForImageClassification(VisualPerceiverConfig(num_labels=10)).eval()
            >>> fast = model.optimize_for_inference(backend="torch")
            >>> fast(torch.zeros(2, 3, 32, 32), num_active_queries=8).logits.shape
            torch.Size([2, 10])
        """
        settings = {"backend": backend, "num_threads": num_threads, "int8": int8 or None}
        return OptimizedVisualPerceiver(self.visual_perceiver, self.head, dtype=dtype, **settings)


class VisualPerceiverGraph(nn.Module):
    """A classifier whose knobs are tensors, so that a graph can have them as inputs.

    Args:
        model: The classifier; a copy of it is kept, in float32 and on the CPU.
        num_active_queries: The K of a graph without this input.
    """

    def __init__(self, model: "VisualPerceiverForImageClassification", num_active_queries: int | None = None):
        super().__init__()
        self.model = reference_model(model).requires_grad_(False)
        # Fused attention cannot be exported with a dynamic number of queries before torch 2.15.
        self.model.set_attn_implementation("eager")
        self.num_active_queries = num_active_queries

    def forward(
        self, pixel_values: torch.Tensor, dqs_threshold: torch.Tensor, num_active_queries: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, labels) and the active queries (B, Q) bool.

        Args:
            pixel_values: (B, C, H, W), normalised.
            dqs_threshold: A float32 scalar; 1 keeps all.
            num_active_queries: An int64 scalar, unless K is fixed.
        """
        parts, Q = self.model.visual_perceiver, self.model.config.num_queries
        K: Any = self.num_active_queries
        if num_active_queries is not None:
            K = num_active_queries.clamp(1, Q).item()
            torch._check(K >= 1)
            torch._check(K <= Q)
        if num_active_queries is None or self.model.config.num_levels == 1:
            y = parts.read(pixel_values, K)  # (B, K, D)
        else:  # the number of levels would depend on K, so all are computed; torch 2.8 cannot export a slice here
            y = parts.read(pixel_values, Q).index_select(1, torch.arange(K, device=pixel_values.device))
        too_similar = cosine_similarities(y) > dqs_threshold  # (B, K, K)
        # Padded to Q, so that the rule's loop has a fixed length; padding is similar to nothing.
        keep = keep_dissimilar(F.pad(too_similar, (0, Q - K, 0, Q - K)), self.model.config.dqs_reference)[:, :K]
        active = parts.process(parts.keep_queries(y, keep, masked=True))
        return self.model.head(parts.decode(active)), parts.active_queries(active)


def clear_threshold(cosines: torch.Tensor, threshold: float, reach: float = 0.01) -> float:
    """The middle of the widest gap between cosines near `threshold`, so that rounding cannot tip a query over it.

    Args:
        cosines: Cosines that are compared with the threshold.
        threshold: Returned unchanged from 1 on.
        reach: Largest distance from the threshold.

    Example:
        >>> round(clear_threshold(torch.tensor([0.5, 0.795, 0.8, 0.806]), 0.8), 4)
        0.803
    """
    if threshold >= 1:
        return threshold
    near = cosines.double().flatten()
    near = near[(near - threshold).abs() < reach].sort().values
    edges = torch.cat([near.new_tensor([threshold - reach]), near, near.new_tensor([threshold + reach])])
    widest = edges.diff().argmax()
    return ((edges[widest] + edges[widest + 1]) / 2).item()


def check_weights(parts: PerceiverNetwork) -> None:
    """Raise a `ValueError` if weights are not in memory, or linears have been replaced, as adapters do."""
    assert isinstance(parts, nn.Module)
    check_in_memory(parts)
    names = {"query", "key_value", "qkv", "proj", "fc1", "fc2"}
    for path, module in parts.named_modules():
        if path.rpartition(".")[2] in names and not isinstance(module, nn.Linear):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise ValueError(f"Expected plain linears, got {kind} at {path}; merge adapters before optimising.")


def check_labels(labels: torch.Tensor, num_labels: int) -> None:
    """Raise a `ValueError` for class indices outside [0, num_labels) that are not -100, which the loss ignores.

    Checks on CPUs only: on an accelerator the host would wait, and torch.compile would break the graph.
    """
    if labels.is_floating_point() or labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    labels = labels[labels != -100]
    if labels.numel() and not (labels.min() >= 0 and labels.max() < num_labels):
        raise ValueError(
            f"Expected labels in [0, {num_labels}), got values from {labels.min().item()} to {labels.max().item()}; "
            "only -100 is ignored."
        )


__all__ = [
    "OptimizedVisualPerceiver",
    "VisualPerceiverForImageClassification",
    "VisualPerceiverModel",
    "VisualPerceiverPreTrainedModel",
]
