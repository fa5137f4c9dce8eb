"""The other families: published sizes and costs, one file for both libraries, and saved work."""

import copy
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from support import run, with_biases, with_statistics
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PerceiverConfig, PerceiverForMaskedLM
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

from hf_visual_perceiver.modeling.configuration_dynamic_vision_transformer import DynamicVisionTransformerConfig
from hf_visual_perceiver.modeling.configuration_iterative_perceiver import IterativePerceiverConfig
from hf_visual_perceiver.modeling.configuration_lookupvit import LookupViTConfig
from hf_visual_perceiver.modeling.configuration_qna_vit import QnAViTConfig
from hf_visual_perceiver.modeling.elastic import Budget, Pass
from hf_visual_perceiver.modeling.modeling_dynamic_vision_transformer import (
    DynamicVisionTransformerForImageClassification,
    Enlarge,
    enlarge,
)
from hf_visual_perceiver.modeling.modeling_iterative_perceiver import (
    IterativePerceiverForImageClassification,
    fourier_features,
)
from hf_visual_perceiver.modeling.modeling_lookupvit import LookupViTForImageClassification
from hf_visual_perceiver.modeling.modeling_qna_vit import QnALayer, QnAViTForImageClassification
from hf_visual_perceiver.modeling.timm_dynamic_vision_transformer import DynamicVisionTransformer
from hf_visual_perceiver.modeling.timm_iterative_perceiver import IterativePerceiver
from hf_visual_perceiver.modeling.timm_lookupvit import LookupViT
from hf_visual_perceiver.modeling.timm_qna_vit import QnAViT
from hf_visual_perceiver.modeling.tokens_to_token import TokenPerformer, sinusoids
from hf_visual_perceiver.training.schedules import create_schedule, step_macs


FAMILIES = {
    "dvt": (DynamicVisionTransformerConfig, DynamicVisionTransformerForImageClassification, DynamicVisionTransformer),
    "lookupvit": (LookupViTConfig, LookupViTForImageClassification, LookupViT),
    "perceiver": (IterativePerceiverConfig, IterativePerceiverForImageClassification, IterativePerceiver),
    "qna": (QnAViTConfig, QnAViTForImageClassification, QnAViT),
}
SMALL = {  # networks that run in milliseconds, of images of 16 pixels
    "dvt": {
        "patches": [[8, 8, 0], [4, 4, 0]],
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "initializer_range": 0.3,
    },
    "lookupvit": {"hidden_size": 24, "num_hidden_layers": 2, "max_compressed_size": 4, "initializer_range": 0.2},
    "perceiver": {
        "num_frequency_bands": 3,
        "num_queries": 6,
        "hidden_size": 24,
        "num_blocks": 2,
        "num_cross_attends": 2,
        "initializer_range": 0.3,
    },
    "qna": {
        "hidden_sizes": [12, 24],
        "local_depths": [0, 1],
        "qna_depths": [1, 1],
        "qna_heads": [2, 4],
        "local_heads": [2, 2],
        "window_sizes": [4, 4],
        "initializer_range": 0.5,
    },
}
VARIANTS = {
    **SMALL,
    "perceiver io": {**SMALL["perceiver"], "decoder_type": "query", "num_cross_attends": 1},
    "perceiver, not shared": {**SMALL["perceiver"], "share_weights": False},
    "perceiver, learned positions": {**SMALL["perceiver"], "inputs": "learned", "stem_channels": 8},
    "perceiver, convolution": {**SMALL["perceiver"], "inputs": "conv", "stem_channels": 8},
    "dvt, t2t": {
        **SMALL["dvt"],
        "stem": "t2t",
        "patches": [[4, 2, 1], [3, 1, 1]],
        "stem_hidden_size": 8,
        "num_random_features": 4,
        "positions": "sinusoid",
        "qkv_bias": False,
    },
    "lookupvit, softmax": {**SMALL["lookupvit"], "infusion": "softmax", "classify_with": "compressed"},
}
# Name, other arguments, parameters, and multiply-accumulates of some budgets: those that the papers or their code give, and of
# what they do not give, LookupViT and the networks for 32 pixels, the counts. All to the decimals that are written.
PUBLISHED = [
    ("dvt_deit_small_224", {}, "70,442,232", {"exit=1": "1142.909952 M", "exit=2": "3.643 G", "full": "8800.629120 M"}),
    ("dvt_t2t_vit_12_224", {}, "22,360,140", {"exit=1": "467.702400 M", "exit=2": "1.446 G", "full": "3455.014176 M"}),
    ("dvt_t2t_vit_14_224", {}, "67,735,916", {"exit=1": "1200.582272 M", "exit=2": "3.818 G", "full": "9264.151296 M"}),
    ("dvt_nano_32", {}, "1,329,118", {"exit=1": "7.177856 M", "exit=2": "25.2 M", "full": "59.654784 M"}),
    ("dvt_nano_2exits_32", {}, "1.35 M", {"exit=1": "11.1 M", "full": "60.1 M"}),
    # The table that these networks come from has 167.7 and 393.0 after exits 2 and 3, but its formula for an exit gives these.
    ("dvt_tiny_32", {}, "9.09 M", {"exit=1": "48.3 M", "exit=2": "167.646 M", "full": "392.946 M"}),
    ("perceiver_224", {}, "44,912,254", {"full": "353.14 G"}),
    ("perceiver_nano_32", {}, "0.30 M", {"K=1, i=1": "3.1 M", "i=1": "13.4 M", "K=16": "31.9 M", "full": "53.6 M"}),
    ("perceiver_nano_32", {"share_weights": False}, "0.99 M", {"full": "53.6 M"}),
    ("perceiver_tiny_32", {}, "0.66 M", {"full": "401.4 M"}),
    ("perceiver_tiny_32", {"share_weights": False}, "4.39 M", {"full": "401.4 M"}),
    ("perceiver_io_224", {}, "48,440,627", {"full": "203.06 G"}),
    (
        "perceiver_io_nano_32",
        {},
        "764,053",
        {"K=1, i=1": "10.6 M", "K=16, i=1": "23.2 M", "K=16": "33.1 M", "full": "57,904,384"},
    ),
    ("perceiver_io_tiny_32", {}, "3.03 M", {"full": "402.2 M"}),
    ("lookupvit_small_patch16_224", {}, "34.9 M", {}),
    (
        "lookupvit_base_patch16_224",
        {},
        "137,024,720",
        {"grid=3": "6.67 G", "grid=5": "8.47 G", "grid=7": "11.18 G", "grid=10": "17.01 G"},
    ),
    (
        "lookupvit_base_patch16_224",
        {"img_size": 384},
        None,
        {"grid=3": "17.75 G", "grid=5": "19.71 G", "grid=7": "22.68 G", "grid=10": "29.04 G"},
    ),
    (
        "lookupvit_nano_patch4_32",
        {},
        "902,372",
        {
            "grid=2": "15.242112 M",
            "grid=3": "19.2 M",
            "grid=4": "24.9 M",
            "grid=5": "32.3 M",
            "grid=6": "41.5 M",
            "grid=7": "52.8 M",
            "full": "66.160512 M",
        },
    ),
    (
        "lookupvit_tiny_patch4_32",
        {},
        "6.38 M",
        {
            "grid=2": "106.8 M",
            "grid=3": "133.6 M",
            "grid=4": "171.3 M",
            "grid=5": "220.4 M",
            "grid=6": "281.1 M",
            "grid=7": "353.9 M",
            "full": "439.4 M",
        },
    ),
    ("qna_vit_tiny_224", {}, "15,715,560", {"full": "2.423 G"}),
    ("qna_vit_tiny_224", {"num_queries": 1}, None, {"full": "2.392 G"}),
    ("qna_vit_tiny_7x7_224", {}, "15,753,960", {"full": "2.511 G"}),
    ("qna_vit_small_224", {}, "24,971,560", {"full": "4.345 G"}),
    ("qna_vit_base_224", {}, "55,670,008", {"full": "9.506 G"}),
    ("qna_vit_nano_32", {}, "996,058", {"full": "57.077504 M"}),
    ("qna_vit_nano_32", {"num_queries": 1}, None, {"full": "56.0 M"}),
    ("qna_vit_tiny_32", {}, "6.77 M", {"full": "381.8 M"}),
]


