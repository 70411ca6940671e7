"""`forecast`: how much device memory a call of a compiled module takes, before it is made."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from squareq_fx import ops
from squareq_fx.adapters.packing import Branch, Part, pack, unpack_gradients
from squareq_fx.calls import normalise_example
from squareq_fx.compiled import CompiledModule
from squareq_fx.errors import RuntimeStateError
from squareq_fx.memory.picture import draw_visits
from squareq_fx.memory.rehearsal import Rehearsal, Visit
from squareq_fx.memory.tracking import AllocationTracker, Operation
from squareq_fx.memory.workspaces import workspace_bytes
from squareq_fx.views.units import format_bytes

__all__ = ["Forecast", "forecast"]


@dataclass(frozen=True)
class Forecast:
    """Bytes of device memory of one call.

    Attributes:
        arena: the buffer that streamed weights go through.
        resident: weights that stay: segments that are not streamed, parameters and buffers of the module.
        adapters: the float32 masters of the active adapters. An optimizer's states come on top.
        inputs: the call's tensors.
        activations: most bytes at a time of everything the call makes: values, saved activations, gradients, workspaces.
        at: the node of the top level where that is, usually a block, and the node in it.
        visits: for each node of the top level that takes memory the activations at their most while it runs, and after it.
        backward: the same of the backward; they hold what the forward left.
    """

    arena: int
    resident: int
    adapters: int
    inputs: int
    activations: int
    at: tuple[str, str]
    visits: tuple[Visit, ...] = field(repr=False)
    backward: tuple[Visit, ...] = field(repr=False)

    @property
    def peak(self) -> int:
        """All of it, at the moment of most."""
        return self.arena + self.resident + self.adapters + self.inputs + self.activations

    def draw(self, path: str | os.PathLike[str]) -> Path:
        """A picture of it over the graph's nodes, as PNG, SVG or PDF by the path's suffix; returns the path."""
        return draw_visits(self.visits, self.backward, self._fixed(), (self.at[0], self.activations), path)

    def __str__(self) -> str:
        rows = (*self._fixed(), ("activations", self.activations))
        parts = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in rows)
        return f"{format_bytes(self.peak)} at {self.at[0]} ({self.at[1]}): {parts}"

    def _fixed(self) -> list[tuple[str, int]]:
        names = ("arena", "resident", "adapters", "inputs")
        return [(name, getattr(self, name)) for name in names if getattr(self, name)]


def forecast(module: CompiledModule, inputs: Mapping[str, Any] | Sequence[Any], *, training: bool | None = None) -> Forecast:
    """What a call will hold on the device at its peak. Nothing is computed and nothing allocated there.

    The graph's operations are run on tensors without values, in the order and with the lifetimes of `backend="eager"`. With
    "inductor" values that are fused are never stored, so it holds less, as a rule; what records keeps the memory of each
    recording besides: a third more for a streamed LoRA step of Flux.1-dev at 1024x1024 (4.26 GiB instead of 3.17 on an H200,
    benchmarks/results/training-w8a8.md). What cuBLAS and cuDNN take for themselves is not known here, nor what the allocator
    cannot reuse.

    Args:
        module: what `compile` returned.
        inputs: the call: keywords as a dict, positions as a tuple, or a pair of both. Only sizes and dtypes are read; the
            tensors may live on `meta`, or anywhere.
        training: forward and backward, with the gradients of the active adapters; default: if the module can and gradients are
            enabled. Otherwise the forward alone.

    Raises:
        BindingError: the inputs do not fit the module's call.
        RuntimeStateError: `training` is asked of a module without a backward.
    """
    step = module.training_step
    if training and step is None:
        raise RuntimeStateError("this module has no backward to forecast; compile it with lora=squareq_fx.Lora(...)")
    trains = step is not None and (torch.is_grad_enabled() if training is None else training)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tracker = AllocationTracker(module.device, _Allocations(module), workspace_bytes)
    rehearsal = Rehearsal(tracker, mode)
    with torch.no_grad(), torch.autocast(module.device.type, enabled=False), mode:
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: _fake(t, module.device), normalise_example(inputs))
        tensors, _ = module._binding.tensors(args, kwargs)
        branches = _fake_branches(module, mode)
        with tracker:
            run = _training_step if trains else _forward
            visits, backward = run(module, rehearsal, tensors, branches)
    masters = [tensor for branch in branches for part in branch.parts for tensor in (part.down, part.up)]
    weights = [*module.parameters(), *module.buffers()]
    trained = {id(p) for p in module.adapter_parameters().values()} if module._bank is not None else set()
    segments = module.runtime.store if module.runtime is not None else None
    return Forecast(
        arena=module.runtime.arena_bytes if module.runtime is not None and segments is not None and segments.streamed else 0,
        resident=sum(t.nbytes for t in weights if id(t) not in trained)
        + (sum(segments.segments[name].nbytes for name in segments.resident) if segments is not None else 0),
        adapters=sum(t.nbytes for t in masters),
        inputs=sum(t.nbytes for t in tensors),
        activations=tracker.peak,
        at=tracker.peak_place or ("", ""),
        visits=tuple(visits),
        backward=tuple(backward),
    )


def _forward(
    module: CompiledModule, rehearsal: Rehearsal, tensors: Sequence[torch.Tensor], branches: Sequence[Branch]
) -> tuple[list[Visit], list[Visit]]:
    packed = pack(branches, module.device) if branches else []
    return rehearsal.run(module, [*tensors, *packed])[1], []


def _training_step(
    module: CompiledModule, rehearsal: Rehearsal, tensors: Sequence[torch.Tensor], branches: Sequence[Branch]
) -> tuple[list[Visit], list[Visit]]:
    """What `Training` does: everything that crosses is held until the backward is over."""
    step = module.training_step
    assert step is not None
    packed = pack(branches, module.device)
    given = [t if isinstance(t, FakeTensor) else rehearsal.mode.from_tensor(t) for t in step.arguments(tensors, packed)]
    results, visits = rehearsal.run(step.halves.forward, given)
    outputs, saved = results[: len(step.output_values)], results[len(step.output_values) :]
    del results
    cotangents = [torch.empty_like(outputs[i], memory_format=torch.contiguous_format) for i in step.halves.outputs]
    found, more = rehearsal.run(step.halves.backward, [*given, *saved, *cotangents])
    by_key = dict(zip(step.gradients, found))
    unpack_gradients(branches, [by_key.get(("adapter", key)) for key in step.adapters])
    return visits, more


class _Allocations:
    """Which operations take memory on the device: loads of a range of the arena, or of what is resident, do not."""

    def __init__(self, module: CompiledModule) -> None:
        self._resident = set(module.runtime.store.resident) if module.runtime is not None else set()

    def __call__(self, operation: Operation) -> bool:
        func, args, kwargs = operation
        if func is ops.load:
            return kwargs.get("offset") is None and args[0] not in self._resident
        return func is not ops.offload


def _fake(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def _fake_branches(module: CompiledModule, mode: FakeTensorMode) -> list[Branch]:
    if module._bank is None:
        return []
    return [
        Branch(b.slot, tuple(Part(mode.from_tensor(p.down), mode.from_tensor(p.up), p.scaling) for p in b.parts))
        for b in module._bank.branches()
    ]
