"""Corruptions: deterministic for each image, stronger with severity, and refusing what they do not know."""

import numpy as np
import pytest
import torch

from hf_visual_perceiver.corruptions import CORRUPTIONS, SEVERITIES, corrupt, elastic_transform
from hf_visual_perceiver.training.data import load_images


EVERY = pytest.mark.parametrize("name", CORRUPTIONS)
DETERMINISTIC = {"gaussian_blur", "defocus_blur", "zoom_blur", "brightness", "contrast", "saturate", "pixelate"}
DETERMINISTIC |= {"jpeg_compression"}

# Of the original's functions (hendrycks/robustness, make_cifar_c.py at ca36008, run with scipy, scikit-image and OpenCV) on the picture
# of `test_equal_to_the_original`: severities 1, 3 and 5 at three places, before rounding.
ORIGINAL = {
    "gaussian_blur": [[221.72, 160.35, 93.36], [158.68, 140.37, 75.13], [145.63, 132.63, 75.48]],
    "defocus_blur": [[221.72, 160.36, 93.36], [170.14, 145.87, 78.87], [150.89, 126.67, 59.67]],
    "zoom_blur": [[201.45, 137.49, 102.64], [193.54, 135.35, 109.2], [193.59, 139.48, 110.23]],
    "brightness": [[255.0, 175.31, 110.75], [255.0, 195.94, 136.25], [255.0, 206.25, 174.5]],
    "contrast": [[213.68, 153.71, 103.43], [169.84, 137.9, 111.02], [138.53, 126.61, 116.45]],
    "saturate": [[245.0, 192.3, 98.0], [245.0, 145.5, 98.0], [245.0, 81.64, 98.0]],
    "pixelate": [[150.0, 165.0, 98.0], [245.0, 138.0, 55.0], [153.0, 178.0, 101.0]],
}


@pytest.fixture(scope="module")
def images(cifar10):
    return load_images(cifar10, "test").images[:24]


def distortion(a, b):
    return np.abs(a.astype(float) - b).mean()


def test_a_dozen_and_more():
    assert len(CORRUPTIONS) == 17
    assert {kind.family for kind in CORRUPTIONS.values()} == {"noise", "blur", "weather", "digital"}
    assert all(len(kind.constants) == len(SEVERITIES) for kind in CORRUPTIONS.values())


@EVERY
def test_shape_dtype_and_input_left_alone(name, images):
    before = images.copy()
    for severity in SEVERITIES:
        result = corrupt(images, name, severity)
        assert result.shape == images.shape
        assert result.dtype == np.uint8
        assert (result != images).any()
    np.testing.assert_array_equal(images, before)


@EVERY
def test_deterministic_from_seed_and_index(name, images):
    first = corrupt(images, name, 3, seed=1)
    np.testing.assert_array_equal(first, corrupt(images, name, 3, seed=1))
    other_seed, other_indices = corrupt(images, name, 3, seed=2), corrupt(images, name, 3, 1, range(24, 48))
    if name in DETERMINISTIC:
        np.testing.assert_array_equal(first, other_seed)
        np.testing.assert_array_equal(first, other_indices)
    else:
        # Counted by image. Motion has few directions in whole pixels, so that two draws may be alike.
        for other in (other_seed, other_indices):
            assert (first != other).any(axis=(1, 2, 3)).sum() >= 20


@EVERY
def test_an_image_does_not_depend_on_its_batch(name, images):
    for severity in (1, 5):
        together = corrupt(images, name, severity)
        for i in (0, 7, 23):
            alone = corrupt(images[i : i + 1], name, severity, indices=[i])
            np.testing.assert_array_equal(alone[0], together[i])
        order = np.arange(24)[::-1]
        np.testing.assert_array_equal(corrupt(images[order], name, severity, indices=order), together[order])


@EVERY
def test_images_of_a_batch_get_their_own_draws(name, images):
    same = corrupt(np.repeat(images[:1], 4, axis=0), name, 4)
    assert (same[0] == same[1:]).all() == (name in DETERMINISTIC)


@EVERY
def test_severity_5_distorts_more_than_1(name, images):
    least, most = (distortion(corrupt(images, name, severity), images) for severity in (1, 5))
    if name == "elastic_transform":
        # By the original's constants the whole image moves less and its parts move more.
        constants = [(alpha, sigma, 0) for alpha, sigma, _ in CORRUPTIONS[name].constants]
        x = images.astype(np.float32) / 255
        draws = [[np.random.default_rng(i) for i in range(len(images))] for _ in SEVERITIES]
        local = [distortion(elastic_transform(x, c, d), x) for c, d in zip(constants, draws, strict=True) if c[0]]
        assert local == sorted(local)
        assert local[-1] > 2 * local[0]
    else:
        assert most > 1.3 * least


