"""Corruptions: ours are deterministic for each image and grow with severity; CIFAR-10-C is read as published."""

import numpy as np
import pytest

from hf_visual_perceiver.data.images import ImageDataset, load_images
from hf_visual_perceiver.evaluation.corruptions import CORRUPTIONS, SEVERITIES, Cifar10C, corrupt


EVERY = pytest.mark.parametrize("name", CORRUPTIONS)


@pytest.fixture(scope="module")
def images(cifar10):
    return load_images(cifar10, "test").images[:24]


def distortion(a, b):
    return np.abs(a.astype(float) - b).mean()


@EVERY
def test_shape_dtype_and_input_left_alone(name, images):
    before = images.copy()
    for severity in SEVERITIES:
        result = corrupt(images, name, severity)
        assert (result.shape, result.dtype) == (images.shape, np.uint8)
        assert (result != images).any()
    np.testing.assert_array_equal(images, before)


@EVERY
def test_an_image_is_corrupted_alike_in_every_batch(name, images):
    whole = corrupt(images, name, 3, seed=1)
    np.testing.assert_array_equal(whole[5:7], corrupt(images[5:7], name, 3, seed=1, indices=[5, 6]))
    others = corrupt(images, name, 3, seed=2), corrupt(images, name, 3, 1, range(24, 48))
    assert all((whole != other).any() == (name == "gaussian_noise") for other in others)


@EVERY
def test_severity_5_distorts_more_than_1(name, images):
    least, most = (distortion(corrupt(images, name, severity), images) for severity in (1, 5))
    assert most > 1.3 * least


def test_known_values(images):
    grey = np.full((1, 32, 32, 3), 128, dtype=np.uint8)
    noise = corrupt(grey, "gaussian_noise", 5).astype(float) - 128
    assert noise.std() == pytest.approx(0.1 * 255, rel=0.05)
    assert (corrupt(grey, "gaussian_blur", 5) == 128).all()
    spread = images.astype(float).std(axis=(1, 2))
    np.testing.assert_allclose(corrupt(images, "contrast", 5).astype(float).std(axis=(1, 2)), 0.15 * spread, atol=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("frost", 1), "Expected a corruption among gaussian_noise, .*, got 'frost'"),
        (("contrast", 0), "Expected a severity from 1 to 5, got 0"),
        (("contrast", 1, 0, [1]), "Expected an index for each of 24 images, got 1"),
    ],
)
def test_bad_input(arguments, message, images):
    with pytest.raises(ValueError, match=message):
        corrupt(images, *arguments)
    with pytest.raises(ValueError, match=r"in uint8, got .* in float64"):
        corrupt(images.astype(float), "contrast", 1)


class TestCifar10C:
    @pytest.fixture
    def clean(self):
        return ImageDataset(np.zeros((3, 32, 32, 3), np.uint8), np.array([2, 0, 1]), ["a", "b", "c"])

    @pytest.fixture
    def folder(self, tmp_path, clean):
        np.save(tmp_path / "labels.npy", np.tile(clean.labels, 5).astype(np.uint8))
        for number, name in enumerate(("fog", "snow")):
            values = 10 * number + np.arange(5).repeat(3)  # the severity, less one
            np.save(
                tmp_path / f"{name}.npy",
                np.ones((15, 32, 32, 3), np.uint8) * values[:, None, None, None].astype(np.uint8),
            )
        return tmp_path

    def test_severities_lie_one_after_the_other(self, folder, clean):
        published = Cifar10C(folder, clean)
        assert published.corruptions == ["fog", "snow"]
        for severity in SEVERITIES:
            images = published.images("snow", severity)
            assert (images.images == 10 + severity - 1).all()
            assert images.images.shape == (3, 32, 32, 3)
            assert images.labels.tolist() == [2, 0, 1]

    def test_other_images_are_refused(self, folder, clean):
        with pytest.raises(ValueError, match=r"15 labels of five severities there, 2 images in the dataset\."):
            Cifar10C(folder, clean.subset(slice(0, 2)))
        with pytest.raises(ValueError, match="3 images in the dataset, of other labels"):
            Cifar10C(folder, clean.subset(np.array([1, 0, 2])))

    def test_what_is_no_such_folder(self, folder, clean):
        np.save(folder / "fog.npy", np.zeros((15, 32, 32, 3)))
        with pytest.raises(ValueError, match=r"Expected 15 images .* in fog\.npy, got .* in float64"):
            Cifar10C(folder, clean).images("fog", 1)
        (folder / "snow.npy").write_text("damaged")
        with pytest.raises(ValueError, match=r"Cannot read .*snow\.npy"):
            Cifar10C(folder, clean).images("snow", 1)
        (folder / "labels.npy").unlink()
        with pytest.raises(ValueError, match="Expected the folder of CIFAR-10-C, with labels"):
            Cifar10C(folder, clean)
