"""Small models, and helpers that run commands."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from hf_visual_perceiver import bundled_checkpoint
from hf_visual_perceiver.modeling import FAMILIES, VisualPerceiverConfig


REPOSITORY = Path(__file__).resolve().parent.parent
# Seconds for what takes moments, such as another process: a hang ends, and a slow or busy machine does not fail.
PATIENCE = 600


def papers_form() -> str:
    """The folder of the bundled nano checkpoint, with the paper's architecture (64 queries, no levels)."""
    return bundled_checkpoint("visual_perceiver_nano_cifar10")


def small_config(**fields) -> VisualPerceiverConfig:
    """Config of a network that runs in milliseconds: Q = 12, N = 16."""
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


def save_networks(folder: Path, labels: list[str]) -> dict[str, str]:
    """Save a small untrained network of each family, and ResNet-20 of timm; their folders by model type."""
    small = {
        "visual_perceiver": {"patch_size": 8, "num_queries": 4, "num_hidden_layers": 1, "initializer_range": 0.3},
        "iterative_perceiver": {"num_queries": 4, "hidden_size": 16, "num_blocks": 2, "num_cross_attends": 2},
        "lookupvit": {"patch_size": 8, "num_hidden_layers": 1, "max_compressed_size": 4},
        "dynamic_vision_transformer": {"num_hidden_layers": 1, "initializer_range": 0.3},
        "qna_vit": {"local_depths": [0, 1, 1], "qna_depths": [1, 1, 0]},
    }
    named = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    networks = {name: FAMILIES[name].classifier(FAMILIES[name].config(**small[name], **named)) for name in FAMILIES}
    cfg = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"}
    resnet = TimmWrapperConfig(architecture="cifar_resnet20", pretrained_cfg=cfg, **named)
    networks["timm_wrapper"] = TimmWrapperForImageClassification(resnet)
    for name, network in networks.items():
        network.save_pretrained(folder / name)
    return {name: str(folder / name) for name in networks}


def aligned(model: torch.nn.Module) -> torch.nn.Module:
    """Copy a model so that all weights start at multiples of 64 bytes.

    Loaded weights keep the alignment that they have in the file, and on some CPUs the last bit of a result depends on it.
    Tests of bit-identical models compare such copies.
    """
    return copy.deepcopy(model)


def with_statistics(model: torch.nn.Module) -> torch.nn.Module:
    """Set batch-norm statistics and weights as after training."""
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
    """The output of a command as one line, as its wrapping depends on the CPU's name."""
    return " ".join(text.split())


def run(*arguments: object, env: dict | None = None, timeout: float = PATIENCE) -> subprocess.CompletedProcess:
    """Run a command with this Python's scripts on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "160", **(env or {})}
    return subprocess.run(
        [str(a) for a in arguments], capture_output=True, text=True, timeout=timeout, env=environment, cwd=REPOSITORY
    )
