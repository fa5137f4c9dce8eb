"""handler.py in this process; tests/hub/test_hub.py loads it like an Inference Endpoint."""

import base64
import io
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from support import REPOSITORY, papers_form, small_config

from hf_visual_perceiver.data.image_processor import create_image_processor
from hf_visual_perceiver.inference.loading import load_optimized
from hf_visual_perceiver.modeling import OptimizedVisualPerceiver, VisualPerceiverForImageClassification
from hf_visual_perceiver.modeling.handler import MAX_PIXELS, EndpointHandler, open_image, read_parameters
from hf_visual_perceiver.training.folder import save_folder


CAT = REPOSITORY / "docs" / "cat.png"


@pytest.fixture(scope="module")
def endpoint():
    return EndpointHandler(papers_form())


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def header_of_a_png(width: int, height: int) -> bytes:
    """A PNG header of 45 bytes that claims this size."""
    fields = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + fields + struct.pack(">I", zlib.crc32(fields)) + end


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(4)
    noise = torch.randint(0, 256, (3, 40, 30, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(pixels.numpy()) for pixels in noise]


@pytest.mark.parametrize("point", [{}, {"num_active_queries": 3}, {"num_active_queries": 40, "dqs_threshold": 0.8}])
def test_answers_are_the_models(endpoint, pictures, trained, point):
    answers = endpoint({"inputs": pictures, "parameters": {**point, "top_k": 10}})
    pixels = create_image_processor(trained.config)(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = trained(pixels, **point)
    for b, answer in enumerate(answers):
        assert [a["queries_used"] for a in answer] == [output.active_queries[b].sum().item()] * 10
        expected = output.logits[b].softmax(-1)
        assert [a["score"] for a in answer] == sorted((a["score"] for a in answer), reverse=True)
        for a in answer:
            assert a["score"] == pytest.approx(expected[trained.config.label2id[a["label"]]].item(), abs=1e-5)


class TestForms:
    """The handler uses ONNX Runtime if this package and onnxruntime are installed, with the same answers as without."""

    PARAMETERS = {"num_active_queries": 40, "dqs_threshold": 0.8, "top_k": 10}

    @pytest.mark.skipif(
        torch.cuda.is_available(), reason="The handler uses a GPU where there is one, without the engine."
    )
    def test_it_serves_with_the_engine(self, endpoint):
        assert isinstance(endpoint.model, OptimizedVisualPerceiver)

    @pytest.mark.parametrize("missing", ["hf_visual_perceiver.inference.loading", "onnxruntime"])
    def test_without_a_package_it_serves_with_pytorch(self, endpoint, pictures, monkeypatch, missing):
        monkeypatch.setitem(sys.modules, missing, None)
        plain = EndpointHandler(papers_form())
        assert type(plain.model).__name__ == "VisualPerceiverForImageClassification"  # of the folder's code
        request = {"inputs": pictures, "parameters": self.PARAMETERS}
        for expected, answer in zip(endpoint(request), plain(request), strict=True):
            assert [a["label"] for a in answer] == [a["label"] for a in expected]
            assert [a["score"] for a in answer] == pytest.approx([a["score"] for a in expected], abs=1e-5)
            assert [a["queries_used"] for a in answer] == [a["queries_used"] for a in expected]

    def test_a_package_that_answers_otherwise_is_not_used(self, tmp_path, monkeypatch):
        """The folder's code defines the model; the package may have another version."""
        folder = save_folder(VisualPerceiverForImageClassification(small_config()), tmp_path / "model")
        other = load_optimized(papers_form())
        monkeypatch.setattr("hf_visual_perceiver.inference.loading.load_optimized", lambda path: other)
        assert not isinstance(EndpointHandler(str(folder)).model, OptimizedVisualPerceiver)

        def same_shape(path):
            torch.manual_seed(7)
            model = VisualPerceiverForImageClassification(small_config()).eval()
            return model.optimize_for_inference(backend="torch")

        monkeypatch.setattr("hf_visual_perceiver.inference.loading.load_optimized", same_shape)
        assert not isinstance(EndpointHandler(str(folder)).model, OptimizedVisualPerceiver)


def test_every_form_of_an_image_is_the_same_image(endpoint, pictures):
    data = png(pictures[0])
    text = base64.b64encode(data).decode()
    forms = [pictures[0], data, io.BytesIO(data), text, f"data:image/png;base64,{text}", pictures[0].convert("RGBA")]
    answers = [endpoint({"inputs": form}) for form in forms]
    assert all(answer == answers[0] for answer in answers)
    assert len(answers[0]) == 5
    # A list stays a list, whatever its length.
    assert endpoint({"inputs": [text]}) == [answers[0]]


def test_a_photo_is_turned_upright():
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    file = io.BytesIO()
    image.save(file, "jpeg", exif=exif)
    assert open_image(file.getvalue()).size == (2, 4)


def test_parameters_of_an_address_are_text():
    names = ["num_active_queries", "dqs_threshold"]
    given = {"num_active_queries": "16", "dqs_threshold": "0.8", "top_k": "2"}
    assert read_parameters(given, names) == ({"num_active_queries": 16, "dqs_threshold": 0.8}, 2)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "Expected `inputs` in the request"),
        ({"image": "x"}, r"Expected `inputs` in the request, got \['image'\]"),
        ({"inputs": []}, "at least one image"),
        ({"inputs": 3}, "as base64 text, bytes or PIL image, got int"),
        ({"inputs": "http://127.0.0.1/cat.png"}, "Expected an image in base64"),
        ({"inputs": "/etc/passwd"}, "damaged, or no image|Expected an image in base64"),
        ({"inputs": b"no image"}, "damaged, or no image"),
        ({"inputs": "PICTURE", "parameters": {"num_active_queries": 0}}, r"integer in \[1, 64\], got 0"),
        ({"inputs": "PICTURE", "parameters": {"num_active_queries": 2.5}}, r"integer in \[1, 64\], got 2.5"),
        ({"inputs": "PICTURE", "parameters": {"dqs_threshold": "nan"}}, "at least -1, got nan"),
        ({"inputs": "PICTURE", "parameters": {"dqs_threshold": "high"}}, "`dqs_threshold` to be a number, got 'high'"),
        ({"inputs": "PICTURE", "parameters": {"top_k": 0}}, "`top_k` to be an integer of at least 1, got 0"),
        ({"inputs": "PICTURE", "parameters": {"temperature": 1}}, r"got \['temperature'\]"),
    ],
)
def test_bad_requests(endpoint, pictures, request_, message):
    if request_.get("inputs") == "PICTURE":
        request_ = {**request_, "inputs": pictures[0]}
    with pytest.raises(ValueError, match=message):
        endpoint(request_)


