"""Augmentation of batches, compared with timm's of single PIL images."""

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.mixup import Mixup, mixup_target, rand_bbox
from timm.data.random_erasing import RandomErasing
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import functional as pil

from hf_visual_perceiver.data.images import BatchOrder, load_images, normalise
from hf_visual_perceiver.inference.loading import default_dataset
from hf_visual_perceiver.training.augmentation import (
    OPERATIONS,
    WARPS,
    BatchAugmentation,
    Draws,
    RandAugment,
    parse_rand_augment,
)
from hf_visual_perceiver.training.recipe import Augmentation


MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
FILL = (125, 122, 115)
DEIT = {
    "random_crop_padding": 4,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
}


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Natural images (64, 32, 32, 3), with three edge cases: one colour, two colours, and low contrast."""
    pictures = load_images(default_dataset(), "train").images[:64].copy()
    pictures[0] = 77
    pictures[1, :, :16], pictures[1, :, 16:] = 3, 250
    pictures[2] = pictures[2] // 16 + 100
    return pictures


def batch_augmentation(seed: int = 0, random_crop: bool = True, **fields) -> BatchAugmentation:
    augmentation = Augmentation(**{"horizontal_flip": 0.0, **fields})
    return BatchAugmentation(augmentation, 10, MEAN, STD, seed, random_crop)


def nothing(B: int, **fields) -> Draws:
    """Random draws that change nothing, except for `fields`."""
    boxes = np.zeros((B, 4), dtype=int)
    operations = np.zeros((B, 0), dtype=int)
    draws = Draws(
        np.zeros((B, 2), dtype=int), np.zeros(B, dtype=bool), operations, operations, boxes, boxes, np.zeros(B)
    )
    return dataclasses.replace(draws, **fields)


def tensor(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def apply(pictures: np.ndarray, draws: Draws, **fields) -> np.ndarray:
    """Apply the draws; return integer pixels (B, H, W, 3)."""
    labels = torch.zeros(len(pictures), dtype=torch.int64)
    x, _ = batch_augmentation(**fields).apply(tensor(pictures), labels, draws)
    pixels = 255 * (x.permute(0, 2, 3, 1).double() * torch.tensor(STD).double() + torch.tensor(MEAN).double())
    torch.testing.assert_close(pixels, pixels.round(), rtol=0, atol=1e-3)
    return pixels.round().int().numpy()


def timm_name(name: str, increasing: bool = False) -> str:
    """timm's name of one of OPERATIONS."""
    names = auto_augment._RAND_INCREASING_TRANSFORMS if increasing else auto_augment._RAND_TRANSFORMS
    return next(n for n in names if n.removesuffix("Increasing").removesuffix("Rel") == name)


def timm_operation(picture: np.ndarray, name: str, *argument: float, fill=FILL) -> np.ndarray:
    operation = auto_augment.NAME_TO_OP[timm_name(name)]
    image = operation(Image.fromarray(picture), *argument, fillcolor=fill, resample=Image.Resampling.BILINEAR)
    return np.asarray(image).astype(int)


def covered_rows(boxes: np.ndarray) -> np.ndarray:
    """(32,): number of boxes (n, 4) that cover each row."""
    rows = np.arange(32)
    return ((boxes[:, :1] <= rows) & (rows < boxes[:, 1:2])).mean(0)


class TestNotation:
    @pytest.mark.parametrize(
        "notation",
        [
            "rand",
            "rand-m9-mstd0.5-inc1",
            "rand-m7-n3-p0.9-inc0",
            "rand-mstd101-m5",
            "rand-m15-mmax20-mstd1",
            "rand-mmax0-p1",
        ],
    )
    def test_means_what_timm_reads(self, notation):
        parsed, timms = parse_rand_augment(notation), auto_augment.rand_augment_transform(notation)
        first = timms.ops[0]
        assert (parsed.num_ops, parsed.probability) == (timms.num_layers, first.prob)
        assert (parsed.magnitude, parsed.magnitude_std) == (first.magnitude, first.magnitude_std)
        assert parsed.magnitude_max == (first.magnitude_max or 10)
        assert {timm_name(name, parsed.increasing) for name in OPERATIONS[:-1]} == {op.name for op in timms.ops}

    @pytest.mark.parametrize(
        "notation",
        [
            *("", "v0", "original-mstd0.5", "augmix-m5", "random-m9", "rand_m9", "m9-rand"),
            *("rand-w0", "rand-tweights", "rand-x3", "rand-m", "rand-", "rand-mstdinf"),
            *("rand-m9.5", "rand-m9-mstd0.5.1", "rand-p1.5"),
        ],
    )
    def test_another_notation_is_named(self, notation):
        with pytest.raises(ValueError, match=rf"timm's notation .* such as rand-m9-mstd0.5-inc1, got '{notation}'"):
            batch_augmentation(auto_augment=notation)


