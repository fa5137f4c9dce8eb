"""Export an architecture's graphs into the package: `python -m hf_visual_perceiver.inference.ship_graphs NAME`.

NAME is a checkpoint's folder or Hub id. The graphs are for its architecture and number of classes, without weights.
"""

from typing import Annotated

import typer

from hf_visual_perceiver.inference.loading import load_model
from hf_visual_perceiver.inference.onnx_graphs import export_stage, graphs_key, write_graphs
from hf_visual_perceiver.inference.onnx_perceiver import SHIPPED, architecture_of
from hf_visual_perceiver.inference.stages import stages_of
from hf_visual_perceiver.modeling.engines import fold_batch_norms


def main(names: Annotated[list[str], typer.Argument(help="Checkpoints: folders or Hub ids.")]) -> None:
    """Export the graphs of checkpoints' architectures into the package."""
    for name in names:
        model = load_model(name).eval()
        fold_batch_norms(model)
        key = graphs_key(architecture_of(model.config, model.num_labels))
        stages = stages_of(model.visual_perceiver, model.head)
        write_graphs(SHIPPED / key, key, {stage: export_stage(piece) for stage, piece in stages.items()})
        print(f"{name}: {SHIPPED / key}")


if __name__ == "__main__":
    typer.run(main)
