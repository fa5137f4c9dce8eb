"""Benchmark a checkpoint's time and memory on this machine: every budget, in each form of the model, side by side."""

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from hf_visual_perceiver.benchmark.timing import (
    GRAPH_WARMUPS,
    interleaved,
    matmul_peak,
    median_ratio,
    page_faults,
    peak_memory,
)
from hf_visual_perceiver.evaluation.evaluate import output_at
from hf_visual_perceiver.evaluation.plots import save_figure
from hf_visual_perceiver.modeling import Budget, ElasticConfig
from hf_visual_perceiver.utils.choices import FORMS
from hf_visual_perceiver.utils.memory import fitting


@dataclass(frozen=True)
class Rival:
    """Another network to time beside the model's forms."""

    run: Callable[[torch.Tensor], Any]  # the forward pass of a batch
    macs: int | None = None  # multiply-accumulates of one image
    dtype: torch.dtype | None = None  # dtype of the batch; None is that of the first form


@torch.no_grad()
def timm_rival(name: str, config: Any, device: torch.device, dtype: torch.dtype) -> Rival:
    """Create a timm classifier with random weights, for the images and classes of a config.

    Args:
        name: timm's name of the classifier.
        config: The config of the model to compare with.
        device: Device to compute on.
        dtype: Dtype to compute in.

    Raises:
        ValueError: If timm has no such classifier, or it does not take images of this size.

    Example:
        >>> from hf_visual_perceiver import VisualPerceiverConfig
        >>> config = VisualPerceiverConfig(num_labels=10)
        >>> rival = timm_rival("resnet10t", config, torch.device("cpu"), torch.float32)
        >>> rival.run(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    height, width = config.image_height_width
    try:
        cfg = timm.get_pretrained_cfg(name)
        arguments: dict[str, Any] = {"num_classes": len(config.label_names), "in_chans": config.num_channels}
        if cfg and cfg.fixed_input_size:
            arguments["img_size"] = (height, width)
        network = timm.create_model(name, **arguments).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, config.num_channels, height, width))
    except (RuntimeError, TypeError, ValueError, AssertionError, KeyError, IndexError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"Expected a timm classifier for {height}x{width} images, got {name!r}: {reason}") from error
    return Rival(network.to(device, dtype), counter.get_total_flops() // 2, dtype)


@dataclass(frozen=True)
class BenchmarkRow:
    """One form of the model, at one setting and batch size. Ratios are medians over repetitions."""

    batch_size: int
    form: str  # one of FORMS, with its dtype; or a rival's name
    setting: str
    used: float | None  # usage per image, such as queries: mean over the batch
    macs: float | None  # mean per image, by `count_macs`, even if folding saves some of them
    ms: float  # time per batch, median
    p50_ms: float | None  # median of single calls, equal to `ms`; None for larger batches
    p95_ms: float | None
    images_per_second: float
    relative_time: float | None  # relative to the full network in the same form
    relative_to_fixed: (
        float | None
    )  # for an adaptive budget, relative to the largest fixed one that costs no more, in the same form
    relative_to_first: (
        float  # to the first form at the same setting; for a rival, to the full network in the first form
    )
    share_of_peak: float | None  # share of the machine's measured matmul peak in the dtype of the images
    peak_mb: float | None  # peak memory of tensors made in the forward; unknown for ONNX Runtime
    page_faults: int | None  # page faults of one forward


@dataclass(frozen=True)
class Setting:
    """A budget on a given batch."""

    budget: Budget
    used: float
    macs: float
    nearest: Budget | None = None  # for an adaptive budget, the largest fixed one that costs no more

    @classmethod
    def of(cls, model: Any, pixels: torch.Tensor, budget: Budget) -> "Setting":
        """Measure a budget's usage and cost on these images."""
        config: ElasticConfig = model.config
        output = output_at(model, pixels, budget)
        macs = config.count_macs(budget, output).double().mean().item()
        share = min(1.0, macs / config.count_macs(Budget()))
        nearest = config.budget_for(share) if config.is_adaptive(budget) else None
        return cls(budget, output.used.double().mean().item(), macs, nearest)


@dataclass(frozen=True)
class Run:
    """A call to time, and the names of the other runs that its row is relative to."""

    form: str
    setting: str
    call: Callable[[], Any]
    dtype: torch.dtype
    first: str
    used: float | None = None
    macs: float | None = None
    full: str | None = None
    fixed: str | None = None
    torch_allocates: bool = True

    @property
    def name(self) -> str:
        return f"{self.form}, {self.setting}"