class TestOperations:
    @pytest.mark.parametrize("increasing", [False, True])
    @pytest.mark.parametrize("name", OPERATIONS[:-1])
    def test_equal_timms(self, pictures, monkeypatch, name, increasing):
        pictures = pictures[:32]
        B = len(pictures)
        for magnitude, sign in itertools.product((0, 2.3, 9, 10, 13), (-1, 1)):
            monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
            level_to_argument = auto_augment.LEVEL_TO_ARG[timm_name(name, increasing)]
            argument = level_to_argument(magnitude, {}) if level_to_argument else ()
            if name == "Posterize":  # timm's 0 bits and fewer are black, or an error; its 8 and more the image
                argument = (max(argument[0], 1),)
            expected = np.stack([timm_operation(picture, name, *argument) for picture in pictures])

            level, signs = np.full(B, float(magnitude)), np.full(B, sign)
            arguments = RandAugment(increasing=increasing).arguments(level, signs)[name][:, None]
            operations = np.full((B, 1), OPERATIONS.index(name))
            difference = abs(apply(pictures, nothing(B, operations=operations, arguments=arguments)) - expected)
            if name in WARPS or name == "AutoContrast":
                # Both truncate, PIL from double precision: a value that is nearly whole can fall to either side.
                assert difference.max() <= 1
                assert difference.mean() < 0.05
            else:
                assert difference.max() == 0

    @pytest.mark.parametrize("name", WARPS)
    def test_outside_is_the_fill_colour_alone(self, name):
        white = np.full((1, 24, 32, 3), 255, dtype=np.uint8)
        for argument in (-0.28, 0.41) if name != "Rotate" else (-25.0, 30.0):
            outside = timm_operation(white[0], name, argument, fill=(0, 0, 0))[..., 0] == 0
            assert outside.any()
            draws = nothing(1, operations=np.array([[OPERATIONS.index(name)]]), arguments=np.array([[argument]]))
            pixels = apply(white, draws)[0]
            assert (pixels[outside] == FILL).all()
            assert (pixels[~outside] == 255).all()

    def test_an_image_gets_what_it_drew(self, pictures):
        # All operations in one batch, two after the other, as after timm's crop and flip.
        augmentation = batch_augmentation(**{**DEIT, "horizontal_flip": 0.5})
        draws = dataclasses.replace(
            augmentation.draw(0, 64, 32, 32), **{name: getattr(nothing(64), name) for name in ("erased", "mixed")}
        )
        assert len(np.unique(draws.operations)) == len(OPERATIONS)
        pixels = apply(pictures, draws, random_crop_padding=4)
        for i, picture in enumerate(pictures):
            image = pil.pad(Image.fromarray(picture), 4)
            image = pil.crop(image, 4 + draws.crop[i, 0], 4 + draws.crop[i, 1], 32, 32)
            expected = np.asarray(pil.hflip(image) if draws.flip[i] else image)
            for operation, argument in zip(draws.operations[i], draws.arguments[i], strict=True):
                name = OPERATIONS[operation]
                arguments = {"Posterize": [int(argument)], "Invert": [], "AutoContrast": [], "Equalize": []}
                if name != "Identity":
                    expected = timm_operation(expected.astype(np.uint8), name, *arguments.get(name, [argument]))
            # Where one value more changes what follows, a few pixels differ.
            assert (abs(pixels[i] - expected) <= 2).mean() > 0.95

    def test_any_number_of_images(self, pictures):
        for B in (1, 2, 3):
            augmentation = batch_augmentation(auto_augment="rand-n4-p1")
            x, _ = augmentation(tensor(pictures[:B]), torch.zeros(B, dtype=torch.int64), 0, np.arange(B), B)
            assert x.shape == (B, 3, 32, 32)
            assert x.isfinite().all()


