"""With what and on what a run was made."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from squareq_fx._version import __version__

__all__ = ["describe_environment", "processor_name"]


def describe_environment(device: torch.device) -> list[tuple[str, str]]:
    """(name, value) pairs for a table. Asks CUDA for a name only if `device` is a CUDA device."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the processor"
    return [
        ("squareq_fx", __version__),
        ("torch", torch.__version__),  # its metadata does not say for which CUDA it was built
        *((name, _version(name)) for name in ("diffusers", "peft", "scikit-learn")),
        ("Python", platform.python_version()),
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        ("processor", f"{processor_name()}; {os.cpu_count()} cores, torch on {torch.get_num_threads()}"),
        ("device of the run", where),
        ("date", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
    ]


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's marketing name where Linux tells it, else what Python knows."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
