"""Permuted pixels: one permutation for all images, read by the training code as any dataset; the full network is trained."""

import numpy as np
import permuted_pixels
import pytest
from permuted_pixels import NETWORKS, main, permute_pixels, recipe_of, write_permuted

from hf_visual_perceiver.data.images import load_images
from hf_visual_perceiver.modeling import Budget
from hf_visual_perceiver.training.factory import create_model, ladder_of
from hf_visual_perceiver.training.schedules import create_schedule


def test_every_image_has_the_same_permutation():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    images[1] = 255 - images[0]
    moved = permute_pixels(images, seed=1)
    assert np.array_equal(moved[1], 255 - moved[0])
    assert not np.array_equal(moved, images)
    assert not np.array_equal(moved, permute_pixels(images, seed=2))
    pixels = [sorted(map(tuple, image.reshape(-1, 3).tolist())) for image in (images[2], moved[2])]
    assert pixels[0] == pixels[1]  # whole pixels move, and none is lost


def test_the_training_code_reads_them(cifar10, tmp_path):
    data = load_images(cifar10, "train").subset(slice(0, 20))
    write_permuted(data, tmp_path / "permuted" / "train.parquet", seed=3)
    read = load_images(str(tmp_path / "permuted"), "train")
    assert np.array_equal(read.images, permute_pixels(data.images, seed=3))
    assert read.labels.tolist() == data.labels.tolist()
    assert read.label_names == data.label_names
    data.images = None
    with pytest.raises(ValueError, match="images of one size that fit in memory"):
        write_permuted(data, tmp_path / "other" / "train.parquet", seed=3)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", NETWORKS)
def test_full_networks_are_trained(name):
    recipe = recipe_of(name, steps=10, seed=0)
    network = create_model(recipe, [f"class {i}" for i in range(10)])
    schedule = create_schedule(recipe.budgets, ladder_of(network), 0, 10, None)
    assert [p.budget for p in schedule(0)] == [Budget()]
    assert recipe.augmentation.random_crop_padding == recipe.augmentation.horizontal_flip == 0


def test_runs_side_by_side(cifar10, tmp_path, capsys, monkeypatch):
    only = ["Perceiver, learned positions"]
    options = {"dataset": cifar10, "output": tmp_path, "steps": 2, "seed": 0, "validation": 50, "max_minutes": None}
    main(only=only, **options)
    *table, _ = capsys.readouterr().out.strip().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {name}" for name in only]
    for line in table[2:]:
        _, macs, plain, moved, difference = line.strip("| ").split(" | ")
        assert float(macs) > 1
        assert float(difference) == pytest.approx(float(moved) - float(plain), abs=0.011)
    # Again, runs are taken as they are.
    monkeypatch.setattr(permuted_pixels, "write_permuted", None)
    main(only=only, **options)
    assert capsys.readouterr().out.strip().splitlines()[:-1] == table
    with pytest.raises(ValueError, match=r"Expected networks among Perceiver, Fourier.*, got nothing like it"):
        main(only=["nothing like it"], **options)