class TestDrawingOperations:
    def test_each_as_often_and_to_each_image_its_own(self):
        operations, _ = RandAugment(probability=0.7).draw(np.random.default_rng(0), 20000)
        counts = np.bincount(operations.ravel(), minlength=len(OPERATIONS))
        expected = np.array([0.7 / 15] * 15 + [0.3]) * operations.size
        assert (abs(counts - expected) < 5 * np.sqrt(expected)).all()
        # The second operation does not depend on the first.
        same = (operations[:, 0] == operations[:, 1]).mean()
        assert abs(same - (15 * (0.7 / 15) ** 2 + 0.3**2)) < 0.02

    @pytest.mark.parametrize(
        ("notation", "mean", "std", "highest"),
        [("m4", 4, 0, 4), ("m4-mstd0.5", 4, 0.5, 10), ("m8-mstd101", 4, 8 / math.sqrt(12), 8), ("m9-mmax5", 5, 0, 5)],
    )
    def test_magnitudes(self, notation, mean, std, highest):
        operations, arguments = parse_rand_augment(f"rand-{notation}").draw(np.random.default_rng(0), 50000)
        degrees = arguments[operations == OPERATIONS.index("Rotate")]
        magnitudes = abs(degrees) / 3
        assert abs(magnitudes.mean() - mean) < 0.1
        assert abs(magnitudes.std() - std) < 0.1
        assert magnitudes.max() <= highest + 1e-9
        assert abs((degrees < 0).mean() - 0.5) < 0.05

    def test_without_notation_nothing_is_drawn(self):
        assert batch_augmentation().draw(0, 8, 32, 32).operations.shape == (8, 0)


class TestCropAndFlip:
    def test_equal_torchvisions(self, pictures):
        augmentation = batch_augmentation(random_crop_padding=5, horizontal_flip=0.5)
        draws = augmentation.draw(3, 64, 32, 32)
        assert 0 < draws.flip.sum() < 64
        pixels = apply(pictures, draws, random_crop_padding=5)
        for i, picture in enumerate(pictures):
            top, left = draws.crop[i] + 5
            expected = pil.crop(pil.pad(Image.fromarray(picture), 5), top, left, 32, 32)
            np.testing.assert_array_equal(pixels[i], np.asarray(pil.hflip(expected) if draws.flip[i] else expected))

    def test_images_that_are_not_square(self):
        images = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12).to(torch.uint8)
        augmentation = batch_augmentation(random_crop_padding=2, horizontal_flip=1.0, auto_augment="rand-p0")
        x, _ = augmentation(images, torch.zeros(2, dtype=torch.int64), 0, np.arange(2), 2)
        draws = augmentation.draw(0, 2, 8, 12)
        for i, (top, left) in enumerate(draws.crop + 2):
            expected = torch.nn.functional.pad(images[i], (2,) * 4)[:, top : top + 8, left : left + 12].flip(-1)
            torch.testing.assert_close(x[i], normalise(expected[None].permute(0, 2, 3, 1).numpy(), MEAN, STD)[0])

    def test_frequencies(self):
        draws = batch_augmentation(random_crop_padding=2, horizontal_flip=0.3).draw(0, 20000, 32, 32)
        for offsets in draws.crop.T:
            assert (abs(np.bincount(offsets + 2) - 4000) < 300).all()
        assert abs(draws.flip.mean() - 0.3) < 0.02

    def test_images_that_were_cropped_before(self):
        assert not batch_augmentation(random_crop_padding=4, random_crop=False).draw(0, 64, 32, 32).crop.any()

    def test_with_nothing_on_images_are_normalised(self, pictures):
        x, targets = batch_augmentation()(tensor(pictures), torch.arange(64) % 10, 0, np.arange(64), 64)
        assert torch.equal(x, normalise(pictures, MEAN, STD))
        assert torch.equal(targets, torch.eye(10)[torch.arange(64) % 10])


