"""The layout of the app, in Gradio."""

import html
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr

from hf_visual_perceiver.hub.space.demo import Demo, Picture
from hf_visual_perceiver.hub.space.draw import draw_curves, show_answer, show_message, show_tradeoff
from hf_visual_perceiver.modeling.handler import MAX_PIXELS, open_image


NO_IMAGE = "Drop an image, take one with the camera, or click an example."
LEAST_THRESHOLD = 0.3
FILE_SIZE = "64mb"
# In seconds: every ten minutes, uploaded files older than an hour are removed.
DELETE = (600, 3600)


def build_app(demo: Demo) -> gr.Blocks:
    """Build the page: an image and sliders for K and t on the left, the result on the right.

    Args:
        demo: The checkpoint.
    """
    K, t = demo.start
    Q, threshold = demo.config.num_queries, 1.0 if t is None else min(1.0, float(t))
    examples = [str(path) for path in demo.examples]
    curves = None if demo.evaluation is None else draw_curves(demo.evaluation)

    @lru_cache(maxsize=32)  # Gradio names cached files by their content, so they never change
    def look(path: str) -> Picture:
        with Path(path).open("rb") as file:
            return demo.look(open_image(file))

    def show(path: str | None, num_active_queries: int, dqs_threshold: float) -> tuple[str, str]:
        """Render both tabs."""
        if path is None:
            return show_message(NO_IMAGE), show_tradeoff(demo, curves, None)
        try:
            picture = look(path)
        except (OSError, ValueError) as error:
            message = f"Cannot show this file. {_reason(error)}"
            return show_message(message, wrong=True), show_tradeoff(demo, curves, None)
        # At 1 no query is dropped, so the comparison of queries is skipped.
        answer = demo.answer(picture, int(num_active_queries), None if dqs_threshold >= 1 else dqs_threshold)
        return show_answer(demo, picture, answer), show_tradeoff(demo, curves, answer)

    # Images stay in this server's cache for an hour; nothing is sent anywhere else.
    with gr.Blocks(title="Visual Perceiver", analytics_enabled=False, delete_cache=DELETE) as app:
        gr.HTML(_header(demo), apply_default_css=False)
        with gr.Row():
            with gr.Column(scale=1, min_width=290):
                image = gr.Image(
                    value=examples[0] if examples else None,
                    type="filepath",
                    sources=["upload", "webcam", "clipboard"],
                    label="Image",
                    height=250,
                    elem_id="image",
                    buttons=[],
                )
                # Gradio would open the file before the limit on pixels is checked, and has no message for invalid
                # images.
                image.preprocess = _path  # type: ignore[method-assign]
                if examples:
                    gr.Examples(examples, image, label="Examples")
                queries = gr.Slider(
                    1,
                    Q,
                    value=K,
                    step=1,
                    label="K: number of queries",
                    info=f"The first K of {Q}",
                    elem_id="queries",
                )
                similarity = gr.Slider(
                    min(LEAST_THRESHOLD, threshold),
                    1,
                    value=threshold,
                    step=0.01,
                    label="t: similarity threshold",
                    info="1 keeps all queries",
                    elem_id="threshold",
                )
            with gr.Column(scale=3, min_width=560), gr.Tabs():
                with gr.Tab("This image"):
                    result = gr.HTML(show_message(NO_IMAGE), elem_id="result", apply_default_css=False)
                with gr.Tab("Trade-off"):
                    curve = gr.HTML(show_tradeoff(demo, curves, None), elem_id="tradeoff", apply_default_css=False)
        gr.on(
            [app.load, image.change, queries.change, similarity.change],
            show,
            [image, queries, similarity],
            [result, curve],
            show_progress="hidden",
            trigger_mode="always_last",  # while a slider moves, only its last position is computed
            concurrency_limit=1,  # concurrent runs would distort the measured times
            api_name="show",
        )
    return app


def launch(app: gr.Blocks, host: str | None = None, port: int | None = None) -> None:
    """Serve the app, by default on 127.0.0.1; `host` or a Space's environment can change that."""
    # System fonts, so that none are fetched over the network.
    theme = gr.themes.Default(
        primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    app.launch(
        server_name=host,
        server_port=port,
        share=False,
        max_file_size=FILE_SIZE,
        theme=theme,
        css_paths=[Path(__file__).with_name("style.css")],
        footer_links=["api", "gradio", "settings"],
        run_history=False,
        ssr_mode=False,
    )


def _reason(error: Exception) -> str:
    """The reason why a file cannot be shown, without its path on this machine."""
    if isinstance(error, OSError) or error.__cause__ is not None:
        return "It is damaged, or not an image in a supported format."
    return str(error)


def _path(payload: Any) -> str | None:
    """The path of an uploaded file, which Gradio has checked."""
    return None if payload is None else payload.path


def _header(demo: Demo) -> str:
    Q = demo.config.num_queries
    return (
        f'<div class="vp-header"><h1>Visual Perceiver: choose the compute per image</h1><p>The network reads an image with {Q} learned '
        "queries; fewer queries cost less. K is the number of queries to use. t drops queries whose cosine similarity to an "
        f"earlier one is above t. Model: {html.escape(demo.name)}. "
        f"Images of up to {MAX_PIXELS // 10**6} megapixels.</p></div>"
    )
