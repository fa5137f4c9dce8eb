"""Masked patches: what is visible alone counts, the loss falls, guesses are what they say, and bad input is named."""

import masked_patches
import pytest
import torch
from masked_patches import (
    CONFIG,
    MaskedPatches,
    chosen_patches,
    complement,
    draw_masks,
    errors,
    guesses,
    images_of,
    main,
    patches_of,
    train,
)

from hf_visual_perceiver.data.images import ImageDataset, load_images, normalise
from hf_visual_perceiver.modeling import IterativePerceiverConfig


SMALL = {**CONFIG, "num_queries": 8, "hidden_size": 32, "num_self_attends_per_block": 1, "num_frequency_bands": 4}


@pytest.fixture
def model() -> MaskedPatches:
    return MaskedPatches(IterativePerceiverConfig(**{**SMALL, "image_size": 16}))


@pytest.fixture(scope="module")
def data(cifar10) -> ImageDataset:
    return load_images(cifar10, "train").subset(slice(0, 256))


def test_patches_are_the_image(images):
    patches = patches_of(images, 4)
    assert patches.shape == (8, 16, 48)
    torch.testing.assert_close(patches[2, 5].view(3, 4, 4), images[2, :, 4:8, 4:8])
    torch.testing.assert_close(images_of(patches, 4, 16), images)


def test_masks_are_a_share_of_each_image():
    masked = draw_masks(50, 16, 0.25, 0, 1)
    assert masked.shape == (50, 4)
    assert torch.equal(masked, draw_masks(50, 16, 0.25, 0, 1))
    assert not torch.equal(masked, draw_masks(50, 16, 0.25, 0, 2))
    both = torch.cat([masked, complement(masked, 16)], 1).sort(1).values
    assert torch.equal(both, torch.arange(16).expand(50, -1))
    assert len({tuple(row) for row in masked.tolist()}) > 25


@torch.no_grad()
def test_masked_pixels_play_no_part_and_each_query_has_its_place(model, images):
    masked = draw_masks(8, 16, 0.5, 0)
    painted = model(images, masked)
    assert painted.shape == (8, 8, 48)
    patches = patches_of(images, 4)
    for chosen, same in ((masked, True), (complement(masked, 16), False)):
        index = chosen[:, :, None].expand(-1, -1, 48)
        changed = images_of(patches.scatter(1, index, 3.0), 4, 16)
        assert torch.equal(model(changed, masked), painted) is same
    torch.testing.assert_close(model(images, masked.flip(1)), painted.flip(1), rtol=1e-5, atol=1e-5)
    assert (painted[:, 0] - painted[:, 1]).abs().max() > 1e-3


def test_a_few_steps_lower_the_loss(data):
    torch.manual_seed(0)
    model = MaskedPatches(IterativePerceiverConfig(**SMALL), patch_size=8)
    few = data.subset(slice(0, 64))
    before = errors(model, few, 0.5, 0)
    assert len(train(model, data, 60, 16, 0.5, 0)) == 60
    after = errors(model, few, 0.5, 0)
    assert after.pop("Perceiver IO") < 0.9 * before.pop("Perceiver IO")
    assert after == before  # the guesses


def test_errors_are_those_of_all_images(model, data):
    images = ImageDataset(data.images[:10, :16, :16], data.labels[:10], data.label_names)
    pixels = normalise(images.images, masked_patches.MEAN, masked_patches.STD)
    masked = draw_masks(10, 16, 0.5, 3, 2**32)
    truth = chosen_patches(patches_of(pixels, 4), masked)
    expected = {name: (v - truth).square().mean().item() for name, v in guesses(pixels, masked, model).items()}
    with torch.no_grad():
        expected["Perceiver IO"] = (model(pixels, masked) - truth).square().mean().item()
    assert errors(model, images, 0.5, 3, batch_size=4) == pytest.approx(expected, rel=1e-4)


def test_guesses_look_at_visible_pixels_alone(model, images):
    masked = draw_masks(8, 16, 0.5, 0)
    found = guesses(images, masked, model)
    visible = chosen_patches(patches_of(images, 4), complement(masked, 16))  # (B, m, 3 x 16)
    mean = visible.unflatten(2, (3, 16)).mean((1, 3))
    torch.testing.assert_close(found["mean colour"], mean.repeat_interleave(16, 1)[:, None].expand(-1, 8, -1))
    seen = model.pixels[complement(masked, 16)].flatten(1)
    for b in range(8):
        for n, patch in enumerate(model.pixels[masked[b]].tolist()):
            for i, pixel in enumerate(patch):
                y, x = divmod(pixel, 16)
                distance = [(y - s // 16) ** 2 + (x - s % 16) ** 2 for s in seen[b].tolist()]
                nearest = [s for s, d in zip(seen[b].tolist(), distance, strict=True) if d == min(distance)]
                got = found["nearest visible pixel"][b, n].view(3, 16)[:, i]
                assert any(torch.equal(got, images[b, :, s // 16, s % 16]) for s in nearest)


def test_the_command_prints_errors_and_draws(cifar10, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    options = {"steps": 2, "batch_size": 4, "validation": 8, "share": 0.5, "patch_size": 8, "seed": 0}
    main(dataset=cifar10, picture=picture, **options)
    printed = capsys.readouterr().out
    for name in ("mean colour", "nearest visible pixel", "Perceiver IO"):
        assert f"| {name} | " in printed
    assert "steps 2" in printed
    assert picture.stat().st_size > 1000


def test_bad_input(model, images, cifar10, tmp_path):
    for masked in (
        torch.zeros(8, dtype=torch.long),
        torch.zeros(7, 2, dtype=torch.long),
        torch.arange(16).expand(8, -1),
    ):
        with pytest.raises(ValueError, match=r"Expected the masked patches as \(8, 1 to 15\), got"):
            model(images, masked)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"leaves some of 16 on each side, got {share}"):
            draw_masks(8, 16, share)
    with pytest.raises(ValueError, match="patch size that divides 32, got 5"):
        MaskedPatches(IterativePerceiverConfig(**SMALL), 5)
    with pytest.raises(ValueError, match="`decoder_type` 'query', got 'mean'"):
        MaskedPatches(IterativePerceiverConfig(**{**SMALL, "decoder_type": "mean"}))
    options = {"dataset": cifar10, "steps": 1, "batch_size": 4, "share": 0.5, "patch_size": 8, "seed": 0}
    with pytest.raises(ValueError, match=r"`validation` to be in \[8, \d+\], got 3"):
        main(validation=3, picture=None, **options)
    with pytest.raises(ValueError, match=r"end in .png, .svg or .pdf, got 'p.gif'"):
        main(validation=8, picture=tmp_path / "p.gif", **options)
