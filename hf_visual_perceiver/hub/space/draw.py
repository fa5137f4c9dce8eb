"""The app's results as HTML and a figure. Colour marks queries in use; everything else is grey."""

import base64
import html
import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from hf_visual_perceiver.evaluation.evaluate import Evaluation
from hf_visual_perceiver.evaluation.plots import tradeoff_figure
from hf_visual_perceiver.hub.space.demo import Answer, Demo, Expected, Picture


# Okabe and Ito's orange, which colour-blind people can tell from grey; the style sheet uses it too.
ATTENTION = (230, 159, 0)
LABELS = 5
# Largest number of columns at which the queries' numbers are legible; beyond it, only tooltips show them.
LEGIBLE = 10
# The range of greys of a picture, narrowed so that orange stands out even where the picture is white or black.
GREY = (40, 170)


def show_answer(demo: Demo, picture: Picture, answer: Answer) -> str:
    """Render the first tab: the numbers, the probabilities, and each query's attention.

    Example:
        >>> from hf_visual_perceiver.inference.loading import default_model
        >>> demo = Demo.load(default_model())
        >>> picture = demo.look(Image.new("RGB", (32, 32)))
        >>> show_answer(demo, picture, demo.answer(picture, 16))[:40]
        '<div class="vp-answer" data-used="16" da'
    """
    return (
        f'<div class="vp-answer" data-used="{answer.active.sum()}" data-macs="{answer.macs}">'
        f"{show_numbers(answer)}"
        f'<div class="vp-columns"><div>{show_queries(picture, answer)}</div>'
        f"<div>{show_probabilities(demo.config.label_names, picture, answer)}{show_pictures(picture, answer)}</div></div></div>"
    )


def show_message(text: str, wrong: bool = False) -> str:
    """Render a sentence in place of a result.

    Example:
        >>> show_message("No <image>.")
        '<div class="vp-message" role="status">No &lt;image&gt;.</div>'
    """
    kind, role = ("vp-message vp-wrong", "alert") if wrong else ("vp-message", "status")
    return f'<div class="{kind}" role="{role}">{html.escape(text)}</div>'


def show_numbers(answer: Answer) -> str:
    """Render the queries, MACs and time in comparison with the full network."""
    used, Q, K = int(answer.active.sum()), len(answer.active), answer.num_active_queries
    share = answer.macs / answer.full_macs
    repetitions = "once" if answer.repetitions == 1 else f"median of {answer.repetitions}"
    dropped = "" if answer.dqs_threshold is None else f", {K - used} dropped by t"
    asked = f"all {Q} queries{dropped}" if K == Q else f"first {K} queries{dropped}"
    tiles = [
        ("Queries used", f"{used}", f"of {Q}", used / Q, asked),
        (
            "Multiply-accumulates",
            f"{100 * share:.0f}\u00a0%",
            "of the full network",
            share,
            f"{answer.macs / 1e6:,.1f} of {answer.full_macs / 1e6:,.1f} million",
        ),
        (
            "Time",
            f"{100 * answer.relative_time:.0f}\u00a0%",
            "of the full network",
            answer.relative_time,
            f"of {1e3 * answer.full_seconds:,.1f} ms for one image on this machine; {repetitions}",
        ),
    ]
    return f'<div class="vp-tiles">{"".join(_tile(*tile) for tile in tiles)}</div>'


def _tile(title: str, number: str, unit: str, share: float, detail: str) -> str:
    return (
        f'<div class="vp-tile"><div class="vp-title">{title}</div>'
        f'<div><span class="vp-number">{number}</span> <span class="vp-unit">{unit}</span></div>'
        f'<div class="vp-bar"><i style="width:{100 * min(1, share):.1f}%"></i></div>'
        f'<div class="vp-detail">{detail}</div></div>'
    )


def show_probabilities(names: list[str], picture: Picture, answer: Answer) -> str:
    """Render the most probable labels, with a tick at the full network's probability."""
    rows = []
    for i in np.argsort(-answer.probabilities, kind="stable")[:LABELS]:
        p, full = float(answer.probabilities[i]), float(picture.full_probabilities[i])
        rows.append(
            f'<li data-probability="{p:.4f}"><span title="{html.escape(names[i])}">{html.escape(names[i])}</span>'
            f'<div class="vp-bar"><i style="width:{100 * p:.1f}%"></i><b style="left:{100 * full:.1f}%"></b></div>'
            f"<span>{100 * p:.1f} %</span></li>"
        )
    return (
        f'<h3>Answer</h3><ol class="vp-labels">{"".join(rows)}</ol>'
        '<p class="vp-detail"><b class="vp-tick"></b> the full network\'s probability</p>'
    )