class TestErasing:
    def test_boxes_are_mean_pixels_and_the_rest_stays(self, pictures):
        draws = batch_augmentation(random_erasing=0.5).draw(0, 64, 32, 32)
        x, _ = batch_augmentation().apply(tensor(pictures), torch.zeros(64, dtype=torch.int64), draws)
        expected = normalise(pictures, MEAN, STD)
        for i, (top, bottom, left, right) in enumerate(draws.erased):
            expected[i, :, top:bottom, left:right] = 0
        assert torch.equal(x, expected)

    def test_as_often_and_as_large_as_timms(self):
        draws = batch_augmentation(random_erasing=0.4).draw(0, 20000, 32, 24)
        heights, widths = draws.erased[:, 1] - draws.erased[:, 0], draws.erased[:, 3] - draws.erased[:, 2]
        erased = (heights > 0) & (widths > 0)
        assert abs(erased.mean() - 0.4) < 0.02
        assert (draws.erased >= 0).all()
        assert (draws.erased <= [32, 32, 24, 24]).all()

        random.seed(0)
        timms = RandomErasing(1.0, device="cpu")(torch.ones(4000, 1, 32, 24))[:, 0] == 0
        areas, expected = (heights * widths)[erased] / (32 * 24), timms.float().mean((1, 2))
        # A fiftieth and a third, in whole pixels.
        assert 0.015 < areas.min() < 0.025
        assert 0.31 < areas.max() < 0.36
        assert abs(areas.mean() - expected.mean()) < 0.01
        assert abs(areas.std() - expected.std()) < 0.01
        expected_heights = timms.any(2).sum(1).float()
        assert abs(heights[erased].mean() - expected_heights.mean()) < 0.5
        assert abs(heights[erased].std() - expected_heights.std()) < 0.5
        covered = covered_rows(draws.erased[erased])
        assert abs(covered - timms.any(2).float().mean(0).numpy()).max() < 0.05


class TestMixing:
    def unmixed(self, augmentation, images, labels, draws):
        return augmentation.apply(images, labels, dataclasses.replace(draws, partner_weight=np.zeros(len(images))))[0]

    def test_pixels_and_targets_are_those_of_both_images(self, pictures):
        labels = torch.arange(64) % 10
        augmentation = batch_augmentation(**DEIT, mixup_probability=0.8)
        draws = augmentation.draw(0, 64, 32, 32)
        x, targets = augmentation.apply(tensor(pictures), labels, draws)
        before = self.unmixed(augmentation, tensor(pictures), labels, draws)
        own = torch.ones(64, 1)
        for i, (box, weight) in enumerate(zip(draws.mixed, draws.partner_weight, strict=True)):
            top, bottom, left, right = box
            shown = torch.zeros(32, 32)
            shown[top:bottom, left:right] = weight
            expected = (1 - shown) * before[i] + shown * before[63 - i]
            torch.testing.assert_close(x[i], expected)
            # Lambda is the share of pixels that stays.
            own[i] -= shown.mean()
        assert ((own > 0.01) & (own < 0.99)).sum() > 30
        torch.testing.assert_close(targets, mixup_target(labels, 10, own, smoothing=0.1))
        torch.testing.assert_close(targets.sum(1), torch.ones(64))

    @pytest.mark.parametrize(
        "fields",
        [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.3, "cutmix": 0.6, "mixup_switch": 0.3, "mixup_probability": 0.7}],
    )
    def test_shares_are_distributed_as_timms(self, fields):
        B = 6000
        labels = torch.arange(B) // (B // 2)
        augmentation = BatchAugmentation(Augmentation(**fields), 2, MEAN, STD, seed=0)
        images = torch.zeros(B, 3, 16, 16, dtype=torch.uint8)
        _, targets = augmentation(images, labels, 0, np.arange(B), B)
        np.random.seed(0)
        recipe = augmentation.augmentation
        mixup = Mixup(
            recipe.mixup,
            recipe.cutmix,
            prob=recipe.mixup_probability,
            switch_prob=recipe.mixup_switch,
            mode="elem",
            label_smoothing=0,
            num_classes=2,
        )
        _, expected = mixup(torch.zeros(B, 1, 16, 16), labels)
        own, expected = (t.gather(1, labels[:, None]) for t in (targets, expected))
        quantiles = torch.linspace(0, 1, 11)
        torch.testing.assert_close(own.quantile(quantiles), expected.quantile(quantiles), rtol=0, atol=0.05)
        assert abs((own == 1).float().mean() - (expected == 1).float().mean()) < 0.03

    def test_boxes_lie_where_timms_do(self):
        boxes = batch_augmentation(cutmix=1.0).draw(0, 6000, 32, 32).mixed
        assert (boxes >= 0).all()
        assert (boxes <= 32).all()
        np.random.seed(0)
        expected = np.array([rand_bbox((32, 32), lam) for lam in np.random.beta(1, 1, 6000)])
        for columns in (slice(None), [2, 3, 0, 1]):
            assert abs(covered_rows(boxes[:, columns]) - covered_rows(expected[:, columns])).max() < 0.04

    def test_without_mixing_targets_are_smoothed_labels(self):
        images, labels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([3, 0, 9, 3])
        _, targets = batch_augmentation(label_smoothing=0.2)(images, labels, 0, np.arange(4), 4)
        torch.testing.assert_close(targets, 0.8 * torch.eye(10)[labels] + 0.02)


