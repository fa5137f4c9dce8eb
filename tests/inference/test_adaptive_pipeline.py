"""The pipeline task `adaptive-image-classification`: budgets as arguments, `queries_used` in the answers."""

import base64
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support import REPOSITORY, papers_form, small_config
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

import hf_visual_perceiver  # registers the task
from hf_visual_perceiver.inference.pipeline import TASK, budget_for_macs
from hf_visual_perceiver.modeling import VisualPerceiverConfig, count_macs


@pytest.fixture(scope="module")
def classifier():
    return pipeline(TASK, model=papers_form())


@pytest.fixture(scope="module")
def picture():
    noise = torch.randint(0, 256, (40, 30, 3), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def queries_for_macs(config, share, knobs=None):
    return config.resolve(**budget_for_macs(config, share, knobs).kwargs)["num_active_queries"]


def used(answers):
    (number,) = {answer["queries_used"] for answer in answers}
    return number


def test_the_task_is_registered(classifier):
    assert type(classifier) is hf_visual_perceiver.AdaptiveImageClassificationPipeline


def test_without_arguments_it_is_the_stock_pipeline(classifier, picture):
    stock = pipeline("image-classification", model=papers_form(), trust_remote_code=True)
    for options in ({}, {"top_k": 2}, {"function_to_apply": "none"}):
        answers = classifier(picture, **options)
        assert used(answers) == 64
        assert [(a["label"], a["score"]) for a in answers] == [
            (a["label"], pytest.approx(a["score"], abs=1e-5)) for a in stock(picture, **options)
        ]


def test_deep_grey_is_scaled_wherever_it_comes_from(classifier, tmp_path, monkeypatch):
    cat = Image.open(REPOSITORY / "docs" / "cat.png").convert("L")
    deep = Image.fromarray(np.asarray(cat).astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png")
    data = (tmp_path / "deep.png").read_bytes()
    session = SimpleNamespace(get=lambda *_, **__: SimpleNamespace(content=data))
    monkeypatch.setattr("hf_visual_perceiver.inference.pipeline.get_session", lambda: session)
    for source in (deep, str(tmp_path / "deep.png"), base64.b64encode(data).decode(), "https://localhost/deep.png"):
        assert classifier(source) == classifier(cat)


@pytest.mark.parametrize(
    "point", [{"num_active_queries": 5}, {"dqs_threshold": 0.7}, {"num_active_queries": 30, "dqs_threshold": 0.8}]
)
def test_budgets_reach_the_model(classifier, picture, trained, point):
    answers = classifier(picture, top_k=1, **point)
    pixels = classifier.image_processor(images=picture, return_tensors="pt")["pixel_values"]
    output = trained(pixels, **point)
    assert used(answers) == output.active_queries.sum().item()
    assert answers[0]["score"] == pytest.approx(output.logits.softmax(-1).max().item(), abs=1e-5)


def test_several_images_in_batches(classifier, picture):
    other = Image.new("RGB", (32, 32), (10, 200, 30))
    one_by_one = [classifier(image, dqs_threshold=0.8, top_k=3) for image in (picture, other, picture)]
    together = classifier([picture, other, picture], dqs_threshold=0.8, top_k=3, batch_size=2)
    assert [[a["label"] for a in answers] for answers in together] == [
        [a["label"] for a in answers] for answers in one_by_one
    ]
    assert [used(answers) for answers in together] == [used(answers) for answers in one_by_one]
    assert len({used(answers) for answers in together}) > 1


def test_a_budget_of_the_pipeline_holds_for_its_calls(picture):
    model = AutoModelForImageClassification.from_pretrained(papers_form())
    processor = AutoImageProcessor.from_pretrained(papers_form())
    fixed = pipeline(TASK, model=model, image_processor=processor, num_active_queries=4, top_k=1)
    assert used(fixed(picture)) == 4
    assert used(fixed(picture, num_active_queries=6)) == 6
    assert used(fixed(picture)) == 4


def test_every_form_of_an_image(classifier, picture, tmp_path):
    picture.save(tmp_path / "a picture.png")
    file = io.BytesIO()
    picture.save(file, "png")
    text = base64.b64encode(file.getvalue()).decode()
    expected = classifier(picture)
    for form in (str(tmp_path / "a picture.png"), text, f"data:image/png;base64,{text}"):
        assert classifier(form) == expected


@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.5, 0.9, 1.0, 1])
@pytest.mark.parametrize("selects", [False, True])
def test_the_target_is_met_as_closely_as_can_be(fraction, selects):
    config = VisualPerceiverConfig(num_labels=10)
    K = queries_for_macs(config, fraction, {"dqs_threshold": 0.8} if selects else {})
    full = count_macs(config, 64)
    assert count_macs(config, K, K if selects else None) <= fraction * full
    assert K == 64 or count_macs(config, K + 1, K + 1 if selects else None) > fraction * full


def test_a_target_of_another_library():
    config = small_config()
    assert {queries_for_macs(config, half) for half in (0.5, np.float32(0.5), torch.tensor(0.5))} == {4}


def test_a_target_of_everything_is_everything():
    for config in (small_config(), VisualPerceiverConfig(num_labels=10), VisualPerceiverConfig(num_queries=1)):
        assert queries_for_macs(config, 1) == config.num_queries


def test_a_target_in_a_call(classifier, picture):
    assert used(classifier(picture, target_macs=0.25)) == queries_for_macs(classifier.model.config, 0.25)
    # With selection the target bounds what is read and compared as well.
    budget = queries_for_macs(classifier.model.config, 0.25, {"dqs_threshold": 1.0})
    assert used(classifier(picture, target_macs=0.25, dqs_threshold=1.0)) == budget
    assert used(classifier(picture, target_macs=0.25, dqs_threshold=0.5)) < budget


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target_macs": 0}, ValueError, r"`target_macs` to be in \(0, 1\], got 0"),
        ({"target_macs": 1.01}, ValueError, r"in \(0, 1\], got 1.01"),
        ({"target_macs": float("nan")}, ValueError, r"in \(0, 1\], got nan"),
        ({"target_macs": True}, ValueError, r"in \(0, 1\], got True"),
        ({"target_macs": "half"}, ValueError, r"in \(0, 1\], got 'half'"),
        ({"target_macs": 0.001}, ValueError, "at least 0.0416, the cost of the smallest budget, got 0.001"),
        ({"target_macs": 0.5, "num_active_queries": 3}, ValueError, "`num_active_queries` or `target_macs`, got both"),
        ({"num_active_queries": 65}, ValueError, r"integer in \[1, 64\], got 65"),
        ({"dqs_threshold": -2.0}, ValueError, "at least -1, got -2.0"),
        ({"budget": 3}, TypeError, "budget"),
    ],
)
def test_bad_arguments(classifier, picture, arguments, error, message):
    with pytest.raises(error, match=message):
        classifier(picture, **arguments)


def test_the_least_target_that_is_named_is_enough(classifier, picture):
    assert used(classifier(picture, target_macs=0.0416)) == 1


def test_bad_images(classifier, tmp_path):
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(ValueError, match="damaged, or no image"):
        classifier(str(tmp_path / "notes.txt"))
    with pytest.raises(ValueError, match=r"Expected a file, a URL or an image in base64, got 'absent\.png'"):
        classifier("absent.png")
    with pytest.raises(ValueError, match="at most 33,554,432 pixels, got 8192x4097"):
        classifier(Image.new("L", (8192, 4097)))
