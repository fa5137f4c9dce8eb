"""The Gradio app: its results, its drawings, and the page, served locally and as a published Space.

The page needs Gradio (the extra `demo`); the browser tests also need Chromium and Playwright (the extra `browser`).
"""

import ast
import html
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from hub_server import Hub
from huggingface_hub import HfApi
from PIL import Image
from support import PATIENCE, REPOSITORY, papers_form, small_config

from hf_visual_perceiver.cli import main as cli
from hf_visual_perceiver.evaluation.evaluate import Evaluation, Row
from hf_visual_perceiver.hub.publish import prepare, upload
from hf_visual_perceiver.hub.space import demo as demo_module
from hf_visual_perceiver.hub.space.demo import Demo
from hf_visual_perceiver.hub.space.draw import (
    attention_overlay,
    describe_setting,
    draw_curves,
    show_answer,
    show_message,
    show_tradeoff,
)
from hf_visual_perceiver.hub.space.repository import GRADIO, space_files, upload_space
from hf_visual_perceiver.inference.loading import default_model, load_model
from hf_visual_perceiver.modeling import (
    Budget,
    OptimizedVisualPerceiver,
    VisualPerceiverForImageClassification,
    count_macs,
)
from hf_visual_perceiver.modeling.handler import MAX_PIXELS


CAT = REPOSITORY / "docs" / "cat.png"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="the page is tested with the extra `demo`"
)


@pytest.fixture(scope="module")
def demo():
    return Demo.load(papers_form())


@pytest.fixture(scope="module")
def cat():
    return Image.open(CAT).convert("RGB")


@pytest.fixture
def picture(demo, cat):
    return demo.look(cat)


