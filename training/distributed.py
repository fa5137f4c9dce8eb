"""Helpers for multi-process training: reductions over all processes, and actions of the main process alone."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from torch.distributed.tensor import DTensor

from hf_visual_perceiver.training.factory import Network
from hf_visual_perceiver.training.state import gather_weights


def keeps_state_apart(accelerator: Accelerator) -> bool:
    """Whether the optimiser saves its state in its own files, as DeepSpeed does, which shards it over the processes."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


@torch.no_grad()
def all_finite(accelerator: Accelerator, model: torch.nn.Module) -> bool:
    """Whether every weight on every process is finite."""
    # Of a parameter that FSDP has sharded, each process checks its own shard.
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    finite = torch.stack([part.isfinite().all() for part in parts]).all()
    return accelerator.reduce(finite.float(), "sum").item() == accelerator.num_processes


def gathered(model: torch.nn.Module, network: Network) -> Network:
    """Load the full weights of a model that FSDP has sharded into `network`; every process has to call this."""
    weights = gather_weights(model)
    network.load_state_dict({name.removeprefix("network."): value for name, value in weights.items()})
    module: torch.nn.Module = network
    module.to(next(iter(weights.values())).device)
    return network


def main_process_alone(accelerator: Accelerator, act: Callable[[], object]) -> None:
    """Call `act` in the main process while the others wait; if it raises, every process raises the same error."""
    verdict: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            act()
        except (ValueError, OSError, RuntimeError) as error:
            verdict = [error]
    broadcast_object_list(verdict)
    if verdict[0] is not None:
        raise verdict[0]
