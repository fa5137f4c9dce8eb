"""`visual-perceiver demo-app`."""

from typing import Annotated

import typer

from ..loading import choose_device, default_model
from ..options import DeviceOption, ModelOption
from .demo import Demo


def demo_app_command(
    model: ModelOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every network of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="By default the first free one from 7860 on.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """A page that shows what the two knobs do to one image; needs the extra `demo`."""
    try:
        from .app import build_app, launch
    except ModuleNotFoundError as error:
        raise ValueError(
            f'Expected Gradio, got "{error}": `pip install "hf-visual-perceiver[demo]"`, or `pip install -e ".[demo]"` in a checkout.'
        ) from error
    launch(build_app(Demo.load(model or default_model(), device=choose_device(device))), host, port)