def test_a_truncated_image(endpoint, pictures):
    with pytest.raises(ValueError, match="damaged, or no image"):
        endpoint({"inputs": png(pictures[0])[:900]})


@pytest.mark.parametrize(("width", "height"), [(MAX_PIXELS + 1, 1), (8000, 5000)])
def test_a_small_file_with_a_huge_image_is_not_decoded(width, height):
    with pytest.raises(ValueError, match=rf"at most 33,554,432 pixels, got {width}x{height}"):
        open_image(header_of_a_png(width, height))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_pillow_refuses_is_refused_in_the_same_words():
    with pytest.raises(ValueError, match="at most 33,554,432 pixels, got more than Pillow opens"):
        open_image(header_of_a_png(60000, 60000))


@pytest.mark.parametrize(("size", "decoded"), [((8, 12), (8, 12)), ((16, 12), (8, 6)), ((40, 30), (10, 8))])
def test_large_jpegs_are_reduced_while_they_are_decoded(monkeypatch, size, decoded):
    monkeypatch.setattr("hf_visual_perceiver.modeling.handler.MAX_PIXELS", 96)
    file = io.BytesIO()
    Image.new("RGB", size, (250, 130, 10)).save(file, "jpeg", quality=95)
    image = open_image(file.getvalue())
    assert image.size == decoded
    assert np.allclose(image.getpixel((3, 3)), (250, 130, 10), atol=3)