T2T_19 = {"hidden_size": 448, "intermediate_size": 1344, "num_hidden_layers": 19, "num_attention_heads": 7}
T2T_24 = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 8}
IO = {"decoder_type": "query", "num_cross_attends": 1}
# Of transformers' Perceiver, whose images have 224 pixels a side whatever its config says; but with learned positions 16.
THEIRS = {
    "num_latents": 6,
    "d_latents": 16,
    "num_blocks": 2,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 1,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 5,
    "initializer_range": 0.2,
    "image_size": 16,
}


def small(name: str, **fields):
    family = name.split(",")[0].split()[0]
    config_class, classifier, _ = FAMILIES[family]
    torch.manual_seed(0)
    return classifier(config_class(image_size=16, num_labels=5, **{**VARIANTS[name], **fields})).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def as_written(number: int, expected: str) -> str:
    """The number in the unit and with the decimals of the expected one, such as "6.67 G"."""
    digits, _, unit = expected.partition(" ")
    if not unit:
        return f"{number:,}"
    decimals = len(digits.partition(".")[2])
    return f"{number / {'M': 1e6, 'G': 1e9}[unit]:.{decimals}f} {unit}"


@pytest.mark.parametrize(("name", "arguments", "parameters", "macs"), PUBLISHED)
def test_published_sizes_and_costs(name, arguments, parameters, macs):
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    if parameters is not None:
        assert as_written(sum(p.numel() for p in model.parameters()), parameters) == parameters
    counted = {budget: model.config.count_macs(model.config.parse_budget(budget)) for budget in macs}
    assert {budget: as_written(counted[budget], macs[budget]) for budget in macs} == macs


def test_every_architecture_has_a_published_size():
    named = {name for config_class, *_ in FAMILIES.values() for name in config_class.named}
    assert named == {name for name, *_ in PUBLISHED}