def show_queries(picture: Picture, answer: Answer) -> str:
    """Render each query's attention over the picture; unused queries are grey, and their tooltip says why."""
    Q, K = len(answer.active), answer.num_active_queries
    columns = math.ceil(math.sqrt(Q))
    dense = " vp-dense" if columns > LEGIBLE else ""
    cells = "".join(_cell(picture, answer, i) for i in range(Q))
    used = int(answer.active.sum())
    legend = [
        ("vp-kept", f"used: {used}"),
        ("vp-dropped", f"dropped by t: {K - used}"),
        ("vp-beyond", f"beyond K: {Q - K}"),
    ]
    items = "".join(f'<span><i class="{kind}"></i>{text}</span>' for kind, text in legend)
    view = _address(ImageOps.grayscale(picture.view).point(_squeeze))
    return (
        f'<h3>Attention maps of the {Q} queries</h3><p class="vp-legend">{items}</p>'
        f'<div class="vp-grid{dense}" style="--vp-columns:{columns};--vp-view:url({view})">{cells}</div>'
    )


def _cell(picture: Picture, answer: Answer, i: int) -> str:
    if i >= answer.num_active_queries:
        return f'<div class="vp-query vp-beyond" title="Query {i + 1} is beyond K."><span>{i + 1}</span></div>'
    title = f"Query {i + 1} is used."
    if i:
        nearest = int(answer.nearest[i])
        cosine = f"{picture.similarities[i, nearest]:.2f}"
        title = f"Query {i + 1} is used. The most similar earlier query is {nearest + 1} (cosine {cosine})."
        if not answer.active[i]:
            title = f"Query {i + 1} is dropped: it is too similar to query {nearest + 1} (cosine {cosine})."
    if not answer.active[i]:
        return f'<div class="vp-query vp-dropped" title="{title}"><span>{i + 1}</span></div>'
    overlay = _address(attention_overlay(picture.attention[i]))
    return f'<div class="vp-query vp-kept" title="{title}"><img src="{overlay}" alt=""><span>{i + 1}</span></div>'


def show_pictures(picture: Picture, answer: Answer) -> str:
    """Render the model's input, and the mean attention of all used queries."""
    together = _address(attention_overlay(picture.attention[answer.active].mean(0)))
    width, height = picture.view.size
    return (
        f'<div class="vp-pictures"><figure><img src="{_address(picture.view)}" alt="">'
        f"<figcaption>model input, {width}x{height} pixels</figcaption></figure>"
        f'<figure class="vp-together" style="--vp-view:url({_address(ImageOps.grayscale(picture.view).point(_squeeze))})">'
        f'<img src="{together}" alt=""><figcaption>mean attention of the used queries</figcaption></figure></div>'
    )


def attention_overlay(attention: np.ndarray) -> Image.Image:
    """An image with one pixel per patch, whose opacity is the attention weight (h, w), scaled to the maximum.

    Example:
        >>> attention_overlay(np.array([[0.0, 0.5], [0.25, 0.25]])).getpixel((1, 0))
        (230, 159, 0, 235)
    """
    alpha = np.uint8(np.round(235 * attention / max(float(attention.max()), 1e-12)))
    colour = np.broadcast_to(np.array(ATTENTION, np.uint8), (*attention.shape, 3))
    return Image.fromarray(np.dstack([colour, alpha]))


@dataclass(frozen=True)
class Curves:
    """The trade-off figure as SVG, drawn once; the markers of the current setting are drawn on top.

    Attributes:
        svg: The figure, without markers.
        size: (width, height) of the figure in points.
        axes: (left, top, right, bottom) of the plot area in the figure.
        limits: Axis limits (lowest, highest): of MACs in millions, and of accuracy in percent.
    """

    svg: str
    size: tuple[float, float]
    axes: tuple[float, float, float, float]
    limits: tuple[tuple[float, float], tuple[float, float]]

    def place(self, macs: float, accuracy: float = 0.0) -> tuple[float, float]:
        """The position of (MACs, accuracy as a fraction) in the figure, clamped to the plot area."""
        (left, top, right, bottom), ((x0, x1), (y0, y1)) = self.axes, self.limits
        x = left + (right - left) * (macs / 1e6 - x0) / (x1 - x0)
        y = bottom + (top - bottom) * (100 * accuracy - y0) / (y1 - y0)
        return min(max(x, left), right), min(max(y, top), bottom)


