"""Nearest-neighbour retrieval with the model's features."""

import json
import shutil

import numpy as np
import pytest
import torch
from support import papers_form, run, small_config, unwrapped
from torch.nn import functional as F
from transformers import AutoModel
from typer.testing import CliRunner

from hf_visual_perceiver.cli.main import app
from hf_visual_perceiver.data.images import ImageDataset, load_images, normalise
from hf_visual_perceiver.data.parts import load_splits
from hf_visual_perceiver.data.splits import parse_split
from hf_visual_perceiver.evaluation.retrieval import (
    compute_features,
    knn_classify,
    measure_retrieval,
    retrieval_budgets,
)
from hf_visual_perceiver.inference.loading import default_dataset
from hf_visual_perceiver.modeling import Budget, VisualPerceiverModel


@pytest.fixture(scope="module")
def sample():
    return load_images(default_dataset(), "test")


@pytest.fixture
def small():
    return VisualPerceiverModel(small_config()).eval()


def noise(count, classes=("a", "b"), size=16, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return ImageDataset(images, rng.integers(0, len(classes), count), list(classes))


class TestVotes:
    def test_every_pair_by_hand(self):
        queried, gallery = torch.randn(30, 8), torch.randn(50, 8)
        labels = torch.randint(0, 4, (50,))
        found = knn_classify(queried, gallery, labels, 4, neighbours=7, temperature=0.2)
        for q, answer in zip(queried, found, strict=True):
            cosines = F.cosine_similarity(q[None], gallery)
            votes = [0.0] * 4
            for i in cosines.argsort(descending=True)[:7].tolist():
                votes[labels[i]] += float((cosines[i] / 0.2).exp())
            assert votes.index(max(votes)) == answer

    def test_lengths_play_no_part(self):
        queried, gallery, labels = torch.randn(40, 8), torch.randn(60, 8), torch.randint(0, 3, (60,))
        scaled = knn_classify(queried * torch.rand(40, 1) * 9, gallery * torch.rand(60, 1) * 9, labels, 3)
        assert torch.equal(scaled, knn_classify(queried, gallery, labels, 3))

    def test_the_temperature_weighs_the_nearest_against_the_many(self):
        gallery = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
        labels, queried = torch.tensor([1, 0, 0]), torch.tensor([[1.0, 0.0]])
        assert knn_classify(queried, gallery, labels, 2, 3, temperature=0.01).item() == 1
        assert knn_classify(queried, gallery, labels, 2, 3, temperature=1e-4).item() == 1  # exp(10,000)
        assert knn_classify(queried, gallery, labels, 2, 3, temperature=10).item() == 0
        assert knn_classify(queried, gallery, labels, 2, 1, temperature=10).item() == 1

    def test_more_images_than_a_piece(self):
        queried, gallery, labels = torch.randn(2500, 4), torch.randn(30, 4), torch.randint(0, 3, (30,))
        whole = knn_classify(queried, gallery, labels, 3, 5)
        assert whole.shape == (2500,)
        assert torch.equal(whole[2000:], knn_classify(queried[2000:], gallery, labels, 3, 5))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"neighbours": 0}, r"neighbours in \[1, 6\]"),
            ({"neighbours": 7}, r"neighbours in \[1, 6\].* got 7"),
            ({"neighbours": 2, "temperature": 0}, "positive temperature, got 0"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            knn_classify(torch.randn(2, 3), torch.randn(6, 3), torch.zeros(6, dtype=torch.long), 2, **arguments)


class TestFeatures:
    @torch.no_grad()
    def test_they_are_automodels(self, trained, sample):
        data, points = sample.subset(slice(0, 12)), [Budget(num_active_queries=4), Budget(dqs_threshold=0.8), Budget()]
        cfg = trained.config.timm_pretrained_cfg
        x = normalise(data.images, cfg["mean"], cfg["std"])
        auto = AutoModel.from_pretrained(papers_form()).eval()
        for feature in ("pooled", "mean"):
            found, counts, _ = compute_features(trained.visual_perceiver, data, points, feature, batch_size=5)
            for point in points:
                output = auto(x, **point.kwargs)
                expected = output.pooler_output
                if feature == "mean":  # of the tokens that are there
                    expected = torch.stack(
                        [tokens[tokens.ne(0).any(-1)].mean(0) for tokens in output.last_hidden_state]
                    )
                torch.testing.assert_close(found[point], expected, rtol=0, atol=1e-5)
                assert counts[point].tolist() == output.active_queries.sum(1).tolist()

    def test_a_checkpoints_own_point_plays_no_part(self, small):
        data, point = noise(5), Budget(num_active_queries=12)
        before, _, _ = compute_features(small, data, [point])
        small.config.dqs_threshold, small.config.num_active_queries = 0.0, 3
        after, counts, _ = compute_features(small, data, [point])
        assert torch.equal(before[point], after[point])
        assert counts[point].tolist() == [12] * 5
        assert small.config.dqs_threshold == 0.0

    def test_points(self):
        expected = [Budget(num_active_queries=4), Budget(num_active_queries=16), Budget()]
        assert retrieval_budgets(small_config(num_queries=64)) == expected

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"feature": "cls"}, "feature among pooled, mean, got 'cls'"),
            ({"budgets": [Budget(num_active_queries=13)]}, r"integer in \[1, 12\], got 13"),
            ({"neighbours": 41}, r"neighbours in \[1, 40\]"),
        ],
    )
    def test_bad_arguments(self, small, arguments, message):
        with pytest.raises(ValueError, match=message):
            measure_retrieval(small, noise(40), noise(4), progress=False, **arguments)

    def test_other_classes_in_the_gallery(self, small):
        with pytest.raises(ValueError, match=r"same classes .* got a, b and a, c"):
            measure_retrieval(small, noise(40), noise(4, ("a", "c")), progress=False)