@pytest.mark.parametrize(
    ("fields", "parameters", "gmacs"),
    [
        # With learned positions 62,255,848 less the projection of them, which adds nothing to what they can be.
        ({**IO, "inputs": "learned", "stem_channels": 256}, 62_255_848 - 256 * 257, None),
        ({**IO, "inputs": "conv"}, 48_646_522, None),
        ({"num_cross_attends": 1}, 42_135_859, 201.98),
        ({"num_cross_attends": 2}, 44_912_254, 223.58),
        ({"num_cross_attends": 4}, 44_912_254, 266.76),
        ({"share_weights": False}, 326_241_856, 353.14),
    ],
)
def test_perceivers_of_the_paper(fields, parameters, gmacs):
    config = IterativePerceiverConfig.from_architecture("perceiver_224", num_labels=1000, **fields)
    with torch.device("meta"):
        model = IterativePerceiverForImageClassification(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    if gmacs is not None:
        assert config.count_macs(Budget()) / 1e9 == pytest.approx(gmacs, abs=0.01)


@pytest.mark.parametrize(
    ("name", "fields", "parameters", "gmacs"),
    [
        ("dvt_t2t_vit_12_224", {}, 22_461_516, [0.468, 1.446, 3.455]),
        ("dvt_t2t_vit_12_224", {"feature_reuse": False, "relation_reuse": False}, 20_890_956, [0.468, 1.358, 3.121]),
        ("dvt_t2t_vit_12_224", {"relation_reuse": False}, 22_433_484, [0.468, 1.412, 3.279]),
        ("dvt_t2t_vit_12_224", {"feature_reuse": False}, 20_918_988, [0.468, 1.393, 3.297]),
        ("dvt_t2t_vit_14_224", {}, 67_881_836, [1.201, 3.818, 9.264]),
        # T2T-ViT itself is a single exit.
        ("dvt_t2t_vit_12_224", {"patches": [[7, 4, 2]]}, 6_941_902, [1.763]),
        ("dvt_t2t_vit_14_224", {"patches": [[7, 4, 2]]}, 21_545_550, [4.783]),
        ("dvt_t2t_vit_14_224", {"patches": [[7, 4, 2]], **T2T_19}, 39_177_422, [8.480]),
        ("dvt_t2t_vit_14_224", {"patches": [[7, 4, 2]], **T2T_24}, 64_105_934, [13.662]),
    ],
)
def test_t2t_vits_of_the_papers(name, fields, parameters, gmacs):
    """Their authors count what is fixed too: positions, and the directions of random features.

    MACs are those of matrix products; the papers' include norms and are about 1 % higher.
    """
    config = DynamicVisionTransformerConfig.from_architecture(name, num_labels=1000, **fields)
    with torch.device("meta"):
        model = DynamicVisionTransformerForImageClassification(config)
    buffers = [value for name, value in model.named_buffers() if not name.endswith("enlarge.matrix")]
    assert sum(t.numel() for t in [*model.parameters(), *buffers]) == parameters
    assert [round(config.count_macs(budget) / 1e9, 3) for budget in config.budgets()] == gmacs


def test_lookupvit_at_grids_of_the_article():
    config = LookupViTConfig.from_architecture("lookupvit_base_patch16_224", num_labels=1000, max_compressed_size=10)
    blocks = config.num_hidden_layers
    rest = config.num_patches * 3 * 16**2 * 768 + 2 * 768 * 1000
    assert config.macs_of(25) - rest == blocks * 695_855_616
    large = LookupViTConfig.from_architecture("lookupvit_base_patch16_224", num_labels=1000, image_size=384)
    assert large.macs_of(25) - 576 * 3 * 16**2 * 768 - 2 * 768 * 1000 == blocks * 1_614_276_096


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_macs_are_those_that_torch_counts(name, images):
    model = small(name)
    macs = []
    for budget in model.config.budgets():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(images[:1], **model.config.resolve(**budget.kwargs))
        macs.append(model.config.count_macs(budget))
        # LookupViT runs both classifiers, of which one may be left out of the count.
        assert counter.get_total_flops() / 2 == pytest.approx(macs[-1], rel=5e-3)
    assert macs == sorted(macs)


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_attention_written_out_equals_the_fused_kernels(name, images, monkeypatch):
    model, fused = small(name), []
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *x: fused.append(1) or attention(*x)
    )
    expected = model(images).logits
    assert fused
    model.set_attn_implementation("eager")
    fused.clear()
    torch.testing.assert_close(model(images).logits, expected, atol=1e-5, rtol=1e-5)
    assert not fused


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_is_its_images_one_by_one(name, images):
    model = small(name)
    for budget in model.config.budgets():
        knobs = model.config.resolve(**budget.kwargs)
        output = model(images, **knobs)
        alone = torch.cat([model(image[None], **knobs).logits for image in images])
        torch.testing.assert_close(output.logits, alone, rtol=1e-4, atol=1e-5)
        assert output.used.shape == (7,)
        assert model.config.count_macs(budget, output).tolist() == [model.config.count_macs(budget)] * 7


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_one_file_for_both_libraries(name, images, tmp_path):
    model = small(name)
    model.save_pretrained(tmp_path)
    ours = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    theirs = type(model).from_pretrained(tmp_path)
    for budget in model.config.budgets():
        knobs = model.config.resolve(**budget.kwargs)
        expected = model(images, **knobs).logits
        torch.testing.assert_close(ours(images, **knobs), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs(images, **knobs).logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.forward_head(ours.forward_features(images)), ours(images), rtol=1e-5, atol=1e-5)
    ours.reset_classifier(3)
    assert ours(images).shape == (7, 3)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_learns_and_checkpointing_changes_nothing(name, images):
    model = small(name).train()
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable()
    labels = torch.arange(7) % 5
    for network in (model, again):
        network(images, labels=labels).loss.backward()
    for (parameter, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert p.grad is not None, parameter
        # The key's bias adds the same to all scores of a query, which softmax takes away. And what the last layer of an exit
        # reuses is for tokens other than the class token, which nobody reads any more.
        idle = "key.bias" in parameter or "exits.1.layers.1.reuse" in parameter
        assert p.grad.any() or idle, parameter
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_passes_of_a_training_step(name, images):
    model = small(name)
    budgets = model.config.budgets()
    passes = [Pass(), Pass(budgets[0]), Pass(budgets[0], slice(0, 2))]
    for answered, p in zip(model.forward_budgets(images, passes), passes, strict=True):
        expected = model(images[p.images], **model.config.resolve(**p.budget.kwargs)).logits
        torch.testing.assert_close(answered, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*SMALL, "dvt, t2t"])
