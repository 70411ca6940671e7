"""What a result depends on besides the model and the options: versions, the device, settings of torch and its compiler."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

import torch

from squareq_fx.stored.source_files import package_identity

__all__ = ["compiler_settings", "libraries", "versions"]

_VARIABLES = ("TORCHINDUCTOR_", "TRITON_", "OMP_")
_PLACES = ("_DIR", "_HOME", "_PATH")
"""Environment variables that say where something is kept, not what it is; Inductor sets some itself before its first kernel."""


def versions(device: torch.device) -> list[Any]:
    """Everything outside the model and the options that a pass may depend on."""
    cuda: list[Any] = []
    if device.type == "cuda" and torch.cuda.is_available():
        cuda = [torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), torch.backends.cudnn.version()]
    kernels = torch.backends.cuda
    enabled = [kernels.flash_sdp_enabled(), kernels.mem_efficient_sdp_enabled(), kernels.math_sdp_enabled()]
    mine = [package_identity(), platform.python_version(), str(torch.__version__), torch.version.cuda]
    autocast = [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")]
    return [*mine, *cuda, *enabled, *autocast, torch.get_default_dtype()]


def libraries() -> list[Any]:
    """Versions of those that a model may be made of, where they are imported."""
    return [getattr(sys.modules.get(name), "__version__", None) for name in ("diffusers", "transformers")]


def compiler_settings(device: torch.device) -> list[Any]:
    """What Inductor's code depends on besides a function, its types and `versions`."""
    import torch._functorch.config
    import torch._inductor.config

    deterministic: Any = torch.utils.deterministic

    found: list[Any] = [torch.version.git_version, _triton(), str(device)]
    with torch._inductor.config.patch(compile_threads=1):  # None until the first compile, then by the processor
        found.append(torch._inductor.config.get_hash().hex())
    found.append(torch._functorch.config.get_hash().hex())
    found += sorted((k, v) for k, v in os.environ.items() if k.startswith(_VARIABLES) and not k.endswith(_PLACES))
    found += [os.environ.get(name) for name in ("CC", "CXX")]
    products = torch.backends.cuda.matmul
    found += [torch.get_float32_matmul_precision(), products.allow_tf32, torch.backends.cudnn.allow_tf32]
    found += [products.allow_fp16_reduced_precision_reduction, products.allow_bf16_reduced_precision_reduction]
    found += [torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory]
    found += [torch.backends.cudnn.enabled, torch.backends.cudnn.deterministic, torch.backends.mkldnn.is_available()]
    if device.type == "cpu":  # vector widths and the number of threads are written into the C++
        able = [(name, getattr(torch.cpu, name)()) for name in sorted(dir(torch.cpu)) if name.startswith("_is_")]
        found += [platform.machine(), torch.backends.cpu.get_cpu_capability(), able, torch.get_num_threads()]
    return found


def _triton() -> str | None:
    """The version, without the import, which takes longer than everything else here."""
    for name in ("triton", "pytorch-triton"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