def forms_of(model: Any, forms: Sequence[str], dtypes: Sequence[torch.dtype]) -> dict[str, tuple[Any, torch.dtype]]:
    """The model in several forms and dtypes, by name.

    Raises:
        ValueError: If a form is not known.
    """
    result: dict[str, tuple[Any, torch.dtype]] = {}
    for dtype in dtypes:
        for form in forms:
            if form not in FORMS:
                raise ValueError(f"Expected forms among {', '.join(FORMS)}, got {form!r}.")
            needed = {"optimized": "optimize_for_inference", "int8": "optimize_for_inference"}
            if not hasattr(model, {**needed, "grouped": "set_ragged_backend"}.get(form, "forward")):
                raise ValueError(f"Expected a form that a {model.config.model_type} has, got {form!r}.")
            if form != "int8":
                result[f"{form} {str(dtype).removeprefix('torch.')}"] = (form_of(model, form, dtype), dtype)
            elif form not in result:  # int8 is one form for all dtypes, and takes images in float32
                result[form] = (model.optimize_for_inference(int8=True), torch.float32)
    if not result:
        raise ValueError("Expected at least one form and one dtype, got none.")
    return result


def form_of(model: Any, form: str, dtype: torch.dtype) -> Any:
    """The model in one form and dtype."""
    if form == "optimized":
        return model.optimize_for_inference(dtype)
    other = copy.deepcopy(model).to(dtype)
    if form == "grouped":
        other.set_ragged_backend("grouped")
    return torch.compile(other) if form == "compiled" else other


