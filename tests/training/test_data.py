"""Loading, order of batches, and cropping."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_visual_perceiver.data.images import (
    BatchOrder,
    ImageDataset,
    ResizedImages,
    _find_columns,
    load_images,
    load_table,
    pixels_of_size,
    resize_transform,
)
from hf_visual_perceiver.training.batches import LoadedBatches, ResidentBatches, fits_in_memory
from hf_visual_perceiver.training.stream import load_stream


@pytest.fixture
def imagefolder(tmp_path):
    """Two classes of 12x10 images."""
    for i in range(6):
        path = tmp_path / "data" / "train" / ("cat" if i % 2 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((10, 12, 3), 40 * i, dtype=np.uint8)).save(path)
    return tmp_path / "data"


class TestLoading:
    def test_the_sample(self):
        from hf_visual_perceiver.inference.loading import default_dataset

        for split, n in (("test", 1000), ("train", 2000)):
            data = load_images(default_dataset(), split)
            assert data.images.shape == (n, 32, 32, 3)
            assert data.images.dtype == np.uint8
            assert np.bincount(data.labels).tolist() == [n // 10] * 10
            assert data.label_names[:4] == ["airplane", "automobile", "bird", "cat"]

    def test_imagefolder(self, imagefolder):
        data = load_images(str(imagefolder), "train")
        assert data.images.shape == (6, 10, 12, 3)
        assert data.label_names == ["cat", "dog"]
        assert sorted(data.images[data.labels == 0].max((1, 2, 3)).tolist()) == [40, 120, 200]

    def test_images_of_several_sizes_stay_encoded(self, imagefolder):
        Image.new("L", (5, 7), 9).save(imagefolder / "train" / "cat" / "odd.png")
        data = load_images(str(imagefolder), "train")
        assert isinstance(data.images, datasets.Dataset)
        assert len(data) == 7
        assert pixels_of_size(data, range(0, 7), (8, 8)).shape == (7, 8, 8, 3)

    def test_a_dataset_too_large_for_memory_stays_encoded(self, imagefolder):
        data = load_images(str(imagefolder), "train", cache_gib=1e-9)
        assert isinstance(data.images, datasets.Dataset)
        assert data.image(0).size == (12, 10)
        assert len(data.subset(slice(4, None))) == 2

    def test_unreadable_images_are_named(self, imagefolder):
        (imagefolder / "train" / "cat" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
        with pytest.raises(ValueError, match=r"Cannot read image \d of .*3\.png"):
            load_images(str(imagefolder), "train")

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"img": "image"}, "a label column in .*, got columns img"),
            ({"label": "label"}, "an image column in .*, got columns label"),
            ({"img": "image", "label": "text"}, "integers in column 'label' of .*, got 'cat'"),
            ({"img": "image", "label": "real"}, "integers in column 'label' of .*, got 0.75"),
            ({"img": "image", "label": "missing"}, "integers in column 'label' of .*, got None"),
            ({"img": "nothing", "label": "label"}, "Cannot read image 0 of"),
            ({"img": "image", "label": "negative"}, r"labels in \[0, 2\) in .*, got -1 to 1"),
        ],
    )
    def test_bad_columns(self, tmp_path, columns, message):
        values = {
            "image": [Image.new("RGB", (4, 4))] * 3,
            "label": [0, 1, 1],
            "negative": [0, -1, 1],
            "text": ["cat", "dog", "cat"],
            "real": [0.75, 1.0, 1.5],
            "missing": [0, None, 1],
            "nothing": [None] * 3,
        }
        kinds = {"text": datasets.Value("string"), "real": datasets.Value("float32")}
        kinds |= {"image": datasets.Image(), "nothing": datasets.Image()}
        features = {name: kinds.get(kind, datasets.Value("int64")) for name, kind in columns.items()}
        table = datasets.Dataset.from_dict(
            {name: values[kind] for name, kind in columns.items()}, features=datasets.Features(features)
        )
        table.to_parquet(str(tmp_path / "train.parquet"))
        with pytest.raises(ValueError, match=message):
            load_images(str(tmp_path), "train")

    def test_cifar100s_columns(self, tmp_path):
        kinds = {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["cat", "dog"])}
        kinds["coarse_label"] = datasets.ClassLabel(names=["animal"])
        rows = {"img": [Image.new("RGB", (4, 4))] * 3, "fine_label": [0, 1, 1], "coarse_label": [0] * 3}
        datasets.Dataset.from_dict(rows, datasets.Features(kinds)).to_parquet(str(tmp_path / "train.parquet"))
        data = load_images(str(tmp_path), "train")
        assert (data.label_names, data.labels.tolist()) == (["cat", "dog"], [0, 1, 1])

    def test_photos_are_upright(self, tmp_path):
        photo = Image.new("RGB", (8, 4))
        photo.paste("white", (0, 0, 4, 4))  # its left half
        exif = photo.getexif()
        exif[0x0112] = 6  # turned by a quarter: left is up
        for name in ("cat", "dog"):
            (tmp_path / "train" / name).mkdir(parents=True)
            photo.save(tmp_path / "train" / name / "0.jpg", quality=100, exif=exif)
        image = np.asarray(load_images(str(tmp_path), "train").image(0))
        assert image.shape == (8, 4, 3)
        assert image[:3].min() > 200
        assert image[-3:].max() < 50

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load_images(str(tmp_path / "absent"))
        (tmp_path / "other.parquet").write_bytes(b"")
        with pytest.raises(ValueError, match=r"parquet files named train\.parquet or train-0.* got other\.parquet"):
            load_images(str(tmp_path), "train")
        (tmp_path / "flat" / "cat").mkdir(parents=True)
        with pytest.raises(ValueError, match=r"Expected a folder test in .*flat"):
            load_images(str(tmp_path / "flat"), "test")

    @pytest.mark.parametrize("cache_gib", [8.0, 0.0])
    def test_deep_grey_is_scaled(self, tmp_path, cache_gib):
        grey = np.array([[0, 100, 200, 255]], np.uint16)
        for name in ("a", "b"):
            (tmp_path / "train" / name).mkdir(parents=True)
            Image.fromarray(grey * 257).save(tmp_path / "train" / name / "1.png")
        image = load_images(str(tmp_path), "train", cache_gib).image(0)
        assert np.asarray(image)[0, :, 0].tolist() == grey[0].tolist()
        assert image.mode == "RGB"

    def test_large_jpegs_are_reduced(self, tmp_path, monkeypatch):
        monkeypatch.setattr("hf_visual_perceiver.modeling.handler.MAX_PIXELS", 96)
        for name in ("a", "b"):
            (tmp_path / "train" / name).mkdir(parents=True)
            Image.new("RGB", (16, 12)).save(tmp_path / "train" / name / "1.jpg")
        assert load_images(str(tmp_path), "train").image(0).size == (8, 6)


class TestColumns:
    """Choice of the image and label columns."""

    def columns(self, images, labels):
        features = {name: datasets.Image() for name in images}
        features |= {name: datasets.ClassLabel(names=["a", "b"]) for name in labels}
        return _find_columns(datasets.Dataset.from_dict({n: [] for n in features}, datasets.Features(features)), "it")

    @pytest.mark.parametrize(
        ("images", "labels", "expected"),
        [
            (["mask", "image"], ["label"], ("image", "label")),
            (["mask", "img", "depth"], ["label"], ("img", "label")),
            (["mask"], ["kind"], ("mask", "kind")),
            (["image"], ["coarse_label", "fine_label"], ("image", "fine_label")),
        ],
    )
    def test_usual_names_come_first(self, images, labels, expected):
        assert self.columns(images, labels) == expected

    def test_a_choice_is_not_made_for_the_user(self):
        with pytest.raises(ValueError, match="one image column in it, or one called image or img, got mask, photo"):
            self.columns(["mask", "photo"], ["label"])
        with pytest.raises(ValueError, match=r"one label column in it, or one called .*, got kind, species"):
            self.columns(["image"], ["kind", "species"])


def fill(folder, *classes, count=3, first=0):
    """Folders of images that are all different."""
    for j, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4), (first + 20 * j + i,) * 3).save(folder / name / f"{i}.png")


def shades(data):
    return sorted(data.images[:, 0, 0, 0].tolist())


class TestSplits:
    """A split contains the files under its name, and no others."""

    @pytest.mark.parametrize("parent", ["plain", "my_test_data", "train [v1]"])
    def test_split_words_in_other_names_mean_nothing(self, tmp_path, parent):
        for first, split in ((0, "train"), (100, "test")):
            fill(tmp_path / parent / split, "test_tube", "train_station", first=first)
            fill(tmp_path / parent / "images" / split, "val_thorens", "test_tube", first=first)
        for folder in (tmp_path / parent, tmp_path / parent / "images"):
            train, test = (load_images(str(folder), split) for split in ("train", "test"))
            assert shades(train) == [0, 1, 2, 20, 21, 22]
            assert shades(test) == [100, 101, 102, 120, 121, 122]
            assert train.label_names == sorted(p.name for p in (folder / "train").iterdir())

    def test_without_folders_of_splits_all_images_are_train(self, tmp_path):
        fill(tmp_path / "my_test_data", "test_tube", "train_station", "cup")
        data = load_images(str(tmp_path / "my_test_data"), "train")
        assert (len(data), data.label_names) == (9, ["cup", "test_tube", "train_station"])
        with pytest.raises(ValueError, match=r"Expected a folder test in .*my_test_data"):
            load_images(str(tmp_path / "my_test_data"), "test")

    def test_other_names_of_a_split(self, tmp_path):
        fill(tmp_path / "train", "a", "b")
        fill(tmp_path / "val", "a", "b", first=100)
        assert shades(load_images(str(tmp_path), "validation"))[0] == 100
        with pytest.raises(ValueError, match=r"Expected a folder test in .*, got train, val"):
            load_images(str(tmp_path), "test")
        fill(tmp_path / "dev", "a", "b", first=200)
        with pytest.raises(ValueError, match=r"Expected one folder validation in .*, got dev, val"):
            load_images(str(tmp_path), "validation")

    def test_in_a_folder_further_down(self, tmp_path):
        for first, split in ((0, "train"), (100, "test")):
            fill(tmp_path / "archive" / split, "test_tube", "train_station", first=first)
        assert shades(load_images(str(tmp_path), "test")) == [100, 101, 102, 120, 121, 122]

    @pytest.mark.parametrize("classes", [["cat"], []])
    def test_one_class_is_not_enough(self, tmp_path, classes):
        fill(tmp_path / "train", *classes)
        Path(tmp_path, "train").mkdir(exist_ok=True)
        if not classes:
            Image.new("RGB", (4, 4)).save(tmp_path / "train" / "1.png")
        got = "cat" if classes else "none"
        with pytest.raises(ValueError, match=rf"at least two folders of .*train, one for each class, got {got}"):
            load_images(str(tmp_path), "train")

    def test_classes_lie_side_by_side(self, tmp_path):
        fill(tmp_path / "train", "cat", "dog/puppy")
        with pytest.raises(ValueError, match=r"two folders of .*train, one for each class, got cat, dog/puppy"):
            load_images(str(tmp_path), "train")

    def test_labels_in_a_metadata_file(self, tmp_path):
        for split in ("train", "test"):
            fill(tmp_path / split, "a", "b")
            lines = [json.dumps({"file_name": f"{c}/{i}.png", "label": i}) for c in "ab" for i in range(3)]
            (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
        assert load_images(str(tmp_path), "test").labels.tolist() == [0, 1, 2, 0, 1, 2]

    def write(self, path, count):
        path.parent.mkdir(parents=True, exist_ok=True)
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
        values = {"image": [Image.new("RGB", (4, 4))] * count, "label": [0] * count}
        datasets.Dataset.from_dict(values, features=features).to_parquet(str(path))

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize(
        ("test", "other"),
        [
            ("data/test-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"),  # a downloaded Hub dataset
            ("plain_text/test-00000-of-00001.parquet", "plain_text/train-00000-of-00001.parquet"),  # another
            ("test/0000.parquet", "train/0000.parquet"),
            ("test.parquet", "testmini.parquet"),
            ("test-0.parquet", "test_hard-0.parquet"),
        ],
    )
    def test_parquet(self, tmp_path, test, other, streaming):
        self.write(tmp_path / "my_train_data" / test, 5)
        self.write(tmp_path / "my_train_data" / other, 3)
        (tmp_path / "my_train_data" / "README.md").write_text("---\nlicense: mit\n---\n")
        load = load_stream if streaming else load_table
        assert len(list(load(str(tmp_path / "my_train_data"), "test"))) == 5

    def test_streams_are_whole_splits_of_parquet_files(self, tmp_path):
        self.write(tmp_path / "test.parquet", 5)
        with pytest.raises(ValueError, match=r"Expected a whole split to stream, got 'test\[:2\]'"):
            load_stream(str(tmp_path), "test[:2]")
        fill(tmp_path / "images" / "train", "a", "b")
        with pytest.raises(ValueError, match=r"Expected parquet files to stream from in .*images.train, got none"):
            load_stream(str(tmp_path / "images"), "train")

    def test_slices(self, tmp_path):
        self.write(tmp_path / "a" / "test.parquet", 5)
        fill(tmp_path / "b" / "test", "a", "b")
        for dataset in (tmp_path / "a", tmp_path / "a" / "test.parquet"):
            assert len(load_images(str(dataset), "test[1:4]")) == 3
            assert len(load_images(str(dataset), "test[:200]")) == 5
        assert shades(load_images(str(tmp_path / "b"), "test[-4:]")) == [2, 20, 21, 22]
        with pytest.raises(ValueError, match=r"Expected images in test\[9:\] of .*b, which has 6 in test"):
            load_images(str(tmp_path / "b"), "test[9:]")
        with pytest.raises(ValueError, match='Expected a split such as "test"'):
            load_images(str(tmp_path / "b"), "test[5]")


class TestSplittingOff:
    """Held-out validation images."""

    @pytest.mark.parametrize("decoded", [True, False])
    @pytest.mark.parametrize(
        ("labels", "held_out"),
        [
            ([0, 2, 1, 0, 1, 2], [4, 5]),  # in no order: the last
            ([0, 0, 0, 1, 1, 1], [2, 5]),  # by class, as an imagefolder: of each
            ([0, 0, 0, 0, 2, 2], [2, 5]),
        ],
    )
    def test_the_last_or_some_of_each_class(self, labels, held_out, decoded):
        images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1).repeat(3, axis=3)
        if not decoded:
            pictures = [Image.fromarray(image) for image in images]
            images = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features(image=datasets.Image()))
        data = ImageDataset(images, np.array(labels), ["a", "b", "c"])
        rest, kept = data.split_off(2)
        assert [kept.image(i).getpixel((0, 0))[0] for i in range(2)] == held_out
        assert kept.labels.tolist() == [labels[i] for i in held_out]
        others = [i for i in range(6) if i not in held_out]
        assert [rest.image(i).getpixel((0, 0))[0] for i in range(4)] == others
        assert rest.labels.tolist() == [labels[i] for i in others]

    def test_none(self):
        data = ImageDataset(np.zeros((3, 1, 1, 3), np.uint8), np.array([0, 0, 1]), ["a", "b"])
        assert [len(part) for part in data.split_off(0)] == [3, 0]


class TestBatchOrder:
    def order(self, **fields):
        return BatchOrder(**{"num_images": 40, "batch_size": 12, "seed": 0, "last_step": 7, **fields})

    def test_an_epoch_uses_each_image_once_at_most(self):
        batches = list(self.order(last_step=3))
        indices = [index for batch in batches for _, _, index in batch]
        assert len(indices) == len(set(indices)) == 36

    def test_resuming_goes_on_where_it_stopped(self):
        assert list(self.order(first_step=4)) == list(self.order())[4:]

    def test_processes_share_what_one_would_do(self):
        whole = list(self.order())
        parts = [list(self.order(rank=rank, world_size=3)) for rank in range(3)]
        for step, batch in enumerate(whole):
            shares = [part[step] for part in parts]
            assert sorted(key for share in shares for key in share) == sorted(batch)
            # Mixup pairs the i-th image from the front with the i-th from the back.
            pairs = {frozenset(p) for p in zip(batch, reversed(batch), strict=True)}
            for share in shares:
                assert {frozenset(p) for p in zip(share, reversed(share), strict=True)} <= pairs

    def test_repeated_augmentation(self):
        batch = next(iter(self.order(repeats=3)))
        positions, _, indices = zip(*batch, strict=True)
        assert len(set(indices)) == 4
        assert len(set(positions)) == 12

    def test_bad_sizes(self):
        with pytest.raises(ValueError, match="a multiple of 8, twice the number of processes, got 12"):
            self.order(world_size=4)
        with pytest.raises(ValueError, match="at least 12 images, one batch, got 5"):
            self.order(num_images=5)


class TestResizedImages:
    def images(self, seed=0, random_crop=True):
        pixels = np.random.default_rng(0).integers(0, 256, (4, 40, 48, 3), dtype=np.uint8)
        data = ImageDataset(pixels, np.arange(4), ["a", "b", "c", "d"])
        return ResizedImages(data, resize_transform((32, 32), random_crop=random_crop), seed)

    def test_crops_follow_from_seed_epoch_and_position(self):
        a, b = self.images(), self.images()
        assert torch.equal(a[(5, 1, 2)][0], b[(5, 1, 2)][0])
        assert not torch.equal(a[(5, 1, 2)][0], a[(5, 2, 2)][0])
        assert not torch.equal(a[(5, 1, 2)][0], self.images(seed=1)[(5, 1, 2)][0])

    def test_without_crops_the_whole_image_is_resized(self):
        dataset = self.images(random_crop=False)
        image, label = dataset[(0, 0, 2)]
        expected = pixels_of_size(dataset.data, range(2, 3), (32, 32))[0]
        assert torch.equal(image, torch.from_numpy(expected).permute(2, 0, 1))
        assert (image.dtype, label) == (torch.uint8, 2)


class TestBatches:
    """Device memory and worker processes give the same batches."""

    @pytest.mark.parametrize("workers", [0, 2])
    def test_loaded_batches_equal_resident_ones(self, workers):
        pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
        data = ImageDataset(pixels, np.arange(40) % 4, ["a", "b", "c", "d"])
        order, device = BatchOrder(40, 12, seed=3, last_step=5), torch.device("cpu")
        assert fits_in_memory(data, (8, 8))
        assert not fits_in_memory(data, (8, 9))
        resident = list(ResidentBatches(data, order, device))
        loaded = list(LoadedBatches(ResizedImages(data, resize_transform((8, 8)), 3), order, device, workers))
        assert len(resident) == len(loaded) == 5
        for (images, labels, *_), (others, other_labels, *_) in zip(resident, loaded, strict=True):
            assert images.shape == (12, 3, 8, 8)
            assert images.dtype == torch.uint8
            assert torch.equal(images, others)
            assert torch.equal(labels, other_labels)
        keys = next(iter(order))
        assert torch.equal(resident[0][0][4].permute(1, 2, 0), torch.from_numpy(pixels[keys[4][2]]))
