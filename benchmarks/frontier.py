"""Accuracy against multiply-accumulates and against measured time, of all families and static networks side by side.

    python benchmarks/frontier.py [CHECKPOINT...] --dataset uoft-cs/cifar10 --fast --plot frontier.png --json frontier.json

By default all folders in `checkpoints/` and in `benchmarks/baselines/`, which has static networks trained by the families'
recipe; `benchmarks/eight_epochs/` has all systems after 8 epochs. Settings are chosen on other images than those reported,
as by `visual-perceiver frontier`.
Of each kind of a network's settings those are timed that are Pareto-efficient on the images for choosing. All are timed in
turn, in eager PyTorch or with `--fast` in ONNX Runtime: one image after the other, the mean of `SINGLE` images, and batches.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hf_visual_perceiver.benchmark.timing import interleaved
from hf_visual_perceiver.cli.options import dataset_label, model_label
from hf_visual_perceiver.data.images import ImageDataset, load_images
from hf_visual_perceiver.evaluation.evaluate import pixel_batches
from hf_visual_perceiver.evaluation.frontier import (
    FIXED,
    Frontier,
    Point,
    check_names,
    draw_points,
    efficient,
    forward_at,
    frontier_title,
    measure_points,
)
from hf_visual_perceiver.evaluation.plots import save_figure
from hf_visual_perceiver.inference.loading import default_dataset, load_model
from hf_visual_perceiver.modeling import FAMILIES
from hf_visual_perceiver.modeling.static_classifier import StaticConfig
from hf_visual_perceiver.utils.bundled import shipped
from hf_visual_perceiver.utils.conditions import command_line, conditions_line, measurement_conditions
from hf_visual_perceiver.utils.console import print_error, run_command
from hf_visual_perceiver.utils.files import check_picture, check_writable, write_json
from hf_visual_perceiver.utils.tables import markdown_table


BASELINES = Path(__file__).parent / "baselines"
SINGLE = 64  # a call at batch size 1 classifies as many images, because the cost of some settings depends on the image
# Milliseconds per image of each point that is timed, by batch size.
Times = Mapping[Point, Mapping[int, float]]


def default_folders() -> dict[str, Path]:
    """The folders in `checkpoints/` and `benchmarks/baselines/` that hold a checkpoint, by name."""
    places = (shipped("checkpoints"), BASELINES)
    return {path.parent.name: path.parent for place in places for path in sorted(place.glob("*/config.json"))}


def load_networks(checkpoints: Sequence[str] | None) -> dict[str, Any]:
    """Load checkpoints, by their names in results; None is all of `default_folders`.

    Raises:
        ValueError: If a given checkpoint cannot be loaded, two have the same name, or there is none.
    """
    if checkpoints:
        check_names([model_label(name) for name in checkpoints])
        return {model_label(name): load_model(name) for name in checkpoints}
    found = {}
    for name, folder in default_folders().items():
        try:
            found[name] = load_model(str(folder))
        except ValueError as error:
            print_error(f"{name} is left out: {error}")
    if not found:
        raise ValueError("Expected a checkpoint in checkpoints/ that can be loaded, got none.")
    return found


def in_form(networks: Mapping[str, Any], fast: bool) -> Mapping[str, Any]:
    """The networks as they are, or in ONNX Runtime with torch's number of threads."""
    return {name: model.optimize_for_inference() for name, model in networks.items()} if fast else networks


def trained_epochs(folders: Mapping[str, str | Path]) -> dict[str, int]:
    """Epochs that checkpoints were trained for, by name, of those that say so in their folder."""
    found = {}
    for name, folder in folders.items():
        path = Path(folder, "training.json")
        if path.is_file():
            facts = json.loads(path.read_text())
            stages = [facts, facts.get("earlier_training") or {}]
            found[name] = round(sum(stage.get("epochs") or 0 for stage in stages))
    return found


