"""The timm model: its methods, and adapting a checkpoint. timm's own suite runs in tests/upstream."""

import pytest
import timm
import torch
from support import aligned

from hf_visual_perceiver import ARCHITECTURES, VisualPerceiverConfig
from hf_visual_perceiver.training.folder import save_folder


NANO = "visual_perceiver_nano_patch4_32"


@pytest.fixture
def nano():
    return timm.create_model(NANO).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, trained):
    return f"local-dir:{save_folder(trained, tmp_path_factory.mktemp('checkpoint') / 'model')}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_registered_names_are_the_configs(name):
    model = timm.create_model(name, device="meta")
    expected = VisualPerceiverConfig.from_architecture(name, num_labels=model.num_classes)
    assert model.config.to_dict() == expected.to_dict()
    assert expected.architecture == name
    assert model.num_classes == (10 if name.endswith("_32") else 1000)
    outputs = model(torch.zeros(2, 3, *model.config.image_height_width, device="meta"))
    assert outputs.shape == (2, model.num_classes)


@pytest.mark.parametrize(
    ("fields", "architecture"),
    [
        ({"image_size": 224, "patch_size": 16, "num_queries": 100}, "visual_perceiver_tiny_patch16_224"),
        ({"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4}, NANO),
        ({"num_queries": 7}, "visual_perceiver_tiny_patch4_32"),
    ],
)
def test_other_configs_have_the_nearest_name(fields, architecture):
    config = VisualPerceiverConfig(**fields, num_labels=3)
    assert config.architecture == architecture
    assert VisualPerceiverConfig.from_timm(**config.timm_model_args, num_classes=3).to_dict() == config.to_dict()


def test_verbs(nano):
    x = torch.randn(3, 3, 32, 32)
    for arguments, K in (({}, 64), ({"num_active_queries": 9}, 9), ({"dqs_threshold": 0.99}, 64)):
        features = nano.forward_features(x, **arguments)
        assert features.shape == (3, K, 96)
        torch.testing.assert_close(nano.forward_head(features), nano(x, **arguments), rtol=0, atol=1e-5)
        assert nano.forward_head(features, pre_logits=True).shape == (3, 96)
    nano.reset_classifier(7)
    assert nano(x).shape == (3, 7)
    nano.reset_classifier(0)
    assert nano(x).shape == (3, 96)
    nano.reset_classifier(0, "")
    assert nano(x, num_active_queries=5).shape == (3, 5, 96)


def test_intermediates(nano):
    x = torch.randn(2, 3, 32, 32)
    final, tokens = nano.forward_intermediates(x, indices=[0, 5], num_active_queries=6)
    assert [t.shape for t in tokens] == [(2, 6, 96)] * 2
    assert torch.equal(tokens[1], final)
    assert torch.equal(final, nano.forward_features(x, num_active_queries=6))
    only = nano.forward_intermediates(x, indices=1, intermediates_only=True, dqs_threshold=0.99)
    assert only[0].shape == (2, 64, 96)
    with pytest.raises(ValueError, match="'NLC'"):
        nano.forward_intermediates(x, output_fmt="NCHW")


@pytest.mark.parametrize("point", [{}, {"num_active_queries": 6}, {"dqs_threshold": 0.6}])
@torch.no_grad()
def test_intermediates_keep_timms_contract(folder, point):
    model, x = timm.create_model(folder, pretrained=True).eval(), torch.randn(3, 3, 32, 32)
    final, every = model.forward_intermediates(x, **point)
    assert len(every) == 6
    torch.testing.assert_close(final, model.forward_features(x, **point), rtol=0, atol=0)
    removed = every[0].eq(0).all(-1)  # (B, K)
    assert bool(removed.any()) == ("dqs_threshold" in point)
    for tokens in (*every, final):
        assert torch.equal(tokens.eq(0).all(-1), removed)
    # The last n, chosen ones, from the end; and without the blocks after the last.
    for indices, blocks in ((2, [4, 5]), ([0, 3], [0, 3]), ([-6, -2], [0, 4])):
        for early in (False, True):
            some = model.forward_intermediates(x, indices, intermediates_only=True, stop_early=early, **point)
            assert [torch.equal(a, every[i]) for a, i in zip(some, blocks, strict=True)] == [True] * len(blocks)
    # What the decoder reads, where a query is.
    normed = model.forward_intermediates(x, [1], norm=True, intermediates_only=True, **point)[0]
    expected = torch.where(removed[..., None], 0.0, model.decoder.norm_inputs(every[1]))
    torch.testing.assert_close(normed, expected, rtol=0, atol=1e-6)
    named = model.forward_intermediates(x, [1], output_dict=True, **point)
    assert set(named) == {"image_features", "image_intermediates"}
    assert torch.equal(named["image_features"], final)
    alone = model.forward_intermediates(x, [1], output_dict=True, intermediates_only=True, **point)
    assert set(alone) == {"image_intermediates"}


@torch.no_grad()
def test_features_only_takes_the_budget_when_it_is_made(folder):
    model, x = timm.create_model(folder, pretrained=True).eval(), torch.randn(2, 3, 32, 32)
    for point in ({}, {"num_active_queries": 6}, {"dqs_threshold": 0.6}):
        getter = timm.create_model(folder, pretrained=True, features_only=True, out_indices=(0, 2), **point).eval()
        assert getter.feature_info.channels() == [96, 96]
        expected = model.forward_intermediates(x, [0, 2], intermediates_only=True, **point)
        for a, b in zip(getter(x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_weight_decay_spares_what_has_no_scale(nano):
    names = dict(nano.named_parameters())
    assert nano.no_weight_decay() <= set(names)


def test_a_checkpoint_adapts(folder, trained):
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(aligned(timm.create_model(folder, pretrained=True).eval())(x), trained(x).logits)
    weight = trained.state_dict()["visual_perceiver.embeddings.patch_embeddings.projection.weight"]
    for channels, adapted in ((1, weight.sum(1, keepdim=True)), (4, weight[:, [0, 1, 2, 0]] * 3 / 4)):
        model = timm.create_model(folder, pretrained=True, num_classes=5, in_chans=channels, img_size=(48, 40)).eval()
        assert model(torch.randn(2, channels, 48, 40), num_active_queries=3).shape == (2, 5)
        torch.testing.assert_close(model.embeddings.patch_embeddings.projection.weight, adapted)


def test_fewer_queries_are_the_first_ones(folder, trained):
    x = torch.randn(2, 3, 32, 32)
    model = timm.create_model(folder, pretrained=True, num_queries=10).eval()
    torch.testing.assert_close(model(x), trained(x, num_active_queries=10).logits, rtol=0, atol=1e-5)


def test_the_data_config_is_the_processors(folder):
    from transformers import AutoImageProcessor

    model = timm.create_model(folder, pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    processor = AutoImageProcessor.from_pretrained(folder.removeprefix("local-dir:"))
    assert list(data["mean"]) == list(processor.image_mean)
    assert list(data["std"]) == list(processor.image_std)
    assert tuple(data["input_size"][1:]) == (processor.size["height"], processor.size["width"])


def test_processor_and_transform_agree(folder, cifar10):
    from transformers import AutoImageProcessor

    from hf_visual_perceiver.data.images import load_images

    data = load_images(cifar10, "test")
    model = timm.create_model(folder, pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    processor = AutoImageProcessor.from_pretrained(folder.removeprefix("local-dir:"))
    for size in ((32, 32), (80, 50)):
        image = data.image(0).resize(size)
        ours = processor(images=image, return_tensors="pt")["pixel_values"][0]
        # Resampling differs by rounding between PIL and torchvision; at the model's size there is none.
        tolerance = 1e-6 if size == (32, 32) else 0.05
        torch.testing.assert_close(ours, transform(image), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"global_pool": "avg"}, ValueError, "'token' or '', got 'avg'"),
        ({"img_size": 30}, ValueError, "multiple of `patch_size`"),
        ({"not_an_argument": 1}, TypeError, "not_an_argument"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        timm.create_model(NANO, **arguments)


def test_bad_budgets(nano):
    with pytest.raises(ValueError, match=r"integer in \[1, 64\], got 0"):
        nano(torch.zeros(1, 3, 32, 32), num_active_queries=0)
    with pytest.raises(ValueError, match=r"images of size 32x32, got 16x16; `set_input_size`, or `img_size=...`"):
        nano(torch.zeros(1, 3, 16, 16))
    nano.prune_intermediate_layers(2)
    with pytest.raises(ValueError, match="decoder is pruned"):
        nano.reset_classifier(3, "token")