def benchmark(
    model: Any,
    images: torch.Tensor,
    batch_sizes: Sequence[int],
    budgets: Sequence[Budget] | None = None,
    forms: Sequence[str] = ("eager", "optimized"),
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    repetitions: int = 7,
    rivals: dict[str, Rival] | None = None,
    progress: bool = True,
    single_calls: int | None = None,
) -> list[BenchmarkRow]:
    """Time every setting of every form in turn, repetition after repetition.

    Args:
        model: A model in float32, on the device to measure.
        images: (n, C, H, W), normalised; repeated for larger batches.
        batch_sizes: Batch sizes; each is measured separately.
        budgets: Budgets to measure, beside the full network; None is the config's `budgets`. With an adaptive budget,
            the largest fixed one that costs no more than its mean on the batch is measured too.
        forms: Some of `FORMS`.
        dtypes: Each form is measured in each dtype.
        repetitions: How often all settings are run.
        rivals: Other networks, by name.
        progress: Whether to show progress on stderr.
        single_calls: Repetitions at batch size 1, of which the median and the 95th percentile are reported; None uses
            `repetitions`, without percentiles.

    Raises:
        ValueError: If an argument is out of range, or a batch does not fit in memory; the message names a size that
            does.
    """
    for batch_size in batch_sizes:
        if batch_size < 1:
            raise ValueError(f"Expected a batch size of at least 1, got {batch_size}.")
    contenders, device = forms_of(model, forms, dtypes), model.device
    measured = []
    for batch_size in batch_sizes:
        pixels = images.repeat(-(-batch_size // len(images)), 1, 1, 1)[:batch_size].to(device)
        planned = partial(
            plan,
            model,
            contenders=contenders,
            budgets=model.config.budgets() if budgets is None else budgets,
            rivals=rivals or {},
        )
        with fitting(lambda part: [run.call() for run in planned(part)], pixels):  # noqa: B023
            runs = planned(pixels)
            calls = {r.name: r.call for r in runs}
            warmups = 1 if device.type == "cpu" else GRAPH_WARMUPS
            count = single_calls if batch_size == 1 and single_calls is not None else repetitions
            times = interleaved(calls, count, device, f"batch {batch_size}", progress, warmups)
            faults = {r.name: page_faults(r.call) for r in runs}
            memory = {r.name: peak_memory(r.call, device) / 1e6 if r.torch_allocates else None for r in runs}
        measured.append((batch_size, runs, times, memory, faults))
    # Last, because its large matrix products would change how the allocator serves later runs.
    used = {run.dtype for _, runs, *_ in measured for run in runs}
    peaks = {dtype: matmul_peak(model, device, dtype) for dtype in used}
    return [
        _row(
            batch_size,
            run,
            times,
            memory[run.name],
            faults[run.name],
            peaks[run.dtype],
            percentiles=batch_size == 1 and single_calls is not None,
        )
        for batch_size, runs, times, memory, faults in measured
        for run in runs
    ]


def _row(
    batch_size: int,
    run: Run,
    times: dict[str, list[float]],
    peak_mb: float | None,
    faults: int | None,
    peak: float,
    percentiles: bool,
) -> BenchmarkRow:
    own, seconds = times[run.name], statistics.median(times[run.name])
    return BenchmarkRow(
        batch_size=batch_size,
        form=run.form,
        setting=run.setting,
        used=run.used,
        macs=run.macs,
        ms=1000 * seconds,
        p50_ms=1000 * seconds if percentiles else None,
        p95_ms=1000 * float(np.percentile(own, 95)) if percentiles else None,
        images_per_second=batch_size / seconds,
        relative_time=None if run.full is None else median_ratio(own, times[run.full]),
        relative_to_fixed=None if run.fixed is None else median_ratio(own, times[run.fixed]),
        relative_to_first=median_ratio(own, times[run.first]),
        share_of_peak=None if run.macs is None else run.macs * batch_size / seconds / peak,
        peak_mb=peak_mb,
        page_faults=faults,
    )


def plan(
    model: Any,
    pixels: torch.Tensor,
    contenders: dict[str, tuple[Any, torch.dtype]],
    budgets: Sequence[Budget],
    rivals: dict[str, Rival],
) -> list[Run]:
    """List the runs to time on a batch: all settings of each form, then the rivals."""
    config = model.config
    found = [Setting.of(model, pixels, budget) for budget in dict.fromkeys([*budgets, Budget()])]
    known = {setting.budget for setting in found}
    found += [
        Setting.of(model, pixels, near)
        for near in dict.fromkeys(s.nearest for s in found)
        if near and near not in known
    ]
    # Fixed budgets come first; both kinds ascend in cost.
    found.sort(key=lambda setting: (setting.nearest is not None, setting.macs))
    settings = {setting.budget.short(config.knobs): setting for setting in found}
    full, first = Budget().short(config.knobs), next(iter(contenders))
    runs = []
    for form, (network, dtype) in contenders.items():
        converted = pixels.to(dtype)
        torch_allocates = getattr(getattr(network, "engine", None), "torch_allocates", True)
        for name, setting in settings.items():
            call = partial(network, converted, **config.resolve(**setting.budget.kwargs))
            runs.append(
                Run(
                    form,
                    name,
                    call,
                    dtype,
                    f"{first}, {name}",
                    setting.used,
                    setting.macs,
                    full=f"{form}, {full}",
                    fixed=None if setting.nearest is None else f"{form}, {setting.nearest.short(config.knobs)}",
                    torch_allocates=torch_allocates,
                )
            )
    for form, rival in rivals.items():
        dtype = rival.dtype or contenders[first][1]
        call = partial(rival.run, pixels.to(dtype))
        runs.append(Run(form, "all", call, dtype, f"{first}, {full}", macs=rival.macs))
    return runs


def benchmark_table(rows: Sequence[BenchmarkRow], unit: str) -> Table:
    """The rows of one batch size, for the terminal."""
    table = Table(title=f"batch {rows[0].batch_size}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    percentiles = rows[0].p95_ms is not None
    headers = (
        "form",
        "setting",
        unit,
        "MACs (M)",
        *(("p50 (ms)", "p95 (ms)") if percentiles else ("ms",)),
        "images/s",
        "relative",
        "vs fixed",
        "vs first form",
    )
    for header in (*headers, "of peak", "MB", "page faults"):
        table.add_column(header, justify="left" if header in ("form", "setting") else "right", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before.form != row.form:
            table.add_section()
        table.add_row(
            row.form,
            row.setting,
            _number(row.used, ".1f"),
            _number(None if row.macs is None else row.macs / 1e6, ".1f"),
            f"{row.ms:.2f}",
            *([_number(row.p95_ms, ".2f")] if percentiles else []),
            f"{row.images_per_second:,.0f}",
            _number(row.relative_time, ".3f"),
            _number(row.relative_to_fixed, ".3f"),
            f"{row.relative_to_first:.3f}",
            _number(row.share_of_peak, ".0%"),
            _number(row.peak_mb, ".1f"),
            _number(row.page_faults, ",d"),
        )
    return table


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def plot_benchmark(rows: Sequence[BenchmarkRow], path: str | Path) -> None:
    """Plot time against multiply-accumulates, both relative to the full network, with one panel per batch size.

    A rival's values are relative to the full network in the first form.
    """
    sizes = list(dict.fromkeys(row.batch_size for row in rows))
    figure = Figure(figsize=(max(4 * len(sizes), 6), 5), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        axes.plot([0, 1], [0, 1], color="0.8", label="time proportional to MACs")
        of_size = [row for row in rows if row.batch_size == size and row.relative_time is not None]
        for number, form in enumerate(dict.fromkeys(row.form for row in of_size)):
            of_form = [row for row in of_size if row.form == form]
            full = max(row.macs or 0 for row in of_form if row.relative_to_fixed is None)
            for selected, style in ((False, "o-"), (True, "s")):
                chosen = sorted(
                    (row.macs / full, row.relative_time)
                    for row in of_form
                    if (row.relative_to_fixed is not None) == selected and row.macs and row.relative_time
                )
                if chosen:
                    label = f"{form}, adaptive" if selected else form
                    axes.plot(*zip(*chosen, strict=True), style, color=f"C{number}", label=label, markersize=5)
        full = max(row.macs or 0 for row in of_size if row.form == of_size[0].form and row.relative_to_fixed is None)
        for row in rows:
            if row.batch_size == size and row.relative_time is None and row.macs:
                axes.plot(
                    row.macs / full, row.relative_to_first, "k*", label=f"{row.form}, relative to {of_size[0].form}"
                )
        axes.set_title(f"batch {size}", fontsize=10)
        axes.set_xlabel("MACs relative to the full network")
        axes.set_ylabel("time relative to the full network")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    save_figure(figure, path)