@pytest.fixture
def without_onnxruntime(monkeypatch):
    """Avoid the export of graphs for another architecture."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)


class TestNumbers:
    def test_what_the_queries_read_is_what_the_model_says(self, demo, picture, trained):
        with torch.no_grad():
            output = trained(picture.pixels, output_attentions=True)
        expected = output.cross_attentions[0][0].mean(0).reshape(64, 8, 8).numpy()
        np.testing.assert_allclose(picture.attention, expected, atol=1e-6)
        np.testing.assert_allclose(picture.full_probabilities, output.logits[0].softmax(-1).numpy(), atol=1e-6)

    def test_it_answers_with_the_engine_and_without_it_with_the_model(self, demo, cat, picture, monkeypatch):
        assert isinstance(demo.network, OptimizedVisualPerceiver)
        expected = demo.answer(picture, 40, 0.8)
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        plain = Demo.load(papers_form())
        assert plain.network is plain.model
        answer = plain.answer(plain.look(cat), 40, 0.8)
        np.testing.assert_allclose(answer.probabilities, expected.probabilities, atol=1e-5)
        assert answer.active.tolist() == expected.active.tolist()

    def test_the_view_is_the_image(self, picture, cat):
        assert picture.view.size == (32, 32)
        assert np.abs(np.int16(picture.view) - np.int16(cat)).max() <= 1

    @pytest.mark.parametrize(("K", "t"), [(64, None), (7, None), (64, 0.7), (20, 0.8)])
    def test_an_answer_is_the_models(self, demo, picture, trained, K, t):
        answer = demo.answer(picture, K, t)
        with torch.no_grad():
            output = trained(picture.pixels, num_active_queries=K, dqs_threshold=t)
        np.testing.assert_allclose(answer.probabilities, output.logits[0].softmax(-1).numpy(), atol=1e-6)
        assert answer.active.tolist() == output.active_queries[0].tolist()
        used = int(answer.active.sum())
        assert used < K if t else used == K
        # With selection, reading and comparing all candidates counts.
        assert answer.macs == count_macs(trained.config, used, None if t is None else K)
        assert answer.full_macs == count_macs(trained.config)

    def test_a_network_with_levels(self, cat):
        """The default checkpoint: tokens of each level are 4x4, and what each level costs is counted."""
        demo = Demo.load(default_model())
        picture, model = demo.look(cat), load_model(default_model())
        assert picture.attention.shape == (32, 4, 4)
        for K, t in ((1, None), (8, None), (32, None), (32, 0.8)):
            answer = demo.answer(picture, K, t)
            with torch.no_grad():
                output = model(picture.pixels, num_active_queries=K, dqs_threshold=t)
            np.testing.assert_allclose(answer.probabilities, output.logits[0].softmax(-1).numpy(), atol=1e-5)
            assert answer.active.tolist() == output.active_queries[0].tolist()
            budget = Budget(num_active_queries=K, **({"dqs_threshold": t} if t else {}))
            assert answer.macs == model.config.count_macs(budget, output).item()

    def test_dropped_queries_read_what_an_earlier_one_reads(self, demo, picture):
        answer = demo.answer(picture, 64, 0.7)
        for i in range(1, 64):
            assert answer.active[i] == (picture.similarities[i, :i].max() <= 0.7)

    def test_the_greedy_rule_compares_with_what_stays(self, cat, without_onnxruntime):
        model = load_model(papers_form())
        model.config.dqs_reference = "kept"
        demo = Demo(model, "greedy")
        answer = demo.answer(demo.look(cat), 64, 0.7)
        assert answer.active[answer.nearest].all()
        assert 0 < answer.active.sum() < 64

    def test_the_knobs_start_at_the_checkpoints_own_setting(self, cat):
        model = load_model(papers_form())
        model.config.num_active_queries, model.config.dqs_threshold = 16, 0.8
        demo = Demo(model, "small")
        assert demo.start == model.config.operating_point() == (16, 0.8)
        picture = demo.look(cat)
        # And all queries without selection can still be asked for.
        answer = demo.answer(picture)
        assert answer.active.all()
        np.testing.assert_allclose(answer.probabilities, picture.full_probabilities, atol=1e-6)
        assert demo.answer(picture, 16).active.sum() == 16

    def test_time_is_in_turns_and_a_median(self, demo, picture, monkeypatch):
        asked = []

        def interleaved(runs, repetitions, device, progress):
            asked.append((list(runs), repetitions))
            return {"full": [1.0, 2.0, 4.0], "setting": [0.5, 1.5, 1.0]}

        monkeypatch.setattr(demo_module, "interleaved", interleaved)
        answer = demo.answer(picture, 16)
        assert (answer.seconds, answer.full_seconds, answer.relative_time) == (1.0, 2.0, 0.5)
        # A large network is timed less often, so that a knob answers soon.
        for seconds, repetitions in ((0.001, 7), (0.03, 4), (10.0, 3)):
            slow = demo_module.Picture(**{**picture.__dict__, "full_seconds": seconds})
            demo.answer(slow, 16)
            assert asked[-1] == (["full", "setting"], repetitions)

    @pytest.mark.parametrize(("K", "t", "message"), [(0, None, r"\[1, 64\], got 0"), (8, float("nan"), "got nan")])
    def test_knobs_out_of_range(self, demo, picture, K, t, message):
        with pytest.raises(ValueError, match=message):
            demo.answer(picture, K, t)

    def test_an_image_of_another_shape_and_network(self, without_onnxruntime):
        config = small_config(image_size=[16, 24], patch_size=4, num_cross_attention_heads=2)
        demo = Demo(VisualPerceiverForImageClassification(config).eval(), "small")
        picture = demo.look(Image.new("RGB", (301, 17), (200, 30, 30)))
        assert picture.view.size == (24, 16)
        assert picture.attention.shape == (12, 4, 6)
        np.testing.assert_allclose(picture.attention.sum((1, 2)), 1, atol=1e-5)
        assert show_answer(demo, picture, demo.answer(picture, 5)).count("<img") == 5 + 2


def row(K, t, macs, accuracy):
    budget = Budget(num_active_queries=K, dqs_threshold=t)
    return Row(budget, 1.0, 0.0, 1, 1, macs, accuracy, 0.01, 1.0, 1.0)


class TestTradeoff:
    def test_settings_that_were_measured(self, demo):
        for measured in demo.evaluation.rows:
            knobs = measured.budget.kwargs
            expected = demo.expected(knobs.get("num_active_queries", 64), knobs.get("dqs_threshold"))
            assert (expected.macs, expected.accuracy, expected.measured) == (measured.macs, measured.accuracy, True)

    def test_settings_between_and_beyond(self, model):
        rows = [row(1, None, 10.0, 0.2), row(3, None, 30.0, 0.6), row(None, 0.5, 5.0, 0.3), row(None, 0.9, 9.0, 0.5)]
        demo = Demo(model, "small", Evaluation(rows, {"images": 10}))
        between = demo.expected(2)
        assert (between.macs, between.accuracy, between.measured) == (20.0, pytest.approx(0.4), False)
        between = demo.expected(12, 0.7)
        assert (between.macs, between.accuracy, between.measured) == (pytest.approx(7.0), pytest.approx(0.4), False)
        # Nothing is claimed beyond what was measured, nor where both K and t are set.
        for K, t in ((4, None), (12, 0.4), (12, 0.95), (2, 0.7)):
            assert demo.expected(K, t) is None
        rows.append(row(2, 0.7, 3.0, 0.9))
        assert demo.expected(2, 0.7).accuracy == 0.9
        assert demo.expected(12, 0.7).accuracy == pytest.approx(0.4)  # not between others' settings

    def test_marks_lie_on_the_curves(self, demo, picture):
        curves = draw_curves(demo.evaluation)
        drawn = np.array(re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', curves.svg), float)
        for measured in demo.evaluation.rows:
            place = np.array(curves.place(measured.macs, measured.accuracy))
            assert np.abs(drawn - place).max(1).min() < 0.1
        shown = show_tradeoff(demo, curves, demo.answer(picture, 16))
        accuracy = demo.expected(16).accuracy
        assert f'data-accuracy="{accuracy:.4f}"' in shown
        assert shown.count('class="vp-star"') == shown.count('class="vp-cost"') == 1
        assert f"K = 16: {100 * accuracy:.1f} % accuracy" in shown
        shown = show_tradeoff(demo, curves, demo.answer(picture, 32, 0.8))
        assert "was not measured" in shown
        assert 'class="vp-star"' not in shown
        # A cost beyond the plot is marked at its edge.
        assert curves.place(1e12)[0] == curves.axes[2]

    def test_interpolation_is_said(self, demo, picture):
        answer = demo.answer(picture, 64, 0.75)
        assert "interpolated" in describe_setting(answer, demo.expected(64, 0.75))

    def test_without_an_evaluation_the_tab_says_so(self, model):
        demo = Demo(model, "small")
        assert "evaluation.json" in show_tradeoff(demo, None, None)


class TestPage:
    def test_each_query_is_used_dropped_or_beyond(self, demo, picture):
        answer = demo.answer(picture, 48, 0.75)
        shown = show_answer(demo, picture, answer)
        used = int(answer.active.sum())
        kinds = {kind: shown.count(f'<div class="vp-query vp-{kind}"') for kind in ("kept", "dropped", "beyond")}
        assert kinds == {"kept": used, "dropped": 48 - used, "beyond": 16}
        assert f'data-used="{used}"' in shown
        reasons = re.findall(r"Query (\d+) is dropped[^\"]* query (\d+) \(cosine ([\d.]+)\)", shown)
        assert len(reasons) == 48 - used
        for query, earlier, cosine in reasons:
            assert int(earlier) < int(query)
            assert float(cosine) >= 0.75
        assert f"first 48 queries, {48 - used} dropped by t" in shown

    def test_the_overlay_is_strongest_where_most_is_read(self, picture):
        for attention in picture.attention:
            overlay = np.asarray(attention_overlay(attention))
            assert overlay.shape == (8, 8, 4)
            assert overlay[..., 3].argmax() == attention.argmax()
            assert overlay[..., 3].max() == 235
        assert not np.asarray(attention_overlay(np.zeros((2, 2))))[..., 3].any()

    def test_labels_are_text(self, cat, trained):
        config = trained.config
        model = load_model(papers_form())
        model.config.id2label = {i: f"<script>{name}</script>" for i, name in config.id2label.items()}
        demo = Demo(model, "small")
        picture = demo.look(cat)
        shown = show_answer(demo, picture, demo.answer(picture))
        assert "<script>" not in shown
        assert "&lt;script&gt;cat" in shown
        assert "<b>" not in show_message("<b>", wrong=True)

    def test_without_gradio_the_command_says_which_extra(self, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "gradio", None)
        monkeypatch.delitem(sys.modules, "hf_visual_perceiver.hub.space.app", raising=False)
        monkeypatch.setattr("sys.argv", ["visual-perceiver", "demo-app"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 1
        error = capsys.readouterr().err
        assert 'pip install "hf-visual-perceiver[demo]"' in error
        assert len(error.strip().splitlines()) == 1

    @pytest.mark.parametrize(
        ("name", "given"),
        [
            ("dvt", "the knobs max_exit, exit_thresholds"),
            ("lookupvit", "the knobs compressed_size"),
            ("perceiver", "the knobs num_active_queries, num_iterations"),
            ("qna_vit", "no knobs"),
        ],
    )
    def test_a_model_with_other_knobs(self, name, given):
        message = f"Expected a model with the knobs num_active_queries and dqs_threshold, .*, got one with {given}"
        with pytest.raises(ValueError, match=message):
            Demo.load(str(REPOSITORY / "checkpoints" / f"{name}_nano_cifar10"))

    @pytest.mark.parametrize("name", ["nowhere/at all", "no-such-folder"])
    def test_no_checkpoint(self, name, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match="Expected a folder or Hub id of a checkpoint, got"):
            Demo.load(name)


class TestFiles:
    """The files of a Space; test_publish.py tests their upload."""

    files = space_files("somebody/perceiver", "abc", "mit")

    def test_the_readme_configures_the_space(self):
        _, metadata, text = self.files["README.md"].decode().split("---\n", 2)
        metadata = yaml.safe_load(metadata)
        assert metadata["models"] == ["somebody/perceiver"]
        assert (metadata["sdk"], metadata["sdk_version"], metadata["app_file"]) == ("gradio", GRADIO, "app.py")
        assert (metadata["license"], metadata["python_version"]) == ("mit", "3.12")
        assert len(metadata["short_description"]) <= 60  # the Hub's limit
        assert "somebody/perceiver" in text

    def test_requirements_are_the_packages_without_extras(self):
        lines = self.files["requirements.txt"].decode().splitlines()
        assert any(line.startswith("torch>") for line in lines)
        assert not any(re.match(r"gradio|pytest|playwright", line) for line in lines)
        # What answers, and what exports its graphs for another architecture.
        assert all(sum(line.startswith(name) for line in lines) == 1 for name in ("onnxruntime", "onnxscript"))
        assert len(set(lines)) == len(lines)
        assert not any(";" in line for line in lines)

    def test_the_model_is_pinned_and_its_code_not_run(self):
        app = self.files["app.py"].decode()
        assert 'Demo.load("somebody/perceiver", revision="abc")' in app
        trusting = [n for n in ast.walk(ast.parse(app)) if isinstance(n, ast.keyword) and n.arg == "trust_remote_code"]
        assert trusting == []

    def test_sources_alone_and_all_of_them(self):
        names = {name for name in self.files if name.startswith("hf_visual_perceiver/")}
        graphs = {name for name in names if name.startswith("hf_visual_perceiver/inference/graphs/")}
        assert {Path(name).name for name in graphs} >= {"graphs.json", "level_0.onnx", "trunk.onnx"}
        assert {Path(name).suffix for name in names - graphs} == {".py", ".css"}
        assert not any("checkpoints/" in name or name.endswith(".parquet") for name in names)
        for folder, place in (("hf_visual_perceiver", ""), ("modeling", "modeling/"), ("training", "training/")):
            here = {p.relative_to(REPOSITORY / folder).as_posix() for p in (REPOSITORY / folder).rglob("*.py")}
            assert {f"hf_visual_perceiver/{place}{name}" for name in here} <= names

    def test_they_run_from_their_own_folder(self, tmp_path):
        write(self.files, tmp_path)
        code = (
            "import hf_visual_perceiver.hub.space.demo as demo, hf_visual_perceiver.utils.files as files;"
            "print(demo.__file__, files.__file__)"
        )
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
        )
        assert result.returncode == 0, result.stderr
        assert all(name.startswith(str(tmp_path)) for name in result.stdout.split())

    @needs_gradio
    def test_the_spaces_gradio_is_the_tested_one(self):
        import gradio

        assert gradio.__version__.split(".")[0] == GRADIO.split(".")[0]


def write(files, folder):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


# The page.


class Served:
    """A page served by a separate process."""

    def __init__(self, command, folder, **environment):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.log = folder / "log.txt"
        environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder / "uploads"), "OMP_NUM_THREADS": "1", **environment}
        environment |= {"GRADIO_SERVER_PORT": str(self.port), "PYTHONUNBUFFERED": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            deadline = time.monotonic() + PATIENCE
            while "Running on" not in self.log.read_text():
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.2)
        except BaseException:
            self.stop()
            raise

    def stop(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """`visual-perceiver demo-app`, with the bundled checkpoint of the paper's form."""
    page = Served(
        ["-m", "hf_visual_perceiver.cli.main", "demo-app", "--model", papers_form()],
        tmp_path_factory.mktemp("served"),
        HF_HUB_OFFLINE="1",
    )
    yield page
    page.stop()