class TestSteps:
    def augment(self, pictures, seed=0, step=5):
        augmentation = batch_augmentation(seed, **DEIT)
        return augmentation(tensor(pictures), torch.arange(64) % 10, step, np.arange(64), 64)

    def test_follow_from_seed_and_step(self, pictures):
        for a, b in zip(self.augment(pictures), self.augment(pictures), strict=True):
            assert torch.equal(a, b)
        for other in ({"seed": 1}, {"step": 6}):
            for a, b in zip(self.augment(pictures), self.augment(pictures, **other), strict=True):
                assert not torch.equal(a, b)

    def test_images_of_a_batch_differ(self, pictures):
        x, targets = self.augment(np.repeat(pictures[5:6], 64, axis=0))
        assert len(x.flatten(1).unique(dim=0)) > 60
        assert len(targets.unique(dim=0)) > 50

    def test_the_images_given_stay(self, pictures):
        images = tensor(pictures.copy())
        self.augment(images.permute(0, 2, 3, 1).numpy())
        assert torch.equal(images, tensor(pictures))

    def test_processes_share_what_one_would_do(self, pictures):
        augmentation = batch_augmentation(**DEIT)
        for world_size in (1, 2, 4):
            x, targets = torch.empty(24, 3, 32, 32), torch.empty(24, 10)
            for rank in range(world_size):
                order = BatchOrder(
                    64, batch_size=24, seed=0, first_step=1, last_step=2, rank=rank, world_size=world_size
                )
                positions, _, indices = np.array(next(iter(order))).T
                places = positions % 24
                labels = torch.from_numpy(indices % 10)
                x[places], targets[places] = augmentation(tensor(pictures[indices]), labels, 1, places, 24)
            if world_size == 1:
                whole = x, targets
            assert torch.equal(x, whole[0])
            assert torch.equal(targets, whole[1])

    def test_other_images_than_the_arguments_say(self):
        images, labels = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"4 images in uint8, got 4 in torch\.float32"):
            batch_augmentation()(images, labels, 0, np.arange(4), 4)
        with pytest.raises(ValueError, match=r"2 images in uint8, got 4 in torch\.uint8"):
            batch_augmentation()(images.to(torch.uint8), labels, 0, np.arange(2), 4)


class Transfers(TorchDispatchMode):
    """Counts the copies from the host to the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        copies = function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        self.count += copies and any(isinstance(a, torch.Tensor) and a.device.type == "cpu" for a in args)
        return result


class TestWaiting:
    def test_the_host_never_reads_from_the_device(self):
        # Tensors on the meta device have no values: whatever needs one, for a shape or a branch, raises.
        images = torch.empty(64, 3, 32, 32, dtype=torch.uint8, device="meta")
        labels = torch.empty(64, dtype=torch.int64, device="meta")
        with pytest.raises(RuntimeError):
            labels.sum().item()
        with Transfers() as transfers:
            x, targets = batch_augmentation(**DEIT, horizontal_flip=0.5)(images, labels, 0, np.arange(64), 64)
        assert (x.device.type, x.shape, targets.shape) == ("meta", (64, 3, 32, 32), (64, 10))
        assert transfers.count == 1