def draw_curves(evaluation: Evaluation) -> Curves:
    """Draw the measured curves.

    Example:
        >>> from hf_visual_perceiver.inference.loading import default_model
        >>> demo = Demo.load(default_model())
        >>> draw_curves(demo.evaluation).size
        (504.0, 324.0)
    """
    figure = tradeoff_figure(evaluation)
    figure.set_dpi(72)  # SVG's points
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text, axes = file.getvalue(), figure.axes[0]
    width, height, left, bottom, right, top = map(float, (*figure.bbox.size, *axes.bbox.extents))
    return Curves(
        svg=text[text.index("<svg") : text.rindex("</svg>")],
        size=(width, height),
        axes=(left, height - top, right, height - bottom),
        limits=(axes.get_xlim(), axes.get_ylim()),
    )


def show_tradeoff(demo: Demo, curves: Curves | None, answer: Answer | None) -> str:
    """Render the second tab: the measured curves, with the current setting."""
    if demo.evaluation is None or curves is None:
        return show_message(
            "This checkpoint has no evaluation.json, so its accuracy is not known. "
            "`visual-perceiver evaluate --model FOLDER --write-card` writes one."
        )
    expected = None if answer is None else demo.expected(answer.num_active_queries, answer.dqs_threshold)
    conditions = demo.evaluation.conditions
    accuracy = "" if expected is None else f' data-accuracy="{expected.accuracy:.4f}"'
    return (
        f'<div class="vp-tradeoff"{accuracy}><div class="vp-figure">{curves.svg}{_marks(curves, answer, expected)}</svg></div>'
        f"<p>{html.escape(describe_setting(answer, expected))}</p>"
        f'<p class="vp-detail">Measured on {html.escape(str(conditions.get("dataset", "images")))} '
        f"({html.escape(str(conditions.get('split', '')))}). Numbers at the points are K, or t with all queries.</p></div>"
    )


def _marks(curves: Curves, answer: Answer | None, expected: Expected | None) -> str:
    """Render a star at the setting's expected accuracy and cost, and a line at the cost of this image."""
    marks = ""
    if answer is not None:
        x, _ = curves.place(answer.macs)
        _, top, _, bottom = curves.axes
        # The text is beside the line, on the side with more room, and low, where there are no curves.
        side, anchor = (4, "start") if x < curves.size[0] / 2 else (-4, "end")
        marks += (
            f'<line class="vp-cost" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
            f'<text x="{x + side:.1f}" y="{bottom - 60:.1f}" text-anchor="{anchor}">this image</text>'
        )
    if expected is not None:
        x, y = curves.place(expected.macs, expected.accuracy)
        corners = (
            (radius * math.sin(math.pi * i / 5), -radius * math.cos(math.pi * i / 5))
            for i, radius in enumerate([9, 3.8] * 5)
        )
        points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
        marks += f'<polygon class="vp-star" points="{points}"/>'
    return marks


def describe_setting(answer: Answer | None, expected: Expected | None) -> str:
    """Describe the setting and its accuracy in words."""
    if answer is None:
        return "Choose an image to mark the current setting and its cost."
    parts = [f"K = {answer.num_active_queries}"]
    parts += [] if answer.dqs_threshold is None else [f"t = {answer.dqs_threshold:g}"]
    setting = ", ".join(parts)
    if expected is None:
        return f"The accuracy at {setting} was not measured and cannot be interpolated. The dashed line marks the cost of this image."
    how = "measured" if expected.measured else "interpolated between the two nearest measurements"
    return f"The star marks {setting}: {100 * expected.accuracy:.1f} % accuracy at {expected.macs / 1e6:.1f} million multiply-accumulates on average ({how}). The dashed line marks the cost of this image."


def _squeeze(grey: int) -> int:
    low, high = GREY
    return low + grey * (high - low) // 255


def _address(image: Image.Image) -> str:
    """Encode a picture as a data URL."""
    file = io.BytesIO()
    image.save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