def ask(url, path, K, t):
    """Request both tabs through the page's API."""
    from gradio_client import Client, handle_file

    client = Client(url, verbose=False, analytics_enabled=False)
    return client.predict(None if path is None else handle_file(path), K, t, api_name="/show")


def used(shown):
    return int(re.search(r'data-used="(\d+)"', shown)[1])


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    """A small file with an image of 40 megapixels."""
    path = tmp_path_factory.mktemp("huge") / "huge.png"
    Image.new("1", (8000, 5000)).save(path)
    assert MAX_PIXELS < 8000 * 5000
    return path


@needs_gradio
class TestServed:
    def test_it_answers_as_the_model_does(self, served, demo, picture):
        for K, t in ((16, 1), (64, 0.75)):
            result, curve = ask(served.url, CAT, K, t)
            expected = demo.answer(picture, K, None if t == 1 else t)
            assert used(result) == expected.active.sum()
            assert f'data-macs="{expected.macs}"' in result
            assert f"{100 * expected.probabilities.max():.1f} %" in result
            assert "data-accuracy" in curve

    def test_what_is_no_picture_gets_a_message(self, served, huge, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"not a picture")
        (tmp_path / "drawing.svg").write_text("<svg/>")
        bomb = tmp_path / "bomb.png"
        Image.new("1", (20_000, 20_000)).save(bomb)
        cut = tmp_path / "cut.png"
        cut.write_bytes(CAT.read_bytes()[:-300])
        for path, message in (
            (tmp_path / "broken.png", "It is damaged, or not an image"),
            (tmp_path / "drawing.svg", "It is damaged, or not an image"),
            (cut, "It is damaged, or not an image"),
            (huge, f"at most {MAX_PIXELS:,} pixels, got 8000x5000"),
            (bomb, f"at most {MAX_PIXELS:,} pixels"),
            (None, "Drop an image"),
        ):
            result, _ = ask(served.url, path, 16, 1)
            assert message in html.unescape(result)
            assert str(tmp_path) not in result  # nor where this server keeps it
            assert "/tmp" not in result
        assert "Traceback" not in served.log.read_text()

    def test_a_file_that_is_too_large_is_not_taken(self, served):
        part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="large.png"\r\n\r\n'
        body = part + bytes(65 * 2**20) + b"\r\n--x--\r\n"
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        request = urllib.request.Request(f"{served.url}gradio_api/upload", body, kind)
        with pytest.raises(urllib.error.HTTPError, match="413"):
            urllib.request.urlopen(request, timeout=PATIENCE)

    @pytest.mark.parametrize(("K", "t"), [(0, 1), (65, 1), (16, 1.5), ("many", 1)])
    def test_knobs_out_of_range_are_refused(self, served, K, t):
        with pytest.raises(Exception, match=r"(?i)minimum|maximum|value|error"):
            ask(served.url, CAT, K, t)
        assert used(ask(served.url, CAT, 16, 1)[0]) == 16  # it goes on

    def test_it_reads_no_file_of_this_machine(self, served):
        body = {"data": [{"path": str(CAT), "meta": {"_type": "gradio.FileData"}}, 16, 1]}
        request = urllib.request.Request(
            f"{served.url}gradio_api/call/show", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        event = json.load(urllib.request.urlopen(request, timeout=PATIENCE))["event_id"]
        answer = urllib.request.urlopen(f"{served.url}gradio_api/call/show/{event}", timeout=PATIENCE).read().decode()
        assert "event: error" in answer
        assert "data-used" not in answer

    @pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="open ports are read from Linux")
    def test_it_listens_on_this_machine_alone(self, served):
        tables = [Path(f"/proc/net/{name}") for name in ("tcp", "tcp6")]
        lines = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
        listening = [f[1].split(":")[0] for f in lines if f[3] == "0A" and int(f[1].split(":")[1], 16) == served.port]
        assert listening == ["0100007F"]

    def test_a_taken_port_is_said_in_one_line(self, served, monkeypatch, capsys):
        monkeypatch.setattr("sys.argv", ["visual-perceiver", "demo-app", "--port", str(served.port)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 1
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1
        assert error[0].startswith("error: Cannot find empty port")


@needs_gradio
def test_a_published_space_runs(tmp_path, monkeypatch):
    """The files of the Space, alone in a folder, serve the model from the Hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "stage").mkdir()
    with Hub() as hub:
        api = HfApi(endpoint=hub.url, token="writer")
        repo, space = "somebody/perceiver", "somebody/demo"
        plan = prepare(Path(papers_form()), repo, tmp_path / "stage", budget="K=24", check=lambda stage: {})
        published = upload(plan, repo, api=api)
        upload_space(space_files(repo, published.commit), space, "Show it", "", private=False, api=api)
        folder = tmp_path / "space"
        folder.mkdir()
        write(hub.repositories[f"spaces/{space}"].files(), folder)
        hub.requests.clear()
        page = Served(
            ["app.py"],
            folder,
            HF_ENDPOINT=hub.url,
            HF_HOME=str(tmp_path / "cache"),
            HF_HUB_DISABLE_XET="1",
            HF_HUB_OFFLINE="0",
        )
        try:
            result, curve = ask(page.url, CAT, 16, 1)
            config = json.load(urllib.request.urlopen(f"{page.url}config", timeout=PATIENCE))
        finally:
            page.stop()
        fetched = {r.rpartition("/")[2] for r in hub.requests if "/resolve/" in r}
    assert used(result) == 16
    assert f'data-accuracy="{Demo.load(papers_form()).expected(16).accuracy:.4f}"' in curve
    # The published operating point is where the knobs start, the model's examples are there, its code was not asked for.
    sliders = [c["props"] for c in config["components"] if c["type"] == "slider"]
    assert [s["value"] for s in sliders] == [24, 1.0]
    assert {"config.json", "model.safetensors", "evaluation.json", "000_cat.png"} <= fetched
    assert not any(name.endswith(".py") for name in fetched)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with the extra `browser`")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, served):
    page = browser.new_page(viewport={"width": 1280, "height": 960})
    page.set_default_timeout(1000 * PATIENCE)
    page.errors, page.requested = [], []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("request", lambda request: page.requested.append(request.url))
    page.goto(f"{served.url}?__theme=light")
    page.wait_for_selector(".vp-answer[data-used='64']")  # the first example is there from the start
    yield page
    page.close()


def turn(page, knob, value):
    number = page.locator(f"{knob} input[type=number]")
    number.fill(str(value))
    number.press("Enter")


def choose(page, path):
    """Replace the current image with a file."""
    page.locator("#image [aria-label='Remove Image']").click()
    page.wait_for_selector(".vp-message:has-text('Drop an image')")
    page.locator("#image input[type=file]").set_input_files(path)


@needs_gradio
class TestBrowser:
    def test_a_file_and_two_knobs(self, page, served, demo, cat, tmp_path):
        picture = demo.look(cat.resize((301, 217), Image.Resampling.BICUBIC))
        cat.resize((301, 217), Image.Resampling.BICUBIC).save(tmp_path / "photograph.png")
        choose(page, tmp_path / "photograph.png")
        page.wait_for_selector(".vp-answer[data-used='64']")
        assert page.locator(".vp-kept img").count() == 64
        before = page.locator(".vp-answer").inner_text()
        turn(page, "#queries", 40)
        page.wait_for_selector(".vp-answer[data-used='40']")
        turn(page, "#threshold", 0.75)
        expected = demo.answer(picture, 40, 0.75)
        page.wait_for_selector(f".vp-answer[data-used='{expected.active.sum()}'][data-macs='{expected.macs}']")
        after = page.locator(".vp-answer").inner_text()
        assert before != after
        assert page.locator(".vp-query.vp-beyond").count() == 24
        assert page.locator(".vp-query.vp-dropped").count() == 40 - expected.active.sum()
        given = page.locator(".vp-labels li").evaluate_all(
            "items => items.map(item => Number(item.dataset.probability))"
        )
        assert given == pytest.approx(sorted(expected.probabilities, reverse=True)[:5], abs=1e-3)
        artefacts = Path(os.environ.get("HF_VISUAL_PERCEIVER_SCREENSHOTS", tmp_path))
        page.screenshot(path=artefacts / "space.png", full_page=True)

        page.get_by_role("tab", name="Trade-off").click()
        page.wait_for_selector(".vp-tradeoff:visible:has-text('was not measured')")
        turn(page, "#queries", 64)
        page.wait_for_selector(".vp-tradeoff[data-accuracy] .vp-star")
        page.screenshot(path=artefacts / "space_tradeoff.png", full_page=True)
        # It works on a closed network, and tells nobody.
        assert [url for url in page.requested if not url.startswith((served.url, "data:", "blob:"))] == []
        assert page.errors == []

    def test_what_is_no_picture_is_said(self, page, huge, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"not a picture")
        choose(page, tmp_path / "broken.png")
        page.wait_for_selector(".vp-wrong[role=alert]:has-text('It is damaged, or not an image')")
        assert page.locator(".vp-answer").count() == 0  # the old answer is gone
        choose(page, huge)
        page.wait_for_selector(".vp-wrong:has-text('at most 33,554,432 pixels, got 8000x5000')")
        choose(page, CAT)
        page.wait_for_selector(".vp-answer")
        assert page.locator(".vp-wrong").count() == 0
        assert page.errors == []

    def test_nothing_is_wider_than_the_page(self, page):
        for width in (1280, 768, 390):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(300)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