def time_points(
    networks: Mapping[str, Any],
    points: Sequence[Point],
    data: ImageDataset,
    batch_sizes: Sequence[int],
    repetitions: int,
    progress: bool = True,
) -> dict[Point, dict[int, float]]:
    """Time settings of several networks in turn; milliseconds per image by batch size, medians over repetitions.

    Args:
        networks: Models on the CPU, by name.
        points: The settings, as measured by `measure_points`.
        data: Images, of which the first are classified: `SINGLE` or more.
        batch_sizes: Images per forward pass.
        repetitions: How often all settings are run.
        progress: Whether to show progress on stderr.

    Raises:
        ValueError: If a batch size or the number of repetitions is below 1, or there are too few images.
    """
    found: dict[Point, dict[int, float]] = {point: {} for point in points}
    for size in batch_sizes:
        if size < 1:
            raise ValueError(f"Expected a batch size of at least 1, got {size}.")
        count = size * -(-SINGLE // size)  # whole batches
        if len(data) < count:
            raise ValueError(f"Expected at least {count} images to time batches of {size} on, got {len(data)}.")
        images = data.subset(slice(count))
        batches = {name: [x for _, x in pixel_batches(model, images, size)] for name, model in networks.items()}
        runs = {
            f"{point.model}, {point.setting}": Passes(forward_at(networks[point.model], point), batches[point.model])
            for point in points
        }
        seconds = interleaved(runs, repetitions, torch.device("cpu"), f"batch {size}", progress)
        for point, times in zip(points, seconds.values(), strict=True):
            found[point][size] = 1000 * statistics.median(times) / count
    return found


class Passes:
    """Forward passes of several batches."""

    def __init__(self, forward: Any, batches: Sequence[torch.Tensor]):
        self.forward, self.batches = forward, batches

    def __call__(self) -> None:
        for pixels in self.batches:
            self.forward(pixels)


def timed_points(points: Sequence[Point]) -> list[Point]:
    """The efficient settings of each kind of each network, ascending in cost."""
    kinds = dict.fromkeys((point.model, point.kind) for point in points)
    return [p for kind in kinds for p in efficient([point for point in points if (point.model, point.kind) == kind])]


def leaders_table(frontier: Frontier, epochs: Mapping[str, int]) -> str:
    """The best accuracy of each network within each limit of MACs, in Markdown; the best of all is bold."""
    headers, *cells = frontier.table()
    columns = list(zip(*(points for _, _, points in frontier.rows()), strict=True))
    for column, points in enumerate(columns, start=2):
        best = max((point.accuracy for point in points if point), default=None)
        for row, point in zip(cells, points, strict=True):
            if point and point.accuracy == best:
                row[column] = f"**{row[column]}**"
    cells = [[row[0], row[1], str(epochs.get(row[0], "")), *row[2:]] for row in cells]
    return markdown_table([*headers[:2], "epochs", *headers[2:]], cells, left=2)


def budgets_table(times: Times) -> str:
    """Accuracy, MACs and time of the fixed budgets, in Markdown."""
    sizes = list(next(iter(times.values())))
    headers = ["network", "budget", "MACs (M)", "accuracy (%)", *(f"ms per image, batch {size}" for size in sizes)]
    rows = [
        [
            point.model,
            point.setting,
            f"{point.macs / 1e6:.1f}",
            f"{100 * point.accuracy:.2f} ± {100 * point.standard_error:.2f}",
            *(f"{ms[size]:.3g}" for size in sizes),
        ]
        for point, ms in times.items()
        if point.kind == FIXED
    ]
    return markdown_table(headers, rows, left=2)


def shade(colour: str, number: int) -> str:
    """A colour, lighter or darker by the number of a network in its family, so that its marks are told apart."""
    towards, share = ((1, 0), (1, 0.45), (0, 0.45), (1, 0.65))[number % 4]
    return to_hex([(1 - share) * channel + share * towards for channel in to_rgb(colour)])


def figure_of(
    frontier: Frontier, times: Times, families: Mapping[str, str], batch_size: int, epochs: Mapping[str, int]
) -> Figure:
    """Accuracy against MACs, and against milliseconds per image at a batch size; a family has shades of one colour."""
    kinds = [*FAMILIES, StaticConfig.model_type]
    styles: dict[str, tuple[str, int]] = {}
    for model, family in families.items():
        number = sum(families[other] == family for other in styles)
        styles[model] = (shade(f"C{kinds.index(family) % 10}", number), number)
    figure = Figure(figsize=(12, 6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    handles = draw_points(left, frontier.points, styles)
    for handle in handles:
        if handle.get_label() in epochs:
            handle.set_label(f"{handle.get_label()}, {epochs[str(handle.get_label())]} epochs")
    what = "one image" if batch_size == 1 else f"batch {batch_size}"
    draw_points(right, frontier.points, styles, lambda point: times[point][batch_size], f"ms per image, {what}")
    right.set_ylabel("")
    for axes in (left, right):
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    hardware, threads = (frontier.conditions.get(key) for key in ("hardware", "threads"))
    left.set_title(frontier_title(frontier), fontsize=10)
    right.set_title(f"{hardware}, threads {threads}, {frontier.conditions.get('form')}", fontsize=10)
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def main(
    checkpoints: Annotated[list[str] | None, typer.Argument(help="By default all in checkpoints/.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub id or folder; by default the sample in the package.")] = None,
    dataset_name: Annotated[str | None, typer.Option(help="Name of the dataset in the result.")] = None,
    split: Annotated[str, typer.Option(help="Split to report and time on.")] = "test",
    choose: Annotated[str, typer.Option(help="Split on which settings are chosen.")] = "train[-5000:]",
    macs: Annotated[list[float], typer.Option(help="MACs limit in millions; repeat.")] = [10, 20, 40, 60],  # noqa: B006
    batch_size: Annotated[list[int], typer.Option(help="To time; repeat. The plot has the last.")] = [1, 256],  # noqa: B006
    repetitions: Annotated[int, typer.Option(min=1, help="Of all settings.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the timed calls.")] = 1,
    fast: Annotated[bool, typer.Option("--fast", help="Measure and time in ONNX Runtime.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw to this .png, .svg or .pdf.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")] = None,
) -> None:
    """Measure and print."""
    if plot is not None:
        check_picture(plot)
    for path in (plot, json_file):
        if path is not None:
            check_writable(path)
    source = dataset or default_dataset()
    data, choosing = load_images(source, split), load_images(source, choose)
    networks = load_networks(checkpoints)
    # Of one form, in which accuracy is measured with all cores and time with `threads`.
    points = [p for name, model in in_form(networks, fast).items() for p in measure_points(name, model, data, choosing)]
    torch.set_num_threads(threads)
    timed = in_form(networks, fast)
    times = time_points(timed, timed_points(points), data, batch_size, repetitions)
    conditions = measurement_conditions(
        dtype="float32",
        form="onnxruntime" if fast else "eager",
        images=len(data),
        images_to_choose_by=len(choosing),
        dataset=dataset_label(dataset, dataset_name),
        split=split,
        chosen_on=choose,
        repetitions=repetitions,
        command=command_line(),
    )
    frontier = Frontier(points, [1e6 * limit for limit in macs], conditions)
    families = {name: model.config.model_type for name, model in networks.items()}
    names = {model_label(name): name for name in checkpoints or []}
    epochs = trained_epochs(names or default_folders())
    print(f"{leaders_table(frontier, epochs)}\n\n{budgets_table(times)}\n\n{conditions_line(conditions)}")
    if json_file:
        rows = [{**asdict(p), "family": families[p.model], "ms_per_image": times.get(p)} for p in points]
        write_json(json_file, {**frontier.to_dict(), "points": rows})
    if plot:
        save_figure(figure_of(frontier, times, families, batch_size[-1], epochs), plot)


if __name__ == "__main__":
    run_command(main)