def test_the_mean_over_corruptions_rises_with_severity(images):
    means = [np.mean([distortion(corrupt(images, name, s), images) for name in CORRUPTIONS]) for s in SEVERITIES]
    assert means == sorted(means)


def test_known_values(images):
    grey = np.full((1, 32, 32, 3), 128, dtype=np.uint8)
    noise = corrupt(grey, "gaussian_noise", 5).astype(float) - 128
    assert noise.std() == pytest.approx(0.1 * 255, rel=0.05)
    shot = corrupt(grey, "shot_noise", 5).astype(float)
    assert shot.std() == pytest.approx(255 * np.sqrt(128 / 255 / 50), rel=0.1)
    hit = corrupt(grey, "impulse_noise", 5) != 128
    assert hit.mean() == pytest.approx(0.07, abs=0.015)
    assert set(np.unique(corrupt(grey, "impulse_noise", 5))) == {0, 128, 255}
    # What only moves or averages neighbours leaves a flat image flat.
    for name in ("gaussian_blur", "motion_blur", "zoom_blur", "glass_blur", "defocus_blur", "elastic_transform"):
        assert np.abs(corrupt(grey, name, 5).astype(int) - 128).max() <= 1, name
    spread = images.astype(float).std(axis=(1, 2))
    np.testing.assert_allclose(corrupt(images, "contrast", 5).astype(float).std(axis=(1, 2)), 0.15 * spread, atol=0.5)
    brighter = np.minimum(images.max(-1) + 0.3 * 255, 255)
    np.testing.assert_allclose(corrupt(images, "brightness", 5).max(-1), brighter, atol=0.51)


@pytest.mark.parametrize("name", ORIGINAL)
def test_equal_to_the_original(name):
    i = np.arange(32 * 32 * 3, dtype=np.int64)
    picture = ((i * i * 7 + i * 13) % 251).astype(np.uint8).reshape(1, 32, 32, 3)
    for severity, expected in zip((1, 3, 5), ORIGINAL[name], strict=True):
        result = corrupt(picture, name, severity)[0]
        found = [int(result[place]) for place in ((5, 7, 0), (16, 20, 1), (30, 2, 2))]
        np.testing.assert_allclose(found, expected, atol=0.51)


def test_black_and_white_stay_finite():
    flat = np.stack([np.zeros((32, 32, 3)), np.full((32, 32, 3), 255)]).astype(np.uint8)
    with np.errstate(all="raise", under="ignore"):
        for name in CORRUPTIONS:
            for severity in SEVERITIES:
                corrupt(flat, name, severity)


@pytest.mark.parametrize("shape", [(64, 48), (16, 16)])
def test_other_sizes(shape, images):
    other = np.resize(images, (2, *shape, 3))
    for name in CORRUPTIONS:
        for severity in (1, 5):
            assert corrupt(other, name, severity).shape == other.shape


def test_torch_is_numpy(images):
    tensor = torch.from_numpy(images[:3].copy())
    result = corrupt(tensor, "fog", 2, seed=5)
    assert isinstance(result, torch.Tensor)
    np.testing.assert_array_equal(result.numpy(), corrupt(images[:3], "fog", 2, seed=5))


def test_empty_batch():
    assert corrupt(np.zeros((0, 32, 32, 3), dtype=np.uint8), "fog", 1).shape == (0, 32, 32, 3)


def test_bad_input(images):
    with pytest.raises(ValueError, match=r"a corruption among gaussian_noise, .*, got 'frost'"):
        corrupt(images, "frost", 1)
    for severity in (0, 6, 1.5):
        with pytest.raises(ValueError, match=f"severity from 1 to 5, got {severity}"):
            corrupt(images, "fog", severity)
    with pytest.raises(ValueError, match=r"\(B, H, W, 3\) in uint8, got \(24, 32, 32, 3\) in float32"):
        corrupt(images.astype(np.float32), "fog", 1)
    with pytest.raises(ValueError, match=r"got \(24, 3, 32, 32\) in uint8"):
        corrupt(images.transpose(0, 3, 1, 2), "fog", 1)
    with pytest.raises(ValueError, match="an index for each of 24 images, got 2"):
        corrupt(images, "fog", 1, indices=[0, 1])
