"""The conditions of a measurement: hardware, versions, commit."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm
import torch
import transformers

from hf_visual_perceiver.version import __version__


def measurement_conditions(device: str | torch.device = "cpu", **more: Any) -> dict[str, Any]:
    """Collect hardware, versions and commit as plain values; `more` adds further facts. None values are left out."""
    device = torch.device(device)
    conditions = {
        "hardware": hardware_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "version": __version__,
        "commit": source_commit(),
        **more,
    }
    return {key: value for key, value in conditions.items() if value is not None}


def command_line() -> str:
    """The command that started this process, quoted for a shell; the program's name is without its path."""
    module = sys.modules["__main__"].__spec__
    program = [Path(sys.argv[0]).name] if module is None else ["python", "-m", module.name]
    return shlex.join([*program, *sys.argv[1:]])


def conditions_line(conditions: dict[str, Any]) -> str:
    """The conditions of a measurement in one line, without the command."""
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in conditions.items() if key != "command")


def hardware_name(device: torch.device) -> str:
    """Name of the processor behind a torch device; for CPUs, also the number of cores and the matrix instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        facts = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        facts = {key.strip(): value.strip() for key, value in facts.items()}
        name, flags = facts.get("model name", name), facts.get("flags", "")
    features = [
        label for flag, label in (("avx512f", "AVX-512"), ("avx512_bf16", "bf16"), ("amx_bf16", "AMX")) if flag in flags
    ]
    return f"{os.cpu_count()} cores of {name}" + (f" ({', '.join(features)})" if features else "")


def cpu_computes_in_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices natively; otherwise torch converts, many times slower than float32."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if supported is not None and not supported():
        return False  # unsupported, or disabled in torch
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return True  # unknown
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpuinfo.read_text().split())


def source_commit() -> str | None:
    """Commit of the checkout that this package runs from, with `+` if it has uncommitted changes; None elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
