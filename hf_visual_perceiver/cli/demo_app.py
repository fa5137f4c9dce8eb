"""`visual-perceiver demo-app`."""

from typing import Annotated

import typer

from hf_visual_perceiver.cli.options import DeviceOption, ModelArgument, ModelOption, chosen_model


def demo_app_command(
    checkpoint: ModelArgument = None,
    model: ModelOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all network interfaces.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port; by default the first free one from 7860.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Serve a web page that classifies images at any K and t; needs the extra `demo`."""
    from hf_visual_perceiver.hub.space.demo import Demo
    from hf_visual_perceiver.inference.loading import choose_device

    try:
        from hf_visual_perceiver.hub.space.app import build_app, launch
    except ModuleNotFoundError as error:
        raise ValueError(
            f'Expected Gradio to be installed, got "{error}": `pip install "hf-visual-perceiver[demo]"`, or `pip install -e ".[demo]"` in a checkout.'
        ) from error
    launch(build_app(Demo.load(chosen_model(checkpoint, model), device=choose_device(device))), host, port)
