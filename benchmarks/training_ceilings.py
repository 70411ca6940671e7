"""What no version of a step can be faster than: its arithmetic at the card's matrix rate, its copies at the bus's rate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode
from training_arms import Arm

__all__ = ["copy_rate", "operations", "product_rate"]

_REPEATS = 7


def operations(arm: Arm) -> float:
    """Floating point operations of forward, loss and backward, recomputation included."""
    with FlopCounterMode(display=False) as counter:
        arm.loss_and_gradients()
    arm.optimizer.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def product_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of a [size, size] product of random matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / _median_seconds(lambda: a @ b, device)


def copy_rate(device: torch.device, nbytes: int) -> float:
    """Bytes a second from pinned host memory to the device, in one copy."""
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return nbytes / _median_seconds(lambda: target.copy_(source, non_blocking=True), device)


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first loads what it needs
