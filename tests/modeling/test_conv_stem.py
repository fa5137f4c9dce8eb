"""Convolutional stems: transformers and timm, MACs, folding for inference, and errors."""

import subprocess
import sys

import pytest
import timm
import torch
from support import PATIENCE, REPOSITORY, small_config, with_statistics
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification

from hf_visual_perceiver.modeling import VisualPerceiverConfig, VisualPerceiverForImageClassification, count_macs
from hf_visual_perceiver.modeling.conv_stem import ConvStem, stem_macs
from hf_visual_perceiver.modeling.engines import fold_batch_norms
from hf_visual_perceiver.training.folder import save_folder


STEM = {"stem": "conv", "stem_widths": [[6], [8, 8], [10]], "stem_residual": True}
FORMS = {
    "pool": ([[6], [8, 8], [10]], "pool", True),
    "stride": ([[], [8], [10]], "stride", False),
    "strides and depth": ([[6], [8, 8], [10, 10]], "stride", True),
}


@pytest.fixture
def stemmed() -> VisualPerceiverForImageClassification:
    return with_statistics(VisualPerceiverForImageClassification(small_config(**STEM)))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@torch.no_grad()
def test_macs_of_a_stem_are_those_that_torch_counts(form):
    widths, downsample, residual = form
    stem = ConvStem(3, widths, downsample, residual).eval()
    with FlopCounterMode(display=False) as counter:
        y = stem(torch.zeros(1, 3, 16, 24))
    assert y.shape == (1, 10, 4, 6)
    assert counter.get_total_flops() / 2 == stem_macs(3, widths, 16, 24)


@torch.no_grad()
def test_macs_of_a_network_with_a_stem(stemmed, images):
    for K in (1, 5, 12):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            stemmed(images[:1], num_active_queries=K)
        assert counter.get_total_flops() / 2 == pytest.approx(count_macs(stemmed.config, K), rel=5e-3)


@torch.no_grad()
def test_a_shortcut_goes_around_what_keeps_its_shape():
    blocks = [block for stage in ConvStem(3, [[6], [8, 8]], residual=True).stages for block in stage]
    assert [block.residual for block in blocks] == [False, False, True]
    block, x = blocks[2].eval(), torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(block(x), x + block.act(block.norm(block.conv(x))))


@torch.no_grad()
def test_folded_batch_norms_change_nothing(stemmed, images):
    expected = stemmed(images).logits
    fold_batch_norms(stemmed)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in stemmed.modules())
    torch.testing.assert_close(stemmed(images).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("knobs", [{}, {"num_active_queries": 5}, {"dqs_threshold": 0.9}], ids=str)
def test_the_optimised_form_answers_alike(stemmed, images, knobs):
    expected = stemmed(images, **knobs)
    output = stemmed.optimize_for_inference(backend="torch")(images, **knobs)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(output.active_queries, expected.active_queries)


def test_one_folder_serves_transformers_and_timm(stemmed, images, tmp_path):
    folder = save_folder(stemmed, tmp_path / "model")
    loaded = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = stemmed(images).logits
        torch.testing.assert_close(loaded(images).logits, expected, rtol=1e-6, atol=1e-6)
        of_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        torch.testing.assert_close(of_timm(images), expected, rtol=1e-6, atol=1e-6)
        grey = timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=1).eval()
        torch.testing.assert_close(grey(images[:, :1]), of_timm(images[:, :1].expand(-1, 3, -1, -1)))
        assert grey.embeddings.patch_embeddings.stem.stages[0][0].conv.weight.shape[1] == 1


def test_the_folder_loads_by_its_own_code(stemmed, images, tmp_path):
    folder = save_folder(stemmed, tmp_path / "model")
    torch.save(images, tmp_path / "in.pt")
    code = (
        "import sys, torch; sys.modules['hf_visual_perceiver'] = None\n"
        "from transformers import AutoModelForImageClassification as A\n"
        f"m = A.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()\n"
        f"with torch.no_grad(): torch.save(m(torch.load({str(tmp_path / 'in.pt')!r})).logits, {str(tmp_path / 'out.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=PATIENCE)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "out.pt"), stemmed(images).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["nano", "micro", "tiny"])
def test_named_networks(name):
    model = timm.create_model(f"visual_perceiver_{name}_conv_32", num_classes=7, in_chans=1, img_size=40).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 1, 40, 40), num_active_queries=4).shape == (2, 7)
    config = VisualPerceiverConfig.from_architecture(f"visual_perceiver_{name}_conv_32")
    assert config.architecture == f"visual_perceiver_{name}_conv_32"


def test_every_parameter_learns_with_and_without_checkpointing(stemmed, images):
    stemmed.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            stemmed.gradient_checkpointing_enable()
        stemmed.zero_grad()
        stemmed(images, labels=torch.zeros(8, dtype=torch.long)).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in stemmed.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stem": "dense"}, "`stem` to be 'patch' or 'conv'"),
        ({"stem": "conv"}, "widths"),
        ({"stem": "conv", "stem_widths": [[], []]}, "widths"),
        ({"stem": "conv", "stem_widths": [[6], [0], [8]]}, "widths"),
        ({"stem": "conv", "stem_widths": [[6], [8]]}, "`patch_size` to be 2"),
        ({"stem": "conv", "stem_widths": [[6], [], [8]], "stem_downsample": "stride"}, "convolution in every stage"),
        ({"stem": "conv", "stem_widths": [[6], [8], [8]], "stem_downsample": "mean"}, "pool or stride"),
        ({"stem_widths": [[6], [8], [8]]}, "`stem_widths` to be None"),
        ({**STEM, "image_size": 18}, "`image_size` to be a positive multiple"),
    ],
    ids=str,
)
def test_what_does_not_fit(fields, message):
    with pytest.raises(Exception, match=message):  # strict dataclasses wrap the ValueError
        small_config(**fields)


def test_a_plain_classifier_of_timm_has_the_stem():
    model = timm.create_model("conv_stem_classifier_32", widths=[[6], [8]], num_classes=4).eval()
    with torch.no_grad():
        x = torch.randn(2, 3, 32, 32)
        expected = model.get_classifier()(model.stem(x).mean((2, 3)))
        torch.testing.assert_close(model(x), expected)
    model.reset_classifier(9)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 9)


@pytest.mark.parametrize(("name", "parameters"), [("cifar_resnet20", 272474), ("cifar_resnet56", 855770)])
def test_cifar_resnets_have_the_size_of_the_paper(name, parameters):
    # He et al. 2016, Table 6: 0.27 M and 0.85 M.
    assert sum(p.numel() for p in timm.create_model(name).parameters()) == parameters


def test_old_checkpoints_keep_their_logits(trained):
    """The expected logits were recorded before stems were added."""
    golden = torch.load(REPOSITORY / "tests/modeling/golden_nano.pt", weights_only=True)
    for knobs, logits in golden["answers"]:
        with torch.no_grad():
            torch.testing.assert_close(trained(golden["images"], **knobs).logits, logits, rtol=1e-4, atol=1e-4)