def test_the_code_that_travels_with_weights(name, images, tmp_path):
    """The remote code is complete and runs, also with older transformers, which copies only direct imports."""
    model, folder = small(name), tmp_path / "model"
    for cls, auto in ((type(model.config), None), (type(model), "AutoModelForImageClassification")):
        cls.register_for_auto_class(*([auto] if auto else []))
    model.save_pretrained(folder)
    for file in [*folder.glob("configuration_*.py"), *folder.glob("modeling_*.py")]:
        needed = {Path(other).name for other in get_relative_import_files(file)}
        assert {f"{module}.py" for module in get_relative_imports(file)} >= needed - {file.name}, file.name
    code = (
        "import sys, torch; from transformers import AutoModelForImageClassification as A;"
        "sys.modules['hf_visual_perceiver'] = None;"
        "m = A.from_pretrained(sys.argv[1], trust_remote_code=True).eval();"
        "x = torch.load(sys.argv[2]); torch.save(m(x).logits, sys.argv[2])"
    )
    file = tmp_path / "images.pt"
    torch.save(images, file)
    ended = run(sys.executable, "-c", code, folder, file, env={"HF_HOME": str(tmp_path)})
    assert ended.returncode == 0, ended.stderr
    torch.testing.assert_close(torch.load(file), model(images).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*SMALL, "dvt, t2t"])
def test_bad_input(name, images):
    model = small(name)
    for pixels, message in (
        (images[:, :1], "images of 3 channels, got 1"),
        (images[..., :8], "images of size 16x16, got 16x8; "),
        (images[0], r"`pixel_values` of shape \(B, C, H, W\)"),
        (images[:0], "at least one image"),
        (images.int(), "floating-point"),
    ):
        with pytest.raises(ValueError, match=message):
            model(pixels)
    with pytest.raises(ValueError, match="knobs"):
        model.config.resolve(layers=3)
    for knob in model.config.knobs.values():
        for value in (0, "x", True, 99) if knob != "exit_thresholds" else ("x", [0.1] * 7, float("nan")):
            with pytest.raises(ValueError, match=knob):
                model(images, **{knob: value})
            with pytest.raises(ValueError, match=knob):
                type(model.config)(**{**model.config.to_diff_dict(), knob: value})


@pytest.mark.parametrize("name", VARIANTS)
def test_advice_for_images_of_another_size(name, images, tmp_path):
    model, other = small(name), torch.randn(1, 3, 32, 32)
    model.save_pretrained(tmp_path)
    fits = name.startswith("qna") or name == "dvt, t2t" or (name.startswith("perceiver") and "learned" not in name)
    for network in (model, model.optimize_for_inference(backend="torch")):
        advice = "`image_size=...`" if fits else "the position embeddings are for this size alone.$"
        with pytest.raises(ValueError, match=f"images of size 16x16, got 32x32; .*{advice}"):
            network(other)
    if fits:
        assert type(model).from_pretrained(tmp_path, image_size=32)(other).logits.shape == (1, 5)
    else:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            type(model).from_pretrained(tmp_path, image_size=32)


@pytest.mark.parametrize("name", [*SMALL, "dvt, t2t"])
def test_arguments_of_timm(name):
    config_class = FAMILIES[name.split(",")[0]][0]
    config = config_class(image_size=16, num_labels=5, **VARIANTS[name])
    # Earlier versions saved class attributes among the arguments.
    again = config_class.from_timm(**config.timm_model_args, num_classes=5, title="Of an earlier version")
    assert again.to_dict() == config.to_dict()
    assert "title" not in config.timm_model_args
    with pytest.raises(TypeError, match=r"img_size.*got depht"):
        config_class.from_timm(depht=3)
    with pytest.raises(ValueError, match=r"square images, got `img_size` \[16, 32\]"):
        config_class.from_timm(img_size=(16, 32))


@pytest.mark.parametrize("name", ["dvt_nano_32", "lookupvit_nano_patch4_32", "perceiver_nano_32", "qna_vit_nano_32"])
def test_timm_says_that_there_are_no_feature_maps(name):
    with pytest.raises(RuntimeError, match=r"^features_only not implemented for .+ models\.$"):
        timm.create_model(name, features_only=True)
    assert timm.create_model(name, features_only=False, num_classes=0).num_classes == 0


