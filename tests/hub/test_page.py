"""The page in docs/app, in headless Chromium with the real exported model.

Needs Chromium, Playwright (the extra `browser`) and the page's packages (`npm ci` in docs/app).
"""

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import PATIENCE, REPOSITORY

from hf_visual_perceiver.data.image_processor import create_image_processor
from hf_visual_perceiver.export.graph import export_onnx, quantise
from hf_visual_perceiver.inference.loading import default_model, load_model


playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with the extra `browser`")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
APP = REPOSITORY / "docs" / "app"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
    pytest.mark.skipif(not (APP / "node_modules").is_dir(), reason="`npm ci` in docs/app was not run"),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def network():
    """The bundled checkpoint, whose 32 queries share a stem with levels and a block-causal trunk."""
    return load_model(default_model())


@pytest.fixture(scope="module")
def site(network, tmp_path_factory):
    """The folder of the page with a model, and its URL."""
    folder = tmp_path_factory.mktemp("site")
    for name in ("index.html", "app.js", "node_modules"):
        (folder / name).symlink_to(APP / name)
    export_onnx(network, folder / "model.onnx")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, site):
    page = browser.new_page(viewport={"width": 800, "height": 640})
    page.set_default_timeout(1000 * PATIENCE)
    page.errors, page.requested = [], []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("request", lambda request: page.requested.append(request.url))
    page.goto(site[1])
    page.wait_for_selector("#message:has-text('Ready')")
    yield page
    page.close()


def set_knob(page, knob, value):
    page.locator(knob).evaluate("(e, value) => { e.value = value; e.dispatchEvent(new Event('input')); }", str(value))


def answers(page):
    """Labels with probabilities, and the queries used."""
    items = page.locator("#labels li")
    labels = items.locator("span").all_text_contents()
    probabilities = items.evaluate_all("items => items.map(item => Number(item.dataset.probability))")
    return dict(zip(labels, probabilities, strict=True)), int(page.locator("#cost").get_attribute("data-used"))


def seen(page):
    """The pixels that the page passed to the model."""
    read = "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    return np.array(page.locator("#small").evaluate(read), np.uint8).reshape(32, 32, 4)[..., :3]


@torch.inference_mode()
def expected(network, picture: Image.Image, K: int, t: float | None = None):
    pixels = create_image_processor(network.config)(images=picture, return_tensors="pt")
    output = network(**pixels, num_active_queries=K, dqs_threshold=t)
    names = network.config.label_names
    probabilities = output.logits[0].softmax(-1).tolist()
    return dict(zip(names, probabilities, strict=True)), int(output.active_queries.sum())


@pytest.fixture
def photograph(tmp_path):
    """A picture larger than the model's input, with another aspect ratio."""
    cat = Image.open(REPOSITORY / "docs" / "cat.png").convert("RGB")
    cat.resize((301, 217), Image.Resampling.BICUBIC).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


@pytest.mark.parametrize("shrunk", [False, True])
def test_the_page_answers_as_python_does(page, photograph, network, shrunk):
    picture = photograph if shrunk else REPOSITORY / "docs" / "cat.png"
    page.set_input_files("#file", picture)
    page.wait_for_selector("#cost[data-used='32']")
    # Shrunk as Pillow does it, but for the rounding of single pixels, which from there on is part of the picture.
    image = Image.open(picture).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    difference = np.abs(seen(page).astype(int) - np.asarray(image))
    assert difference.max() <= shrunk
    image = Image.fromarray(seen(page))
    # The last bits of a cosine can tip a query over a threshold.
    steady = [
        t
        for t in (0.6, 0.65, 0.7, 0.75, 0.8)
        if len({expected(network, image, 32, t + d)[1] for d in (-1e-4, 0, 1e-4)}) == 1
    ]
    for K, t in ((32, None), (16, None), (1, None), *((32, t) for t in steady[:2])):
        probabilities, used = expected(network, image, K, t)
        set_knob(page, "#t", 1 if t is None else t)
        set_knob(page, "#k", K)
        page.wait_for_selector(f"#cost[data-used='{used}']")
        given, given_used = answers(page)
        assert given_used == used
        assert list(given) == sorted(probabilities, key=probabilities.get, reverse=True)[:5]
        assert given == pytest.approx({label: probabilities[label] for label in given}, abs=1e-4)
        assert page.locator("#queries i.active").count() == used
    assert steady
    assert page.errors == []


def test_a_dropped_picture_stays_on_the_device(page, site, photograph):
    page.wait_for_load_state("networkidle")
    before = list(page.requested)
    transfer = page.evaluate_handle(
        """bytes => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "cat.png", { type: "image/png" }));
            return transfer;
        }""",
        list(photograph.read_bytes()),
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    page.wait_for_selector("#cost[data-used='32']")
    assert page.locator("#picture").is_visible()
    assert [url for url in page.requested[len(before) :] if not url.startswith("blob:")] == []
    assert all(url.startswith((site[1], "data:", "blob:")) for url in page.requested)
    if artefacts := os.environ.get("HF_VISUAL_PERCEIVER_SCREENSHOTS"):
        set_knob(page, "#k", 8)
        page.wait_for_selector("#cost[data-used='8']")
        page.screenshot(path=Path(artefacts) / "browser_page.png")


def test_what_is_no_picture_is_said(page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    page.set_input_files("#file", tmp_path / "broken.png")
    page.wait_for_selector("#message.error:has-text('Cannot read broken.png as a picture.')")
    Image.new("1", (8000, 5001)).save(tmp_path / "huge.png")
    page.set_input_files("#file", tmp_path / "huge.png")
    page.wait_for_selector("#message.error:has-text('at most 33,554,432 pixels, got 8000x5001')")
    page.set_input_files("#file", REPOSITORY / "docs" / "cat.png")
    page.wait_for_selector("#cost[data-used='32']")
    assert page.locator("#message").get_attribute("class") == ""
    assert page.errors == []


def test_a_quantised_or_missing_model(browser, site, page):
    folder, address = site
    (folder / "model.onnx").rename(folder / "float32.onnx")
    try:
        page.goto(address)
        page.wait_for_selector("#message.error:has-text('Cannot load model.onnx (404)')")
        (folder / "model.onnx").write_bytes(b"\xffnothing")
        os.utime(folder / "model.onnx", (0, 0))  # so that the next file has another time in seconds
        page.goto(address)
        page.wait_for_selector("#message.error:has-text('Expected model.onnx to be')")
        quantise(folder / "float32.onnx", folder / "model.onnx")
        page.goto(address)
        page.set_input_files("#file", REPOSITORY / "docs" / "cat.png")  # perhaps before the model is loaded
        page.wait_for_selector("#cost[data-used='32']")
        assert page.errors == []
    finally:
        (folder / "float32.onnx").replace(folder / "model.onnx")
