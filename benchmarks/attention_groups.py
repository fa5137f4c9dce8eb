"""What attention within groups of a packed batch costs on this machine, as `modeling/attention_groups.py` counts it.

    python benchmarks/attention_groups.py

Blocks of n images of L tokens, unpadded and padded, are timed in turn. A line through the medians, cost of a call plus cost
of each token, weighted so that small blocks count as much as large ones, gives the constants of `GroupCost`.

With `--form optimized` it is the CPU form's attention (`modeling/fast_inference.py`): packed batches of random lengths, in
random groups, and a fit of their times.
"""

from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch.nn import functional as F

from hf_visual_perceiver import VisualPerceiverConfig
from hf_visual_perceiver.loading import choose_device
from hf_visual_perceiver.modeling.attention_groups import AttentionGroup, GroupCost, padded
from hf_visual_perceiver.modeling.fast_inference import MixedLengths
from hf_visual_perceiver.modeling.ragged import attend_in_groups
from hf_visual_perceiver.timing import interleaved
from hf_visual_perceiver.training.conditions import measurement_conditions
from hf_visual_perceiver.training.console import run_command


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """As the model's, (n, H, L, d) x 3 -> (n, L, H, d)."""
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)


def line(tokens: list[int], seconds: list[float]) -> tuple[float, float]:
    """Seconds of a call and of a token: least squares of the relative error."""
    y = torch.tensor(seconds, dtype=torch.float64)
    x = torch.stack([torch.ones(len(tokens)), torch.tensor(tokens)], dim=1).double()
    call, token = torch.linalg.lstsq(x / y[:, None], torch.ones_like(y)[:, None]).solution.flatten().tolist()
    return call, token


def measure(heads: int, head_dim: int, device: torch.device, dtype: torch.dtype, repetitions: int) -> GroupCost:
    """The constants for heads of this number and width."""
    runs, sizes = {}, []
    for n in (1, 2, 4, 16):
        for length in (4, 8, 16, 24, 40, 64):
            group = AttentionGroup(0, n * length, n, length)
            lengths = torch.full((n,), length, device=device)
            qkv = torch.randn(n * length, 3, heads, head_dim, device=device, dtype=dtype).unbind(1)
            sizes.append(n * length)
            for kind, of_kind in (("equal", group), ("padded", padded(group, lengths))):
                runs[f"{kind} {n} {length}"] = partial(attend_in_groups, (of_kind,), dense_attention, *qkv)
    times = interleaved(runs, repetitions, device)
    medians = {name: sorted(seconds)[len(seconds) // 2] for name, seconds in times.items()}
    (call, token), (padded_call, padded_token) = (
        line(sizes, [seconds for name, seconds in medians.items() if name.startswith(kind)])
        for kind in ("equal", "padded")
    )
    return GroupCost(call / token, padded_call / token, padded_token / token)


def measure_optimized(heads: int, head_dim: int, dtype: torch.dtype, repetitions: int) -> GroupCost:
    """The constants of the CPU form."""
    runs, features = {}, []
    generator = torch.Generator().manual_seed(0)
    for trial in range(48):
        length, spread = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((8, 40), (1, 16)))
        lengths = (length + torch.randint(spread, (1024 // (length + spread),), generator=generator)).sort().values
        call = [0, 20, 100, 1000][trial % 4]  # from all groups alone to all together
        layout = MixedLengths(lengths, lengths.tolist(), int(lengths.sum()), heads, GroupCost(call, call, 1))
        alone = [group for group in layout.groups if group.rows is None]
        together = [group for group in layout.groups if group.rows is not None]
        places = [sum(group.images * group.length for group in groups) for groups in (alone, together)]
        features.append([1, len(alone), places[0], len(together), places[1]])
        qkv = torch.randn(int(lengths.sum()), 3 * heads * head_dim, dtype=dtype)
        runs[str(trial)] = partial(layout.attend, qkv, heads)
    times = interleaved(runs, repetitions, torch.device("cpu"))
    y = torch.tensor([sorted(seconds)[len(seconds) // 2] for seconds in times.values()], dtype=torch.float64)
    fit = torch.linalg.lstsq(torch.tensor(features).double() / y[:, None], torch.ones_like(y)[:, None]).solution
    _, call, token, padded_call, padded_token = fit.flatten().tolist()
    return GroupCost(call / token, padded_call / token, padded_token / token)


def main(
    architecture: Annotated[str, typer.Option(help="timm name.")] = "visual_perceiver_tiny_patch4_32",
    dtype: Annotated[str, typer.Option(help="Of the tokens.")] = "float32",
    repetitions: Annotated[int, typer.Option(help="Of all blocks.")] = 201,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    form: Annotated[str, typer.Option(help="eager, or optimized for that of CPUs.")] = "eager",
) -> None:
    """Print the constants."""
    if form not in ("eager", "optimized"):
        raise typer.BadParameter(f"expected eager or optimized, got {form}")
    place, config = torch.device(choose_device(device)), VisualPerceiverConfig.from_architecture(architecture)
    heads = config.num_attention_heads
    torch.manual_seed(0)
    console = Console(soft_wrap=True)
    if form == "optimized":
        cost = measure_optimized(heads, config.hidden_size // heads, getattr(torch, dtype), repetitions)
    else:
        cost = measure(heads, config.hidden_size // heads, place, getattr(torch, dtype), repetitions)
    console.print(cost)
    conditions = measurement_conditions(
        str(place), architecture=architecture, dtype=dtype, form=form, repetitions=repetitions
    )
    console.print(", ".join(f"{key} {value}" for key, value in conditions.items()), highlight=False)


if __name__ == "__main__":
    run_command(main)
