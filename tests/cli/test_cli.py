"""End-to-end tests of the command line on the sample, in separate processes."""

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from support import run, unwrapped

from hf_visual_perceiver.cli.evaluate import evaluation_table
from hf_visual_perceiver.cli.main import main
from hf_visual_perceiver.data.image_processor import create_image_processor
from hf_visual_perceiver.data.images import load_images
from hf_visual_perceiver.data.sample_images import write_sample_images
from hf_visual_perceiver.evaluation.evaluate import Evaluation
from hf_visual_perceiver.inference.cascade import Cascade
from hf_visual_perceiver.inference.loading import default_dataset, default_model, load_model
from hf_visual_perceiver.modeling import Budget


FEW = ["--max-images", "200"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_sample_images(folder, 5)
    return folder


def cli(*arguments):
    result = run("visual-perceiver", *arguments, env={"OMP_NUM_THREADS": "1"})
    assert "Traceback" not in result.stderr, result.stderr
    return result


def test_evaluate(tmp_path):
    result = cli("evaluate", *FEW, "--plot", tmp_path / "plot.png", "--json", tmp_path / "result.json")
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert len(rows) == 12
    for row in rows:
        assert f"{100 * row['accuracy']:.2f} ±" in result.stdout
    assert "full" in result.stdout
    assert "t=0.99" in result.stdout
    assert "dtype float32" in unwrapped(result.stdout)
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_evaluate_at_chosen_points(tmp_path):
    chosen = ["--budget", "K=3, t=0.5", "--budget", "t=0.5,K=5", "--budget", "K=3,t=0.5"]
    result = cli("evaluate", *FEW, *chosen, "--json", tmp_path / "r.json", "--dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [r["budget"] for r in rows] == [
        {"num_active_queries": 3, "dqs_threshold": 0.5},
        {"dqs_threshold": 0.5, "num_active_queries": 5},
    ]
    assert all(1 <= r["used_min"] <= r["used_max"] <= r["budget"]["num_active_queries"] for r in rows)


def test_fast_gives_the_same_answers(pictures, tmp_path):
    points = ["--budget", "K=5, t=0.8", "--budget", "t=0.8"]
    rows = []
    for flags in ([], ["--fast"]):
        result = cli("evaluate", *FEW, *points, *flags, "--json", tmp_path / "r.json")
        assert result.returncode == 0, result.stderr
        assert ("form optimized" in unwrapped(result.stdout)) == bool(flags)
        rows.append(json.loads((tmp_path / "r.json").read_text())["rows"])
    for one, other in zip(*rows, strict=True):
        assert one["used_mean"] == pytest.approx(other["used_mean"], abs=0.01)  # a tie may fall either way
        assert one["accuracy"] == pytest.approx(other["accuracy"], abs=0.01)
    cli("predict", pictures, "--fast", "--dtype", "bfloat16", "--budget", "t=0.8", "--json", tmp_path / "p.json")
    assert len(json.loads((tmp_path / "p.json").read_text())["images"]) == 5
    refused = cli("evaluate", "--fast", "--write-card")
    assert refused.returncode == 1
    assert "Expected either --write-card or --fast" in refused.stderr


def test_predict(pictures, tmp_path):
    result = cli("predict", pictures, "--budget", "K=16", "--json", tmp_path / "r.json")
    assert result.returncode == 0, result.stderr
    answers = json.loads((tmp_path / "r.json").read_text())["images"]
    assert len(answers) == 5
    assert {a["used"] for a in answers} == {16}
    adaptive = cli("predict", *sorted(pictures.iterdir()), "--budget", "t=0.8", "--json", tmp_path / "s.json")
    assert adaptive.returncode == 0
    used = [a["used"] for a in json.loads((tmp_path / "s.json").read_text())["images"]]
    assert len(set(used)) > 1
    for answer in answers:
        assert next(iter(answer["labels"])) in result.stdout


@torch.no_grad()
def test_predict_by_a_cascade(pictures, tmp_path):
    cli("predict", pictures, "--budget", "cascade to K=4 + mirror at 0.9", "--json", tmp_path / "r.json")
    model = load_model(default_model())
    cascade = Cascade(model, [Budget(num_active_queries=K) for K in (1, 2, 4)], [0.9] * 3, mirror=True)
    for result in json.loads((tmp_path / "r.json").read_text())["images"]:
        with Image.open(result["file"]) as image:
            pixels = create_image_processor(model.config)(images=image.convert("RGB"), return_tensors="pt")
        output = cascade(pixels["pixel_values"])
        assert result["macs"] == cascade.count_macs()[output.stage.item()]
        assert max(result["labels"].values()) == pytest.approx(output.logits.softmax(-1).max().item(), rel=1e-4)


@torch.no_grad()
def test_predict_agrees_with_the_model(pictures, tmp_path):
    from hf_visual_perceiver.data.images import normalise

    cli("predict", pictures, "--json", tmp_path / "r.json", "--top-k", 1)
    answers = json.loads((tmp_path / "r.json").read_text())["images"]
    model = load_model(default_model())
    cfg = model.config.timm_pretrained_cfg
    pixels = normalise(load_images(default_dataset(), "test").images[:5], cfg["mean"], cfg["std"])
    labels = model(pixels).logits.softmax(-1).max(-1)
    for answer, p, index in zip(answers, labels.values, labels.indices, strict=True):
        assert answer["labels"] == {model.config.id2label[index.item()]: pytest.approx(p.item(), abs=1e-5)}


def test_a_truncated_picture_is_named_and_the_rest_classified(pictures, tmp_path):
    for path in pictures.iterdir():
        (tmp_path / f"[bold]{path.name}").write_bytes(path.read_bytes())
    broken = tmp_path / "broken.png"
    broken.write_bytes(next(pictures.iterdir()).read_bytes()[:900])
    result = cli("predict", tmp_path, "--json", tmp_path / "r.json")
    assert result.returncode == 1
    assert f"Cannot read {broken}" in result.stderr
    assert "[bold]000_cat.png" in result.stdout.replace("\n", "").replace(" ", "")
    answers = json.loads((tmp_path / "r.json").read_text())
    assert len(answers["images"]) == 5
    assert len(answers["unreadable"]) == 1


def test_info(tmp_path):
    result = cli("info", "--json", tmp_path / "r.json")
    assert result.returncode == 0, result.stderr
    facts = json.loads((tmp_path / "r.json").read_text())
    assert facts["architecture"] == "visual_perceiver_micro_levels_32"
    assert "airplane, automobile" in unwrapped(result.stdout)
    assert facts["evaluation"]["conditions"]["images"] == 10_000
    assert "hours of training steps" in unwrapped(result.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{text}"], "Cannot read {text} as an image"),
        (["predict", "{folder}"], "Expected images in {folder}, found none"),
        (["predict", "{folder}/absent.png"], "Cannot read {folder}/absent.png"),
        (["predict", "{picture}", "--budget", "K=0"], "integer in [1, 32], got 0"),
        (["predict", "{picture}", "--budget", "t=-2"], "at least -1, got -2"),
        (["predict", "{picture}", "--budget", "cascade to K=33 at 0.9"], "integer in [1, 32], got 33"),
        (["evaluate", "--budget", "K=33"], "integer in [1, 32], got 33"),
        (["evaluate", "--dataset", "{folder}/absent"], "got {folder}/absent, which does not exist"),
        (["evaluate", "--dtype", "int8"], "float32, bfloat16 or float16, got 'int8'"),
        (["evaluate", "--device", "cuda:7"], "an available device, got 'cuda:7'"),
        (["evaluate", "--plot", "{folder}/plot.txt"], "Expected a plot's file to end in .png, .svg or .pdf"),
        (["evaluate", "--json", "{folder}/absent/r.json"], "Expected a file name in an existing folder"),
        (["evaluate", "--model", "org/absent", "--write-card"], "Expected a local model folder for --write-card"),
        (
            ["evaluate", "--model", "benchmarks/baselines/vit_nano_cifar10", "--write-card"],
            "for --write-card, got a timm_wrapper",
        ),
        (["info", "--model", "{folder}"], "Expected a folder or Hub id of a checkpoint"),
    ],
)
def test_mistakes_are_said_in_one_line(arguments, message, pictures, tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("not an image")
    places = {"folder": tmp_path, "text": tmp_path / "notes.txt", "picture": next(pictures.iterdir())}
    # In this process, as importing everything takes seconds each time.
    monkeypatch.setattr("sys.argv", ["visual-perceiver", *(a.format(**places) for a in arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message.format(**places) in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt"]


@pytest.mark.parametrize("value", ["K=2.5", "K=True"])
def test_a_budget_that_is_no_integer(pictures, value):
    result = cli("predict", pictures, "--budget", value)
    assert result.returncode == 1
    assert "integer in [1, 32], got" in result.stderr


def test_the_table_fits_a_terminal():
    values = json.loads((Path(default_model()) / "evaluation.json").read_text())
    narrow = Console(width=80, record=True, file=io.StringIO())
    narrow.print(evaluation_table(Evaluation.from_dict(values)))
    text = narrow.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_default_model_ships():
    assert default_model().endswith("checkpoints/visual_perceiver_micro_cifar10")
