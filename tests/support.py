"""Small models, and commands run as a user would."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import torch

from hf_visual_perceiver import bundled_checkpoint
from hf_visual_perceiver.modeling import VisualPerceiverConfig


REPOSITORY = Path(__file__).resolve().parent.parent
# Seconds for what takes moments, such as another process: a hang ends, and a slow or busy machine does not fail.
PATIENCE = 600


def papers_form() -> str:
    """The folder of the bundled checkpoint that is as the paper describes, with 64 queries and no levels."""
    return bundled_checkpoint("visual_perceiver_nano_cifar10")


def small_config(**fields) -> VisualPerceiverConfig:
    """A network that runs in milliseconds: Q = 12, N = 16."""
    small = {
        "image_size": 16,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_queries": 12,
        "num_labels": 5,
        # Fresh queries must read different things, or selection would drop all of them.
        "initializer_range": 0.3,
    }
    return VisualPerceiverConfig(**{**small, **fields})


def aligned(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose weights all begin at multiples of 64 bytes.

    Weights loaded from a file lie where the file has them, and on some CPUs the last bit of a result depends on that. Models
    that are to agree bit for bit are compared by such copies.
    """
    return copy.deepcopy(model)


def with_statistics(model: torch.nn.Module) -> torch.nn.Module:
    """The model with batch-norm statistics and weights as if it had been trained."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def with_biases(model: torch.nn.Module) -> torch.nn.Module:
    """The model with biases and weights of norms that are not the same everywhere."""
    for p in model.parameters():
        if p.ndim == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def unwrapped(text: str) -> str:
    """What a command printed, as one line: where it wraps depends on the name of the CPU in it."""
    return " ".join(text.split())


def run(*arguments: object, env: dict | None = None, timeout: float = PATIENCE) -> subprocess.CompletedProcess:
    """Run a command as a user would, with this Python's scripts on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "160", **(env or {})}
    return subprocess.run(
        [str(a) for a in arguments], capture_output=True, text=True, timeout=timeout, env=environment, cwd=REPOSITORY
    )
