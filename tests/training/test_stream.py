"""Streams: every image is used once, a resumed stream is identical, and bad images."""

import io
import itertools
import json
import logging
import random
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from support import run

from hf_visual_perceiver.data.images import load_images, load_table
from hf_visual_perceiver.inference.loading import default_dataset
from hf_visual_perceiver.training import stream as stream_module
from hf_visual_perceiver.training.stream import DecodedImages, EncodedImage, StreamOrder, load_stream


NAMES = ["cat", "dog", "frog"]


@pytest.fixture(scope="module")
def sample() -> datasets.Dataset:
    """The encoded sample."""
    return load_table(default_dataset(), "train").cast_column("img", datasets.Image(decode=False))


@pytest.fixture
def shards(tmp_path, sample):
    """Write successive images of the sample to files of the given sizes; return their folder."""
    table = sample.cast_column("img", datasets.Image())

    def write(*sizes):
        for i, (begin, end) in enumerate(itertools.pairwise(np.cumsum([0, *sizes]))):
            # Small row groups, as the files of the Hub have several.
            table.select(range(begin, end)).to_parquet(str(tmp_path / f"train-{i}.parquet"), batch_size=16)
        return tmp_path

    return write


@pytest.fixture
def write_examples(tmp_path):
    """Write one file of the given images and labels; return its folder."""

    def write(images, labels):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
        table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        table.to_parquet(str(tmp_path / "train.parquet"))
        return tmp_path

    return write


def create_order(dataset, **fields):
    defaults = {"split": "train", "batch_size": 8, "seed": 0, "last_step": 15, "shuffle_window": 20}
    return StreamOrder(str(dataset), **{**defaults, **fields})


def dealt(order):
    """The bytes of the images in the order of the stream."""
    return [image.data for batch in order for image in batch]


def stored(sample, begin, end):
    return [encoded["bytes"] for encoded in sample.select(range(begin, end))["img"]]


def png(size=(6, 4), color=(200, 100, 50), mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, "PNG")
    return file.getvalue()


def encoded(data, step=0, position=0, label=1, name="the image"):
    return EncodedImage(step, position, label, data, name)


class TestOrder:
    def test_an_epoch_deals_each_image_once(self, shards, sample):
        images = dealt(create_order(shards(50, 30, 43), last_step=30))
        # Batches go over the ends of epochs.
        assert sorted(images[:123]) == sorted(stored(sample, 0, 123))
        assert len(set(images[123:])) == 240 - 123

    def test_labels_stay_with_their_images(self, shards, sample):
        expected = dict(zip(stored(sample, 0, 48), sample["label"][:48], strict=True))
        for batch in create_order(shards(48), last_step=6):
            assert all(image.label == expected[image.data] for image in batch)

    def test_images_are_shuffled_in_windows(self, shards, sample):
        images, files = dealt(create_order(shards(64))), stored(sample, 0, 64)
        for begin, end in ((0, 20), (20, 40), (40, 60), (60, 64)):
            assert images[begin:end] != files[begin:end]
            assert sorted(images[begin:end]) == sorted(files[begin:end])

    def test_no_more_than_a_window_is_in_memory(self, shards, monkeypatch):
        read = []
        encode = StreamOrder._encoded
        monkeypatch.setattr(StreamOrder, "_encoded", lambda self, *args: read.append(1) or encode(self, *args))
        for step, _ in enumerate(create_order(shards(200), last_step=25)):
            assert len(read) <= 8 * (step + 1) + 20 + 1

    def test_order_follows_from_seed_and_epoch(self, shards):
        folder = shards(40)
        first, again, other = (dealt(create_order(folder, last_step=10, seed=seed)) for seed in (0, 0, 1))
        assert first == again
        assert first != other
        assert first[:40] != first[40:]

    def test_repeated_augmentation(self, shards):
        images = [image for batch in create_order(shards(40), repeats=3) for image in batch]
        assert len({(image.step, image.position) for image in images}) == len(images) == 120
        assert [image.data for image in images[::3]] == [image.data for image in images[2::3]]
        assert len({image.data for image in images}) == 40

    # Files that two processes can share out evenly, unevenly, and not at all.
    @pytest.mark.parametrize(
        ("sizes", "shares"), [((40, 40), (40, 40)), ((70, 23), (70, 23)), ((50, 30, 43), (62, 61)), ((81,), (41, 40))]
    )
    def test_processes_share_the_images(self, shards, sample, sizes, shares):
        folder = shards(*sizes)
        epochs = []
        for rank, size in enumerate(shares):
            images = dealt(create_order(folder, last_step=50, rank=rank, world_size=2))
            assert len(images) == 200
            # Each goes through its own share again and again.
            for begin in range(0, 200 - size, size):
                assert sorted(images[begin : begin + size]) == sorted(images[:size])
            epochs += images[:size]
        assert sorted(epochs) == sorted(stored(sample, 0, sum(sizes)))

    def test_processes_fill_each_batch_in_pairs(self, shards):
        folder = shards(40)
        orders = [create_order(folder, batch_size=12, rank=rank, world_size=3) for rank in range(3)]
        assert [len(order) for order in orders] == [15] * 3
        for step, parts in enumerate(zip(*orders, strict=True)):
            assert sorted(image.position for part in parts for image in part) == list(range(12))
            for part in parts:
                assert {image.step for image in part} == {step}
                # Mixup mixes the i-th image from the front with the i-th from the back.
                assert all(a.position + b.position == 11 for a, b in zip(part, reversed(part), strict=True))

    def test_one_file_is_a_dataset(self, shards):
        folder = shards(20)
        assert dealt(create_order(folder / "train-0.parquet")) == dealt(create_order(folder))

    def test_bad_settings(self, shards):
        folder = shards(20)
        with pytest.raises(ValueError, match="a multiple of 6, twice the number of processes, got 8"):
            create_order(folder, world_size=3)
        with pytest.raises(ValueError, match="`shuffle_window` to be at least 1, got 0"):
            create_order(folder, shuffle_window=0)