class TestMeasurement:
    def test_an_image_finds_itself(self, small):
        data = noise(30)
        result = measure_retrieval(small, data, data, [Budget(num_active_queries=5)], neighbours=1, progress=False)
        assert result.rows[0].accuracy == 1

    def test_noise_finds_nothing(self, small):
        rows = measure_retrieval(small, noise(300), noise(300, seed=1), progress=False).rows
        assert all(abs(row.accuracy - 0.5) < 5 * row.standard_error for row in rows)

    def test_photos_find_their_like(self, trained, sample):
        gallery = load_images(default_dataset(), "train").subset(slice(0, 600))
        points = [Budget(num_active_queries=4), Budget()]
        few, full = measure_retrieval(
            trained.visual_perceiver, gallery, sample.subset(slice(0, 200)), points, progress=False
        ).rows
        assert 0.3 < few.accuracy < full.accuracy  # 0.1 by chance
        assert full.accuracy == full.full_gallery_accuracy
        assert few.macs < 0.1 * full.macs
        # The spaces of all budgets are one: a gallery of another budget serves as well.
        assert abs(few.full_gallery_accuracy - few.accuracy) < 0.1


class TestSplits:
    def test_names_and_parts(self):
        assert parse_split("train[10:20]") == ("train", slice(10, 20))
        assert parse_split("train[:-5]") == ("train", slice(None, -5))

    @pytest.mark.parametrize("split", ["", "train[", "train[5]", "train[:10%]", "train[1:9:2]", "train[0:1]x"])
    def test_no_splits(self, split):
        with pytest.raises(ValueError, match='Expected a split such as "test"'):
            parse_split(split)

    def test_a_part_is_the_slice(self, sample):
        part = load_images(default_dataset(), "test[-30:]")
        assert np.array_equal(part.images, sample.images[-30:])
        assert np.array_equal(part.labels, sample.labels[-30:])

    def test_a_part_without_images(self):
        with pytest.raises(ValueError, match=r"Expected images in test\[5000:\] of .*, which has 1,000 in test"):
            load_images(default_dataset(), "test[5000:]")

    def test_apart(self):
        first, last = load_splits(default_dataset(), "test[:900]", "test[-100:]", apart=True)
        assert (len(first), len(last)) == (900, 100)
        load_splits(default_dataset(), "train", "test", apart=True)
        with pytest.raises(ValueError, match=r"got test\[:901\] and test\[-100:\], which share 1\."):
            load_splits(default_dataset(), "test[:901]", "test[-100:]", apart=True)


class TestCommand:
    def test_the_table_is_the_file(self, tmp_path):
        options = [
            "--gallery-split",
            "train[:300]",
            "--split",
            "test[-100:]",
            "--budget",
            "K=4",
            "--budget",
            "t=0.8",
        ]
        result = run("visual-perceiver", "knn", *options, "--json", tmp_path / "r.json", env={"OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
        written = json.loads((tmp_path / "r.json").read_text())
        assert [r["budget"] for r in written["rows"]] == [{"num_active_queries": 4}, {"dqs_threshold": 0.8}]
        for row in written["rows"]:
            assert f"{100 * row['accuracy']:.2f} ± {100 * row['standard_error']:.2f}" in result.stdout
            assert f"{100 * row['full_gallery_accuracy']:.2f} ±" in result.stdout
        assert written["conditions"]["gallery_images"] == 300
        assert written["conditions"]["queried"] == "test[-100:]"
        assert "queried test[-100:]" in unwrapped(result.stdout)

    def test_classes_that_the_model_does_not_have(self, tmp_path, sample):
        for split in ("train", "test"):
            for name in ("animal", "machine"):
                folder = tmp_path / "pictures" / split / name
                folder.mkdir(parents=True)
                for i in range(4):
                    sample.image(i + 4 * (split == "train")).save(folder / f"{i}.png")
        arguments = ["knn", "--dataset", str(tmp_path / "pictures"), "--neighbours", "3", "--budget", "K=4"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        shutil.rmtree(tmp_path / "pictures")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--budget", "K=33"], "integer in [1, 32], got 33"),
            (["--feature", "cls"], "feature among pooled, mean"),
            (["--neighbours", 0], "neighbours in [1, 2000]"),
            (["--temperature", 0], "positive temperature"),
            (["--split", "train[:10]"], "which share 10"),
            (["--split", "test[10%:]"], "Expected a split such as"),
            (["--json", "no/such/folder.json"], "file name in an existing folder"),
            (["--model", "no-such-folder/x/y"], "folder or Hub id"),
        ],
    )
    def test_bad_options(self, options, message):
        result = CliRunner().invoke(app, ["knn", *map(str, options)])
        assert isinstance(result.exception, ValueError)
        assert message in str(result.exception)