class TestDynamicVisionTransformer:
    @torch.no_grad()
    @pytest.mark.parametrize(
        ("name", "patches"),
        [("dvt", [[8, 8, 0], [4, 4, 0], [2, 2, 0]]), ("dvt, t2t", [[4, 2, 1], [4, 2, 1], [3, 1, 1]])],
    )
    def test_images_that_stopped_enter_no_later_exit(self, name, patches, images):
        model = small(name, patches=patches)
        rows = []
        for stage in model.dynamic_vision_transformer.exits:
            stage.register_forward_hook(lambda _module, x, _output: rows.append(len(x[0])))
        sure = model(images, max_exit=1).logits.softmax(-1).amax(-1)
        thresholds = [sure.sort().values[2:4].mean().item(), 0.9]  # between two images, where rounding decides nothing
        output = model(images, exit_thresholds=thresholds)
        reached = [(output.exits > i).sum().item() for i in range(3)]
        assert rows[1:] == [n for n in reached if n]
        assert 0 < reached[1] < 7
        alone = [model(image[None], exit_thresholds=thresholds) for image in images]
        torch.testing.assert_close(output.logits, torch.cat([o.logits for o in alone]), rtol=1e-4, atol=1e-5)
        assert output.exits.tolist() == [o.exits.item() for o in alone]
        macs = model.config.count_macs(Budget(exit_thresholds=thresholds), output)
        assert macs.tolist() == [model.config.count_macs(Budget(max_exit=int(e))) for e in output.exits]

    @torch.no_grad()
    def test_thresholds_of_0_and_above_1(self, images):
        model = small("dvt")
        torch.testing.assert_close(model(images, exit_thresholds=0.0).logits, model(images, max_exit=1).logits)
        torch.testing.assert_close(
            model(images, exit_thresholds=1.1).logits, model(images).logits, rtol=1e-4, atol=1e-5
        )

    @pytest.mark.parametrize("scalar", [np.float32, np.float64, torch.tensor, lambda x: torch.tensor([x])])
    def test_numbers_of_other_libraries(self, scalar, images, tmp_path):
        model = small("dvt", patches=[[8, 8, 0], [4, 4, 0], [2, 2, 0]])
        resolve, full = model.config.resolve, math.inf
        whole = np.int64(2) if isinstance(scalar, type) else scalar(2)
        assert resolve(max_exit=whole) == {"max_exit": 2, "exit_thresholds": [full, full]}
        two = [scalar(0.5), scalar(0.75)]
        for given, expected in ((scalar(0.5), [0.5, 0.5]), (two, [0.5, 0.75]), (scalar(full), [full, full])):
            assert resolve(exit_thresholds=given)["exit_thresholds"] == expected
            assert all(type(t) is float for t in resolve(exit_thresholds=given)["exit_thresholds"])
        for several in (torch.tensor([0.5, 0.75]), np.array([0.5, 0.75], np.float32)):
            assert resolve(exit_thresholds=several)["exit_thresholds"] == [0.5, 0.75]
        expected = model(images, max_exit=2, exit_thresholds=0.5)
        assert torch.equal(model(images, max_exit=whole, exit_thresholds=scalar(0.5)).logits, expected.logits)
        for thresholds in (scalar(0.5), two, np.array([0.5, 0.5], np.float32)):
            config = DynamicVisionTransformerConfig(max_exit=whole, exit_thresholds=thresholds)
            config.save_pretrained(tmp_path)
            again = DynamicVisionTransformerConfig.from_pretrained(tmp_path)
            assert again.default_budget == config.default_budget
            assert again.knobs_for() == config.knobs_for() == config.resolve(max_exit=2, exit_thresholds=thresholds)

    @pytest.mark.parametrize(
        "bad", [-0.5, [0.5], [0.5] * 3, "x", True, math.nan, [True, 0.5], torch.zeros(3), object()]
    )
    def test_bad_thresholds(self, bad):
        with pytest.raises(
            ValueError, match=r"`exit_thresholds` .*at least 0 or 2 of them, where infinity stops no image"
        ):
            DynamicVisionTransformerConfig().resolve(exit_thresholds=bad)
        for exit in (np.float32(2), torch.tensor(1.0), np.int64(4), torch.tensor([1, 2]), True):
            with pytest.raises(ValueError, match=r"`max_exit` to be an integer in \[1, 3\], got"):
                DynamicVisionTransformerConfig().resolve(max_exit=exit)

    @torch.no_grad()
    def test_features_in_timm_are_of_the_last_exit(self, images):
        config = small("dvt").config
        model = DynamicVisionTransformer(**config.timm_model_args, num_classes=5).eval()
        for knobs in ({}, {"max_exit": 2}, {"exit_thresholds": math.inf}):
            logits = model.forward_head(model.forward_features(images, **knobs))
            torch.testing.assert_close(logits, model(images, **knobs), rtol=1e-5, atol=1e-5)
        for knobs in ({"max_exit": 1}, {"exit_thresholds": 0.5}, {"max_exit": 1, "exit_thresholds": [0.9]}):
            stored = DynamicVisionTransformer(**{**config.timm_model_args, **knobs}, num_classes=5).eval()
            stored.load_state_dict(model.state_dict())
            for network, given in ((model, knobs), (stored, {})):
                with pytest.raises(
                    ValueError, match=r"`max_exit` 2 and infinite .*, got .*; `model\(x, max_exit=...\)` "
                ):
                    network.forward_features(images, **given)
            assert torch.equal(model(images, **knobs), stored(images))
            assert stored.forward_features(images, max_exit=2, exit_thresholds=math.inf).shape == (7, 17, 24)

    def test_all_exits_learn_for_the_price_of_the_last(self):
        config = DynamicVisionTransformerConfig.from_architecture("dvt_nano_32")
        schedule = create_schedule({"schedule": "nested"}, config.ladder(), seed=0, block_ends=config.nested_steps)
        assert [p.budget for p in schedule(5)] == [Budget(), Budget(max_exit=2), Budget(max_exit=1)]
        assert step_macs(config, schedule, 5) == config.count_macs(Budget())
        adaptive = [Budget(), Budget(exit_thresholds=0.5)]
        assert config.count_passes(adaptive, shared=True) == 2 * config.count_macs(Budget())

    def test_the_loss_is_the_sum_of_all_exits(self, images):
        model, labels = small("dvt"), torch.arange(7) % 5
        output = model(images, labels=labels)
        expected = sum(F.cross_entropy(logits, labels) for logits in output.exit_logits)
        torch.testing.assert_close(output.loss, expected)
        assert len(output.exit_logits) == 2

    @pytest.mark.parametrize(("old", "new"), [((2, 2), (4, 4)), ((4, 4), (6, 6)), ((7, 7), (10, 10)), ((3, 2), (4, 5))])
    def test_enlarging_by_a_product_equals_pooling(self, old, new):
        x = torch.randn(2, 1 + math.prod(old), 3)
        enlarging = Enlarge(old, new)
        for images, multiplies in ((x, False), (x.clone().requires_grad_(), True)):
            with FlopCounterMode(display=False) as counter:
                torch.testing.assert_close(enlarging(images), enlarge(x, old, new))
            assert (counter.get_total_flops() > 0) == multiplies
        graph = torch.export.export(enlarging, (x,))
        assert "pool" not in str(graph.graph)
        torch.testing.assert_close(graph.module()(x), enlarge(x, old, new))

    def test_exits_depend_on_what_they_reuse(self, images):
        model = small("dvt")
        before = model(images).logits
        with torch.no_grad():
            first = model.dynamic_vision_transformer.exits[0]
            first.layers[-1].mlp.fc2.weight.mul_(2)
        assert not torch.allclose(model(images).logits, before, atol=1e-4)
        plain = small("dvt", feature_reuse=False, relation_reuse=False)
        before = plain(images).logits
        with torch.no_grad():
            plain.dynamic_vision_transformer.exits[0].layers[-1].mlp.fc2.weight.mul_(2)
        torch.testing.assert_close(plain(images).logits, before)

    def test_inputs_of_a_config(self):
        for fields, message in (
            ({"stem": "conv"}, "`stem` to be 'patch' or 't2t', got 'conv'"),
            ({"positions": "rotary"}, "`positions` to be 'learned' or 'sinusoid', got 'rotary'"),
            ({"num_random_features": 0}, "`num_random_features` to be at least 1, got 0"),
            ({"stem_hidden_size": 0}, "`stem_hidden_size` to be at least 1, got 0"),
            ({"soft_splits": [[3, 2, 1]]}, r"`soft_splits` to be None with `stem` 'patch', got \[\[3, 2, 1\]\]"),
            ({"stem": "t2t", "soft_splits": []}, r"`soft_splits` to be at least one .*, got \[\]"),
            ({"stem": "t2t", "soft_splits": [[3, 2]]}, r"`soft_splits` to be \[kernel, .*of 4, got \[3, 2\]"),
            ({"stem": "t2t", "soft_splits": [[5, 2, 0]]}, r"`soft_splits` .* fit grids of 4, got \[5, 2, 0\]"),
            ({"patches": [[33, 2, 0]]}, r"`patches` .* fit images of 32, got \[33, 2, 0\]"),
            ({"patches": [[4, 4, 0], [8, 8, 0]]}, r"grids that grow, got grids of \[8, 4\]"),
        ):
            with pytest.raises(ValueError, match=message):
                DynamicVisionTransformerConfig(**fields)