class TestDatasets:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load_stream(str(tmp_path / "absent"), "train")
        with pytest.raises(ValueError, match=r"Expected parquet files to stream from in .*, got none"):
            load_stream(str(tmp_path), "train")

    def test_classes_need_names(self, tmp_path):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        table = datasets.Dataset.from_dict({"image": [{"bytes": png()}], "label": [0]}, features=features)
        table.to_parquet(str(tmp_path / "train.parquet"))
        with pytest.raises(ValueError, match=r"column 'label' of .* to be a ClassLabel, .*, got Value\('int64'\)"):
            create_order(tmp_path)

    @pytest.mark.parametrize(("sizes", "world_size", "rank"), [((40, 0), 2, 1), ((3,), 4, 3)])
    def test_a_share_without_images(self, shards, sizes, world_size, rank):
        folder = shards(*sizes)
        with pytest.raises(ValueError, match=rf"at least \d images, .* rank {rank} of {world_size} of .*, got 0"):
            next(iter(create_order(folder, world_size=world_size, rank=rank)))

    def test_less_than_a_batch(self, shards):
        folder = shards(7)
        with pytest.raises(ValueError, match=r"at least 8 images, its part of a batch, .*, got 7"):
            next(iter(create_order(folder)))
        with pytest.raises(ValueError, match=r"at least 8 images, its part of a batch, .*, got 7"):
            next(iter(create_order(folder, shuffle_window=2)))

    def test_less_than_a_batch_by_its_own_account(self, shards, monkeypatch):
        stream = load_stream(str(shards(7)), "train")
        stream.info.splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=7)})
        monkeypatch.setattr(stream_module, "load_stream", lambda dataset, split: stream)
        with pytest.raises(ValueError, match=r"at least 8 images, one batch, in .*, got 7"):
            create_order("somebody/images")

    @pytest.mark.parametrize("label", [-1, None])
    def test_labels_outside_the_classes(self, write_examples, label):
        images = [{"bytes": png(), "path": f"{i}.png"} for i in range(8)]
        order = create_order(write_examples(images, [0, 1, 2, 0, 1, label, 0, 1]))
        with pytest.raises(
            ValueError, match=rf"labels in \[0, 3\), got {label} for 5\.png \(image 5 of the share of rank 0"
        ):
            next(iter(order))