def test_jpegs_that_stay_too_large_are_refused(monkeypatch):
    monkeypatch.setattr("hf_visual_perceiver.modeling.handler.MAX_PIXELS", 10)
    file = io.BytesIO()
    Image.new("RGB", (80, 40)).save(file, "jpeg")
    with pytest.raises(ValueError, match="at most 10 pixels, got 80x40"):
        open_image(file.getvalue())


GREY = np.asarray(Image.open(CAT).convert("L"))
DEEP = {
    "I;16": Image.fromarray((GREY.astype(np.uint16) * 257).astype("<u2")),
    "I;16B": Image.fromarray((GREY.astype(np.uint16) * 257).astype(">u2")),
    "I;16L": Image.frombytes("I;16L", (32, 32), (GREY.astype("<u2") * 257).tobytes(), "raw", "I;16L"),
    "I;16N": Image.frombytes("I;16N", (32, 32), (GREY.astype("=u2") * 257).tobytes(), "raw", "I;16N"),
    "I of 8 bits": Image.fromarray(GREY).convert("I"),
    "I of 16 bits": Image.fromarray(GREY.astype(np.int32) * 257),
    "I of 24 bits": Image.fromarray(GREY.astype(np.int32) * 65793),
    "I of 31 bits": Image.fromarray((GREY * ((2**31 - 1) / 255)).astype(np.int32)),
    "F to 1": Image.fromarray(GREY.astype(np.float32) / 255),
    "F to 255": Image.fromarray(GREY).convert("F"),
    "F to 65535": Image.fromarray(GREY.astype(np.float32) * 257),
}


class TestDeepGrey:
    """Grey images of more than 8 bits, which Pillow's conversion would clip to white."""

    @pytest.mark.parametrize("kind", DEEP)
    def test_it_is_scaled(self, kind):
        assert DEEP[kind].mode == kind.split()[0]
        assert np.array_equal(np.asarray(open_image(DEEP[kind])), GREY[:, :, None].repeat(3, 2))

    @pytest.mark.parametrize(
        ("kind", "suffix"),
        [("I;16", "png"), ("I;16", "tiff"), ("I;16B", "tiff"), ("I of 31 bits", "tiff"), ("F to 1", "tiff")],
    )
    def test_the_cat_stays_a_cat(self, endpoint, kind, suffix):
        file = io.BytesIO()
        DEEP[kind].save(file, suffix)
        answer = endpoint({"inputs": file.getvalue()})
        assert answer == endpoint({"inputs": png(Image.fromarray(GREY))})
        assert answer[0]["label"] == "cat"

    @pytest.mark.parametrize(
        ("values", "mode"),
        [
            ([-1000, 3000], "I"),
            ([-0.5, 1.0], "F"),
            ([0.0, float("nan")], "F"),
            ([0.0, float("inf")], "F"),
            ([0.0, 1e12], "F"),
        ],
    )
    def test_other_ranges_are_refused_by_name(self, values, mode):
        image = Image.fromarray(np.array([values], np.int32 if mode == "I" else np.float32))
        with pytest.raises(ValueError, match=rf"Expected values from 0 to .* in a grey image of mode {mode}, got "):
            open_image(image)

    def test_other_modes_stay_as_pillow_converts_them(self):
        colour = Image.open(CAT).convert("RGBA")
        for image in (colour, *(colour.convert(mode) for mode in ("1", "L", "LA", "P", "PA", "CMYK", "YCbCr"))):
            assert open_image(image).tobytes() == image.convert("RGB").tobytes()


def test_the_limit_itself_is_an_image():
    open_image(Image.new("L", (MAX_PIXELS // 4096, 4096)))


@pytest.mark.parametrize("path", ["", "somebody/perceiver", "docs"])
def test_only_a_folder_is_served(path):
    with pytest.raises(ValueError, match="Expected the folder of a checkpoint"):
        EndpointHandler(path)
