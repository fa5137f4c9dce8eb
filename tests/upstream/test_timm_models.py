"""timm's model tests on the registered Visual Perceivers.

Upstream parametrizes them over timm's registry, so they are called here with our names. Left out:

- TorchScript (`test_model_forward_torchscript`, `test_model_forward_fx_torchscript`): packed batches and the config are
  plain Python, which it cannot compile; torch.export and torch.compile are what the model supports.
- `test_model_default_cfgs`, `test_model_forward_features`: for models with a spatial map; the tests of "non-standard"
  models and of the feature getter stand in their place, as for timm's own ViTs.
- `test_model_inference`, `test_model_load_pretrained`, `test_model_features_pretrained`: no weights are registered.
"""

import pytest
from timm.layers import get_channel_dim
from upstream_timm import test_model_input as upstream_input
from upstream_timm import test_models as upstream

from hf_visual_perceiver import ARCHITECTURES


every_model = pytest.mark.parametrize("name", ARCHITECTURES)
# For tests that build or run a model once per block.
# timm's tests of intermediates expect at least three blocks.
deep_models = pytest.mark.parametrize(
    "name", [name for name, fields in ARCHITECTURES.items() if fields.get("num_hidden_layers", 12) >= 3]
)
small_models = pytest.mark.parametrize("name", list(ARCHITECTURES)[:3])


@pytest.fixture
def creates_with(monkeypatch):
    """Pass other arguments to upstream's `create_model` where a test does not allow it."""
    create_model = upstream.create_model

    def apply(**ours):
        monkeypatch.setattr(upstream, "create_model", lambda *args, **kwargs: create_model(*args, **{**kwargs, **ours}))

    return apply


@pytest.fixture
def latent_tokens(monkeypatch):
    """Adapt upstream's checks of feature maps to (B, K, D) tokens, which have no spatial axes.

    The batch axis replaces them, as it satisfies every bound on a map's size.
    """
    create_model = upstream.create_model

    def create(*args, **kwargs):
        model = create_model(*args, **kwargs)
        if not kwargs.get("features_only"):
            forward_intermediates = model.forward_intermediates
            model.forward_intermediates = lambda x, output_fmt: forward_intermediates(x, output_fmt="NLC")
        return model

    monkeypatch.setattr(upstream, "create_model", create)
    monkeypatch.setattr(upstream, "get_channel_dim", lambda output_fmt: get_channel_dim("NLC"))
    monkeypatch.setattr(upstream, "get_spatial_dim", lambda output_fmt: (0, 0))


@every_model
def test_forward(name):
    upstream.test_model_forward(name, batch_size=1)


@every_model
def test_backward(name):
    upstream.test_model_backward(name, batch_size=2)


@every_model
def test_default_cfgs_non_std(name):
    upstream.test_model_default_cfgs_non_std(name, batch_size=1, cfg_device="meta")


@every_model
def test_forward_fx(name):
    upstream.test_model_forward_fx(name, batch_size=1)


@every_model
def test_backward_fx(name):
    upstream.test_model_backward_fx(name, batch_size=2)


@deep_models
@pytest.mark.usefixtures("latent_tokens")
def test_forward_intermediates(name):
    upstream.test_model_forward_intermediates(name, batch_size=1)


@deep_models
@pytest.mark.usefixtures("latent_tokens")
def test_forward_intermediates_features(name):
    upstream.test_model_forward_intermediates_features(name, batch_size=1)


@small_models
def test_grad_checkpointing_backward(name, creates_with):
    # Of the whole model: the feature getter, here as for timm's own ViTs, does not pass checkpointing on.
    creates_with(img_size=64, features_only=False)
    upstream.test_features_only_grad_checkpointing_backward(name)


@small_models
def test_prune_intermediate_layers_contract(name):
    upstream.test_prune_intermediate_layers_contract(name)


@small_models
def test_prune_intermediate_layers_params_used(name):
    upstream.test_prune_intermediate_layers_params_used(name)


@small_models
def test_forward_after_prune_intermediate_layers(name, creates_with):
    creates_with(img_size=128)
    upstream.test_forward_after_prune_intermediate_layers(name)


@small_models
def test_init_weights_after_to_empty(name):
    upstream.test_model_init_weights_after_to_empty(name, {"img_size": 64})


@small_models
def test_headless_checkpoint_reload(name):
    upstream.test_headless_checkpoint_reload(name, {})


@small_models
def test_non_square_checkpoint_reload(name):
    upstream.test_relpos_non_square_checkpoint_reload(name, {})


@small_models
def test_non_square_set_input_size(name):
    upstream.test_relpos_non_square_set_input_size(name, {})


@small_models
def test_set_input_size(name):
    size = ARCHITECTURES[name].get("image_size", 32)
    upstream.test_relpos_family_set_input_size(name, {}, img_size=size, new_size=size + 32)


@small_models
def test_default_resize_hub_roundtrip(name, tmp_path):
    upstream_input.test_default_resize_hub_roundtrip(tmp_path, name, {}, img_size=64, new_size=96)


@small_models
@pytest.mark.parametrize("pool", [None, ""])
def test_export_tracks_reset_classifier(name, pool, tmp_path):
    upstream_input.test_export_tracks_reset_classifier_structure(tmp_path, name, {}, pool, reload_naflex=None)
