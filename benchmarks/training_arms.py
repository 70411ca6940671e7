"""The arms of `training.py`: a model with adapters, an optimizer, and steps that are timed and weighed."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from squareq_fx import CompiledModule, forecast

__all__ = ["Arm", "Step", "add_peft", "compare", "held", "random_values", "resident_unchanged"]

GIB = 2**30


@dataclass(frozen=True)
class Step:
    """One LoRA step. Times in ms; `step_ms` is forward, loss and backward. Memory in GiB, over what was held before the arm
    was made; None without CUDA. Bytes and stalls are those of the runtime's reports, 0 where nothing streams. The forecast is
    `squareq_fx.forecast`'s, with AdamW's states; None for a peer.
    """

    arm: str
    loss: float
    forward_ms: float
    backward_ms: float
    step_ms: float
    optimizer_ms: float
    peak_gib: float | None
    reserved_gib: float | None
    moved_gib: float
    copy_ms: float
    stall_ms: float
    stalls: int
    forecast_gib: float | None = None


def held(device: torch.device) -> tuple[int, int]:
    """Bytes the allocator holds now: allocated, and reserved after giving back what is not used."""
    if device.type != "cuda":
        return 0, 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


@dataclass
class Arm:
    """A module whose only trainable parameters are adapters, and one example to train on.

    Args:
        name: of the arm, in the tables.
        module: called with `call`.
        before: what `held` said before the module was made.
        is_peer: whether attention must keep off cuDNN, whose backward fails on diffusers' layout (torch 2.11, CUDA 13).
        optimizer: AdamW over the adapters.
        steps: how many it has taken.
    """

    name: str
    module: Any
    call: Mapping[str, Any]
    target: torch.Tensor
    before: tuple[int, int]
    is_peer: bool = False
    optimizer: torch.optim.Optimizer = field(init=False)
    steps: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.adapters = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        fused = self.target.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.adapters.values(), lr=1e-4, weight_decay=0.01, fused=fused)

    def step(self) -> Step:
        """Forward, loss, backward, AdamW; the gradients are gone afterwards."""
        device = self.target.device
        on_card, expected = device.type == "cuda", self.forecast_gib
        if on_card:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        runtime = getattr(self.module, "runtime", None)
        seen = runtime.history[-1].index if runtime is not None and runtime.history else -1
        marks = [_mark(device)]
        loss = self.loss_and_gradients(lambda: marks.append(_mark(device)))
        marks.append(_mark(device))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        marks.append(_mark(device))
        if on_card:
            torch.cuda.synchronize()
        forward, backward, optimizer = (_elapsed(a, b) for a, b in pairwise(marks))
        reports = [report for report in (runtime.history if runtime is not None else ()) if report.index > seen]
        return Step(
            arm=self.name,
            loss=float(loss),
            forward_ms=forward,
            backward_ms=backward,
            step_ms=forward + backward,
            optimizer_ms=optimizer,
            peak_gib=(torch.cuda.max_memory_allocated() - self.before[0]) / GIB if on_card else None,
            reserved_gib=(torch.cuda.max_memory_reserved() - self.before[1]) / GIB if on_card else None,
            moved_gib=sum(report.bytes_to_device for report in reports) / GIB,
            copy_ms=sum(report.timing.copy_ms for report in reports),
            stall_ms=sum(report.timing.stall_ms for report in reports),
            stalls=sum(report.timing.stalls for report in reports),
            forecast_gib=expected,
        )

    @functools.cached_property
    def forecast_gib(self) -> float | None:
        """What a step holds over what was held before the arm was made, as far as it can be told before the first."""
        if not isinstance(self.module, CompiledModule):
            return None
        found = forecast(self.module, self.call, training=True)
        states = 2 * sum(parameter.nbytes for parameter in self.adapters.values())
        return (found.peak - found.inputs + states) / GIB

    def loss_and_gradients(self, between: Callable[[], object] = lambda: None) -> torch.Tensor:
        """The mean squared error; `between` is called once forward and loss are queued."""
        allowed = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(allowed) if self.is_peer else contextlib.nullcontext():
            output = self.module(**self.call, return_dict=False)[0]
            loss = (output.float() - self.target).square().mean()
            between()
            loss.backward()
        return loss.detach()

    def gradients(self, values: Mapping[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
        """The loss, and float32 CPU gradients by name with the adapters set to `values`; without gradient, without entry."""
        with torch.no_grad():
            for name, parameter in self.adapters.items():
                parameter.copy_(values[name])
        self.optimizer.zero_grad(set_to_none=True)
        loss = float(self.loss_and_gradients())
        found = {n: p.grad.float().cpu() for n, p in self.adapters.items() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return loss, found


def add_peft(model: Any, layers: list[str], rank: int) -> nn.Module:
    """PEFT's LoRA injected in place and gradient checkpointing on, as trainers do; the adapters keep the model's dtype."""
    from peft import LoraConfig

    torch.manual_seed(3)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
    model.enable_gradient_checkpointing()
    return model.train()


def random_values(adapters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A and B, none zero, the same for every arm: values that bfloat16 holds, by name and not by order."""
    values = {}
    for index, name in enumerate(sorted(adapters)):
        shape = adapters[name].shape
        generator = torch.Generator().manual_seed(1000 + index)
        std = shape[1] ** -0.5 if ".lora_A." in name else 0.02
        values[name] = (std * torch.randn(shape, generator=generator)).bfloat16().float()
    return values


def compare(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Cosines of every adapter tensor's gradient: how many, missing on either side, zero, the least and the median."""
    both = sorted(ours.keys() & theirs.keys())
    cosines = {n: float(torch.cosine_similarity(ours[n].double().flatten(), theirs[n].double().flatten(), 0)) for n in both}
    ranked = sorted(cosines, key=lambda n: (cosines[n] == cosines[n], cosines[n]))  # NaN first
    return {
        "compared": len(both),
        "missing": sorted(ours.keys() ^ theirs.keys()),
        "zero": [n for n in both if not ours[n].any() or not theirs[n].any()],
        "least": cosines[ranked[0]],
        "median": cosines[ranked[len(ranked) // 2]],
        "worst": [(n, cosines[n]) for n in ranked[:5]],
        "equal": all(torch.equal(ours[n], theirs[n]) for n in both),
    }


def resident_unchanged(module: CompiledModule) -> bool:
    """Whether every weight that is resident on the device still has the bytes it was filled with."""
    runtime = module.runtime
    assert runtime is not None
    unchanged = True
    with runtime.step():
        for name, segment in runtime.store.segments.items():
            weights = runtime.load(name, 0, segment.nbytes, None)
            filled = torch.empty_like(weights)
            runtime.store.gather(name, filled)
            unchanged &= torch.equal(weights, filled)
            runtime.evict(weights, name, 0)
    return unchanged


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(start: Any, end: Any) -> float:
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)