class TestTokensToToken:
    def layer(self, **fields) -> TokenPerformer:
        return small("dvt, t2t", **fields).dynamic_vision_transformer.exits[0].projection.performers[1].double()

    def test_the_attention_is_a_mean_with_a_kernel_of_random_features(self):
        """Compare with the weights of all pairs, written out."""
        layer = self.layer()
        query, key, value = torch.randn(3, 2, 9, 8, dtype=torch.float64)
        w = layer.directions
        pairs = torch.einsum("md,bijd->bijm", w, query[:, :, None] + key[:, None]).exp().mean(-1)
        lengths = query.square().sum(-1)[:, :, None] + key.square().sum(-1)[:, None]
        weights = pairs * (-lengths / 2).exp()
        expected = weights / (weights.sum(-1, keepdim=True) + 1e-8) @ value
        torch.testing.assert_close(layer.attend(query, key, value), expected, rtol=1e-4, atol=1e-4)

    def test_directions_are_orthogonal_and_stay(self, images, tmp_path):
        model = small("dvt, t2t").train()
        w = model.dynamic_vision_transformer.exits[1].projection.performers[0].directions
        torch.testing.assert_close(w @ w.T, 4 * torch.eye(4))
        assert not w.requires_grad
        model.save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        saved = state["dynamic_vision_transformer.exits.1.projection.performers.0.directions"]
        assert torch.equal(saved, w)
        again = type(model).from_pretrained(tmp_path)
        torch.testing.assert_close(dict(again.named_buffers()), dict(model.named_buffers()), rtol=0, atol=0)
        # What a checkpoint lacks is drawn anew, and is not left as memory was.
        others = {name: value for name, value in state.items() if "directions" not in name}
        lacking = type(model).from_pretrained(None, config=model.config, state_dict=others)
        w = lacking.dynamic_vision_transformer.exits[1].projection.performers[0].directions
        torch.testing.assert_close(w @ w.T, 4 * torch.eye(4))

    def test_half_precision_has_room_for_the_exponentials(self):
        layer = self.layer(num_random_features=64, stem_hidden_size=64).float()
        w, value = layer.directions[None], torch.randn(1, 64, 64)
        assert layer.features(w).max() > 1e10
        expected = layer.attend(w, w, value)
        with torch.autocast("cpu", torch.float16):
            given = layer.attend(w.half(), w.half(), value.half())
        torch.testing.assert_close(given.float(), expected, rtol=0.05, atol=0.01)

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_loads_in_other_dtypes(self, dtype, images, tmp_path):
        model = small("dvt, t2t")
        model.save_pretrained(tmp_path)
        ours = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, dtype=dtype).eval()
        for other in (type(model).from_pretrained(tmp_path, dtype=dtype), ours):
            answers = other(images.to(dtype))
            logits = getattr(answers, "logits", answers)
            assert logits.dtype == dtype
            torch.testing.assert_close(logits.float(), model(images).logits, rtol=0.1, atol=0.3)

    def test_soft_splits_overlap_and_keep_the_order_of_the_grid(self, images):
        """A pixel reaches the tokens whose patches cover it, before attention mixes them."""
        stem = small("dvt, t2t", soft_splits=[[3, 2, 1]]).dynamic_vision_transformer.exits[0].projection
        for performer in stem.performers:
            performer.attend = lambda query, key, value: torch.zeros_like(value)
        images = images.clone().requires_grad_()
        stem(images)[0, :, 1].sum().backward()  # the second token of the first row: grid rows 0, 1; columns 1 to 3 of 8
        rows, columns = images.grad[0].abs().sum(0).nonzero().T.unique(dim=1)
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 4, 1, 8)

    def test_sinusoids(self):
        table = sinusoids(5, 6)
        assert table.shape == (1, 5, 6)
        for place in range(5):
            for i in range(3):
                angle = place / 10000 ** (2 * i / 6)
                assert table[0, place, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
                assert table[0, place, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


class TestLookupViT:
    @torch.no_grad()
    def test_a_grid_for_each_image(self, images):
        model = small("lookupvit")
        sides = torch.tensor([1, 2, 3, 4, 4, 2, 1])
        output = model(images, compressed_size=sides)
        alone = [model(images[i : i + 1], compressed_size=int(sides[i])).logits for i in range(7)]
        torch.testing.assert_close(output.logits, torch.cat(alone), rtol=1e-4, atol=1e-5)
        assert output.tokens.tolist() == (sides**2).tolist()
        macs = model.config.count_macs(None, output)
        assert macs.tolist() == [model.config.count_macs(Budget(compressed_size=int(s))) for s in sides]

    @torch.no_grad()
    def test_the_grid_of_patches_is_not_resized(self, images):
        base = small("lookupvit").lookupvit
        seen = []
        base.layers[0].register_forward_pre_hook(lambda _module, x: seen.append(x))
        base(images, compressed_size=4)
        compressed, lookup = seen[0]
        torch.testing.assert_close(compressed, lookup)

    def test_lookup_tokens_see_each_other_through_compressed_ones_alone(self, images):
        layer = small("lookupvit").lookupvit.layers[0]
        torch.nn.init.zeros_(layer.infuse_proj.weight)
        x, lookup = torch.randn(1, 4, 24), torch.randn(1, 16, 24, requires_grad=True)
        layer(x, lookup)[1][0, 3].sum().backward()
        others = torch.arange(16) != 3
        assert not lookup.grad[0, others].any()
        assert lookup.grad[0, 3].any()


class TestIterativePerceiver:
    def test_fourier_features(self):
        features = fourier_features(224, 64, 224)
        torch.testing.assert_close(features[0, :4], torch.tensor([-1, -1, 8.7e-8, -0.6801727]), rtol=1e-5, atol=1e-6)
        assert features.double().square().sum().item() == pytest.approx(6_456_278.67, rel=1e-6)
        assert fourier_features(32, 8, 32).square().sum().item() == pytest.approx(17_110.71, rel=1e-6)

    @torch.no_grad()
    @pytest.mark.parametrize(("kind", "side"), [("Fourier", 224), ("Learned", 16), ("ConvProcessing", 224)])
    def test_weights_of_transformers(self, kind, side):
        theirs = getattr(transformers, f"PerceiverForImageClassification{kind}")(PerceiverConfig(**THEIRS))
        theirs = with_biases(with_statistics(theirs)).double()
        ours = IterativePerceiverForImageClassification.from_transformers(theirs).double()
        image = torch.randn(2, 3, side, side, dtype=torch.float64)
        expected = theirs(inputs=image).logits
        # Their Fourier features are computed in float32, as ours.
        torch.testing.assert_close(ours(image).logits, expected, rtol=1e-5, atol=1e-5)
        assert (expected[0] - expected[1]).abs().max() > 1e-3  # it does depend on the image

    def test_other_models_are_refused(self):
        for other in (small("perceiver"), PerceiverForMaskedLM(PerceiverConfig(**THEIRS, d_model=16))):
            with pytest.raises(ValueError, match=f"PerceiverForImageClassificationFourier.*got {type(other).__name__}"):
                IterativePerceiverForImageClassification.from_transformers(other)
        for other in ("deepmind/vision-perceiver-learned", Path("model"), None, PerceiverConfig):
            with pytest.raises(ValueError, match=f"Expected a loaded model .*Fourier.*, got {re.escape(repr(other))}"):
                IterativePerceiverForImageClassification.from_transformers(other)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("qk_channels", 32),
            ("v_channels", 32),
            ("cross_attention_shape_for_attention", "q"),
            ("num_cross_attention_heads", 2),
            ("cross_attention_widening_factor", 2),
            ("self_attention_widening_factor", 2),
            ("use_query_residual", False),
        ],
    )
    def test_what_only_transformers_has_is_refused(self, field, value):
        theirs = transformers.PerceiverForImageClassificationLearned(PerceiverConfig(**{**THEIRS, field: value}))
        with pytest.raises(ValueError, match=f"`{field}` .*got {value!r}"):
            IterativePerceiverForImageClassification.from_transformers(theirs)

    @torch.no_grad()
    @pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("perceiver")])
    def test_order_of_tokens_plays_no_part(self, name, images):
        """What Perceiver claims: permuted after their positions are known, the inputs are the same to it."""
        base = small(name).iterative_perceiver
        knobs = base.config.resolve()
        tokens = base.tokens(images)
        expected = base.read(tokens, **knobs)
        for seed in range(3):
            order = torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(base.read(tokens[:, order], **knobs), expected, rtol=1e-4, atol=1e-5)
        # Pixels that are permuted before get the positions of other pixels.
        shuffled = images.flatten(2)[..., torch.randperm(256)].reshape(images.shape)
        assert (base.run(shuffled, **knobs) - expected).abs().max() > 1e-2

    @torch.no_grad()
    def test_output_queries_are_read_each_on_its_own(self, images):
        base = small("perceiver io").iterative_perceiver
        latents = base(images).last_hidden_state
        queries = torch.randn(9, 24)
        read = base.decode(latents, queries)
        assert read.shape == (7, 9, 24)
        torch.testing.assert_close(base.decode(latents, queries[4:6]), read[:, 4:6], rtol=1e-5, atol=1e-5)
        own = base.decode(latents, torch.stack([queries.roll(i, 0) for i in range(7)]))  # other queries for each image
        torch.testing.assert_close(own[3], read[3].roll(3, 0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(base.decode(latents, base.output_query)[:, 0], base(images).pooler_output)
        assert (read[:, 0] - read[:, 1]).abs().max() > 1e-2

    def test_what_cannot_be_decoded(self, images):
        base, latents = small("perceiver io").iterative_perceiver, torch.randn(7, 6, 24)
        for queries in (torch.randn(24), torch.randn(3, 25), torch.randn(2, 3, 24)):
            with pytest.raises(ValueError, match=r"Expected queries of shape \(n, 24\) or \(7, n, 24\), got"):
                base.decode(latents, queries)
        with pytest.raises(ValueError, match="Expected `decoder_type` 'query' to decode, got 'mean'"):
            small("perceiver").iterative_perceiver.decode(latents, torch.randn(3, 24))

    def test_inputs_of_a_config(self):
        with pytest.raises(ValueError, match=r"Expected `inputs` to be one of fourier, learned, conv, got 'patches'"):
            IterativePerceiverConfig(inputs="patches")
        with pytest.raises(ValueError, match="at least 5 with `inputs` 'conv', got 4"):
            IterativePerceiverConfig(inputs="conv", image_size=4)
        with pytest.raises(ValueError, match="`stem_channels` to be at least 1, got 0"):
            IterativePerceiverConfig(stem_channels=0)


class TestQnA:
    @torch.no_grad()
    @pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (2, 3), (1, 5)])
    def test_the_layer_is_attention_in_windows(self, stride, kernel):
        """Compare with windows that are unfolded and weighted one by one."""
        torch.manual_seed(0)
        n, h, d, C, S = 2, 3, 4, 6, 8
        config = QnAViTConfig(kernel_size=kernel, num_queries=n)
        layer = QnALayer(config, C, h * d, h, stride).double()
        for p in layer.parameters():
            torch.nn.init.normal_(p)
        x = torch.randn(2, S, S, C, dtype=torch.float64)
        q = layer.queries.view(n, h, d)
        q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt() / math.sqrt(d)
        k, v = layer.key(x).view(2, S, S, h, d), layer.value(x).view(2, S, S, h, d)
        s = torch.einsum("nhd,bxyhd->bxynh", q, k)
        r, a = (t.view(kernel, kernel, n, h) for t in (layer.relative_bias, layer.scale))
        out = torch.zeros(2, S // stride, S // stride, h, d, dtype=torch.float64)
        reach = kernel // 2
        for i in range(S // stride):
            for j in range(S // stride):
                above, below = 0, 0
                for u in range(kernel):
                    for w in range(kernel):
                        y, z = i * stride + u - reach, j * stride + w - reach
                        if 0 <= y < S and 0 <= z < S:
                            weight = (s[:, y, z] + r[u, w]).exp()  # (B, n, h)
                            above = above + (weight * a[u, w])[..., None] * v[:, y, z][:, None]
                            below = below + weight
                out[:, i, j] = (above / below[..., None]).sum(1)
        torch.testing.assert_close(layer(x), layer.proj(out.flatten(3)), rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_half_precision_is_finite_where_scores_are_large(self):
        layer = QnALayer(QnAViTConfig(), 8, 8, 2, 1)
        for p in layer.parameters():
            torch.nn.init.normal_(p)
        x = 300 * torch.randn(1, 6, 6, 8)
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).isfinite().all()
        assert expected.isfinite().all()
