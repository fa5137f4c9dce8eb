"""What several processes do together, and what only one of them does."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from torch.distributed.tensor import DTensor

from hf_visual_perceiver.training.factory import Network
from hf_visual_perceiver.training.state import gather_weights


def keeps_state_apart(accelerator: Accelerator) -> bool:
    """Whether the optimiser keeps its state itself, in files of its own: DeepSpeed's, which splits it over the processes."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


@torch.no_grad()
def all_finite(accelerator: Accelerator, model: torch.nn.Module) -> bool:
    """Whether every weight of every process is finite."""
    # Of a parameter that FSDP has split, each process looks at its part.
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    finite = torch.stack([part.isfinite().all() for part in parts]).all()
    return accelerator.reduce(finite.float(), "sum").item() == accelerator.num_processes


def gathered(model: torch.nn.Module, network: Network) -> Network:
    """`network` with the weights of a model that FSDP has split; every process has to call this."""
    weights = gather_weights(model)
    network.load_state_dict({name.removeprefix("network."): value for name, value in weights.items()})
    module: torch.nn.Module = network
    module.to(next(iter(weights.values())).device)
    return network


def main_process_alone(accelerator: Accelerator, act: Callable[[], object]) -> None:
    """Act in the main process while the others wait; what it raises, all raise."""
    verdict: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            act()
        except (ValueError, OSError, RuntimeError) as error:
            verdict = [error]
    broadcast_object_list(verdict)
    if verdict[0] is not None:
        raise verdict[0]