class TestResuming:
    @pytest.mark.parametrize(
        ("sizes", "fields"),
        [
            ((50, 30, 43), {}),
            ((50, 30, 43), {"shuffle_window": 16}),
            ((50, 30, 43), {"rank": 1, "world_size": 2}),
            ((50, 33), {"rank": 1, "world_size": 2}),
            ((41,), {"rank": 0, "world_size": 2, "repeats": 3}),
            ((50, 30, 43), {"shuffle_window": 5, "repeats": 3}),
            ((30,), {"shuffle_window": 100}),
        ],
    )
    def test_goes_on_where_it_stopped(self, shards, sizes, fields):
        folder = shards(*sizes)
        order = create_order(folder, last_step=24, **fields)
        batches = list(order)
        resumed = create_order(folder, last_step=24, **fields)
        for step in range(25):
            resumed.load_state_dict(json.loads(json.dumps(order.state_dict(step))))
            assert resumed.first_step == step
            assert len(resumed) == 24 - step
            assert list(itertools.islice(resumed, 5)) == batches[step : step + 5]
            assert resumed.state_dict(step) == order.state_dict(step)

    def test_goes_on_where_training_stopped_though_the_loader_was_ahead(self, shards):
        folder = shards(50, 30, 43)
        images = DecodedImages(lambda image: image.rotate(random.choice((0, 90, 180, 270))), seed=0)

        def load(order, workers):
            return torch.utils.data.DataLoader(
                images, batch_sampler=order, num_workers=workers, collate_fn=images.collate
            )

        order = create_order(folder)
        batches = []
        for step, batch in enumerate(load(order, workers=2), start=1):
            batches.append(batch)
            if step == 5:
                state = order.state_dict(step)
                assert order.state_dict(step + 4)["step"] == 9  # the loader is ahead
        resumed = create_order(folder)
        resumed.load_state_dict(state)
        rest = list(load(resumed, workers=0))
        assert len(rest) == 10
        for expected, batch in zip(batches[5:], rest, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, batch, strict=True))

    def test_states_of_other_steps_are_unknown(self, shards, monkeypatch):
        monkeypatch.setattr(stream_module, "KEPT_STATES", 4)
        order = create_order(shards(40))
        assert order.state_dict(0)["step"] == 0
        next(itertools.islice(order, 9, None))
        assert order.state_dict(7)["step"] == 7
        for step in (6, 11):
            with pytest.raises(ValueError, match=rf"a step in \[7, 10\], whose states are known, got {step}"):
                order.state_dict(step)

    def test_other_settings(self, shards):
        folder = shards(40)
        state = create_order(folder).state_dict(0)
        with pytest.raises(ValueError, match="written with `seed` = 1, got one with 0"):
            create_order(folder, seed=1).load_state_dict(state, allow_other_world=True)
        with pytest.raises(ValueError, match="written with `shuffle_window` = 5, got one with 20"):
            create_order(folder, shuffle_window=5).load_state_dict(state)

    def test_another_number_of_processes(self, shards):
        folder = shards(40)
        two = create_order(folder, rank=1, world_size=2)
        list(two)
        state = two.state_dict(3)  # 12 images, in the first epoch of this rank
        order = create_order(folder, last_step=8)
        with pytest.raises(ValueError, match="written with `world_size` = 1, got one with 2"):
            order.load_state_dict(state)
        order.load_state_dict(state, allow_other_world=True)
        assert [batch[0].step for batch in order] == [3, 4, 5, 6, 7]
        assert dealt(order) == dealt(create_order(folder, last_step=10))[40:]

    def test_leaving_a_stream_ends_the_process(self, tmp_path):
        # Enough that pyarrow still reads ahead.
        data = np.random.default_rng(0).bytes(50_000_000)
        images = [{"bytes": data[i : i + 100_000], "path": None} for i in range(0, len(data), 100_000)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
        table = datasets.Dataset.from_dict({"image": images, "label": [0] * len(images)}, features=features)
        table.to_parquet(str(tmp_path / "train.parquet"), batch_size=100)
        script = (
            "from hf_visual_perceiver.training.stream import StreamOrder\n"
            f"batches = iter(StreamOrder({str(tmp_path)!r}, 'train', 8, 0, 100, shuffle_window=30))\n"
            "print(len(next(batches)))"
        )
        ended = run(sys.executable, "-c", script)
        assert (ended.returncode, ended.stdout) == (0, "8\n"), ended.stderr


class TestDecoding:
    def test_pixels_are_those_of_a_loaded_dataset(self, shards):
        folder = shards(40)
        expected = load_images(str(folder))
        images = DecodedImages(lambda image: image, seed=0)
        (batch,) = create_order(folder, batch_size=40, shuffle_window=1, last_step=1)
        pixels, labels, positions = images.collate([images[key] for key in batch])
        assert pixels.dtype == torch.uint8
        assert torch.equal(pixels, torch.from_numpy(expected.images).permute(0, 3, 1, 2))
        assert labels.tolist() == expected.labels.tolist()
        assert positions.tolist() == list(range(40))

    @pytest.mark.parametrize(("mode", "color"), [("L", 7), ("RGBA", (1, 2, 3, 4)), ("1", 1)])
    def test_all_modes_become_rgb(self, mode, color):
        pixels, label, position = DecodedImages(lambda image: image, seed=0)[encoded(png(mode=mode, color=color))]
        assert pixels.shape == (3, 4, 6)
        assert (label, position) == (1, 0)

    def test_deep_grey_is_scaled(self):
        file = io.BytesIO()
        Image.fromarray(np.array([[0, 100, 200, 255]], np.uint16) * 257).save(file, "png")
        pixels = DecodedImages(lambda image: image, seed=0)[encoded(file.getvalue())][0]
        assert pixels[:, 0].tolist() == [[0, 100, 200, 255]] * 3

    def test_the_transform_follows_from_seed_step_and_position(self):
        def draw(image):
            return Image.new("RGB", (1, 1), tuple(random.randrange(256) for _ in range(3)))

        images, again, other = (DecodedImages(draw, seed) for seed in (0, 0, 1))
        keys = [encoded(png(), step=step, position=position) for step in range(2) for position in range(2)]
        drawn = {tuple(images[key][0].flatten().tolist()) for key in keys}
        assert len(drawn) == 4
        assert torch.equal(images[keys[3]][0], again[keys[3]][0])
        assert not torch.equal(images[keys[3]][0], other[keys[3]][0])

    @pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n broken", png()[:50]])
    def test_an_unreadable_image_is_named(self, data):
        with pytest.raises(ValueError, match=r"Cannot read 3\.png \(image 9\): "):
            DecodedImages(lambda image: image, seed=0)[encoded(data, name="3.png (image 9)")]

    def test_too_many_pixels_are_unreadable(self, monkeypatch):
        monkeypatch.setattr("hf_visual_perceiver.modeling.handler.MAX_PIXELS", 10)
        with pytest.raises(ValueError, match=r"Cannot read the image: Expected .* at most 10 pixels, got 6x4"):
            DecodedImages(lambda image: image, seed=0)[encoded(png())]

    def test_a_fault_of_the_transform_is_not_the_images(self):
        def fail(image):
            raise RuntimeError("no crop")

        with pytest.raises(RuntimeError, match="no crop"):
            DecodedImages(fail, seed=0, unreadable="replace")[encoded(png())]

    def test_the_next_readable_image_stands_in(self, caplog):
        images = DecodedImages(lambda image: image, seed=0, unreadable="replace")
        colors = {1: (10, 0, 0), 3: (30, 0, 0)}
        keys = [
            encoded(png(color=colors[i]) if i in colors else b"", position=i, label=i, name=f"number {i}")
            for i in range(5)
        ]
        with caplog.at_level(logging.WARNING):
            pixels, labels, positions = images.collate([images[key] for key in keys])
        assert [record.getMessage().split(" by ")[0] for record in caplog.records] == [
            f"Replacing number {i}" for i in (0, 2, 4)
        ]
        assert labels.tolist() == [1, 1, 3, 3, 1]
        assert pixels[:, 0, 0, 0].tolist() == [10, 10, 30, 30, 10]
        assert positions.tolist() == [0, 1, 2, 3, 4]

    def test_a_batch_needs_a_readable_image(self):
        images = DecodedImages(lambda image: image, seed=0, unreadable="replace")
        with pytest.raises(ValueError, match="a readable image in each batch, got none among 2"):
            images.collate([images[encoded(b"")], images[encoded(b"")]])

    @pytest.mark.parametrize("broken", [{"bytes": b"broken", "path": "5.png"}, None])
    def test_an_unreadable_image_in_a_stream(self, write_examples, broken):
        colors = [(20 * i, 0, 0) for i in range(8)]
        stored_images = [{"bytes": png(color=color), "path": f"{i}.png"} for i, color in enumerate(colors)]
        folder = write_examples([*stored_images[:5], broken, *stored_images[6:]], [0, 1, 2, 0, 1, 2, 0, 1])

        def load(unreadable):
            images = DecodedImages(lambda image: image, seed=0, unreadable=unreadable)
            order = create_order(folder, shuffle_window=1, last_step=1)
            (batch,) = torch.utils.data.DataLoader(images, batch_sampler=order, collate_fn=images.collate)
            return batch

        with pytest.raises(ValueError, match=r"Cannot read .*image 5 of the share of rank 0"):
            load("error")
        pixels, labels, _ = load("replace")
        assert pixels[:, 0, 0, 0].tolist() == [0, 20, 40, 60, 80, 120, 120, 140]
        assert labels.tolist() == [0, 1, 2, 0, 1, 0, 0, 1]

    def test_bad_settings(self):
        with pytest.raises(ValueError, match="`unreadable` to be error or replace, got 'skip'"):
            DecodedImages(lambda image: image, seed=0, unreadable="skip")
