"""`visual-perceiver demo-app`."""

from typing import Annotated

import typer

from hf_visual_perceiver.cli.options import DeviceOption, ModelArgument, ModelOption, chosen_model


def demo_app_command(
    checkpoint: ModelArgument = None,
    model: ModelOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 listens on all networks of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port; by default the first free one from 7860 on.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Serve a page that shows what the two knobs do to one image; needs the extra `demo`."""
    from hf_visual_perceiver.hub.space.demo import Demo
    from hf_visual_perceiver.inference.loading import choose_device

    try:
        from hf_visual_perceiver.hub.space.app import build_app, launch
    except ModuleNotFoundError as error:
        raise ValueError(
            f'Expected Gradio, got "{error}": `pip install "hf-visual-perceiver[demo]"`, or `pip install -e ".[demo]"` in a checkout.'
        ) from error
    launch(build_app(Demo.load(chosen_model(checkpoint, model), device=choose_device(device))), host, port)
