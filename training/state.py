"""A run's state as named tensors in safetensors, independent of device, number of processes and sharding."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)


FACTS = "state.json"


def gather_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Gather the weights, the optimiser's moments and the averaged weights, by the parameters' names.

    Every process has to call this, as each may hold a shard; the first process gets everything.

    Returns:
        Tensors on the CPU named `model.*`, `optimizer.*` and `average.*`, and the values that are not tensors.
    """
    # With `cpu_offload` the other processes get nothing, which saves memory.
    weights, moments = _state_dicts(model, optimizer, cpu_offload=True)
    state = {f"model.{name}": value for name, value in weights.items()}
    facts: dict[str, Any] = {}
    for name, entries in moments.get("state", {}).items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                state[f"optimizer.{key}.{name}"] = value
            else:
                facts[f"optimizer.{key}.{name}"] = value
    if average is not None:
        state.update({f"average.{name}": value.cpu() for name, value in average.state_dict().items()})
    return state, facts


def apply_state(
    state: dict[str, torch.Tensor],
    facts: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None,
) -> None:
    """The inverse of `gather_state`; tensors are cast to the dtype that the model or the optimiser uses.

    Raises:
        ValueError: If the state is of another model or optimiser.
    """
    # The state of the fresh run gives the names and dtypes to expect.
    weights, moments = _state_dicts(model, optimizer)
    weights = {name: _take(state, f"model.{name}", value) for name, value in weights.items()}
    for name, entries in moments["state"].items():
        for key, value in entries.items():
            full = f"optimizer.{key}.{name}"
            entries[key] = _take(state, full, value) if isinstance(value, torch.Tensor) else facts[full]
    set_state_dict(
        model,
        optimizer,
        model_state_dict=weights,
        optim_state_dict=moments,
        options=StateDictOptions(full_state_dict=True),
    )
    if average is not None:
        average.load_state_dict(
            {name: _take(state, f"average.{name}", value) for name, value in average.state_dict().items()}
        )


def gather_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The full weights of a model that may be sharded over processes; every process has to call this and gets them."""
    weights: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return weights


def _state_dicts(model: nn.Module, optimizer: torch.optim.Optimizer, cpu_offload: bool = False) -> tuple[Any, Any]:
    options = StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload)
    return get_state_dict(model, optimizer, options=options)


def _take(state: dict[str, torch.Tensor], name: str, like: torch.Tensor) -> torch.Tensor:
    if name not in state or state[name].shape != like.shape:
        found = f"{tuple(state[name].shape)}" if name in state else "nothing"
        raise ValueError(f"Expected {name} of shape {tuple(like.shape)} in the checkpoint, got {found}.")
    return state[name].to(like.dtype)


def write_state(folder: Path, state: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write the tensors to state*.safetensors, and the facts with the names of those files to state.json."""
    contiguous = {name: value.contiguous() for name, value in state.items()}
    save_torch_state_dict(contiguous, folder, filename_pattern="state{suffix}.safetensors", max_shard_size="5GB")
    files = sorted(path.name for path in folder.glob("state*.safetensors"))
    (folder / FACTS).write_text(json.dumps({**facts, "files": files}, indent=1) + "\n")


def read_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The inverse of `write_state`.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    try:
        facts = json.loads((folder / FACTS).read_text())
        state: dict[str, torch.Tensor] = {}
        for name in facts.pop("files"):
            state.update(load_file(folder / name))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"Expected a complete checkpoint in {folder}, got a damaged one: {error}") from error
    return state, facts
