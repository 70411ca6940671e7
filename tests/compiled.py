"""Tiny backbones compiled once for all the tests that only call them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from backbones import backbone
from laws import l2
from models import dequantized, make_slab, seeded
from torch import nn

import squareq_fx
from squareq_fx import CompiledModule, Lora, Slab
from squareq_fx.emit import emit
from squareq_fx.passes import Save
from squareq_fx.runtime.store import Backing

__all__ = ["LORA", "Compiled", "Trained", "assert_gradients", "compiled", "emitted", "family_slab", "peft_twin", "trained"]

LORA = Lora(rank=4, alpha=8)


@dataclass(frozen=True)
class Compiled:
    """A model, its slab, what it was compiled to, and the model with dequantised weights to hold that against."""

    model: nn.Module
    slab: Slab
    module: CompiledModule
    dequantized: nn.Module

    def expected(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.dequantized(*args, **kwargs).sample


@functools.cache
def family_slab(family: str) -> Slab:
    return make_slab(backbone(family))


@functools.cache
def compiled(family: str) -> Compiled:
    """One object for all tests, which must not change it or shut it down."""
    model, slab = backbone(family), family_slab(family)
    module = squareq_fx.compile(model, slab, progress=False)
    return Compiled(model, slab, module, dequantized(model, slab))


@functools.cache
def emitted(family: str, until: str = "schedule", backing: Backing = "host") -> CompiledModule:
    """What `compile` with these options returns, without another capture; the same rule."""
    one = compiled(family)
    graph = next(stage.graph for stage in one.module.history if stage.name == until)
    return emit(graph, one.model, one.slab, backing=backing)


# ------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Trained:
    """A module compiled with adapters on its attention layers, and PEFT's on the dequantised model, with the same values."""

    module: CompiledModule
    reference: nn.Module

    def parameters(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Each adapter matrix: ours, and PEFT's of the same name."""
        theirs = {name: p for name, p in self.reference.named_parameters() if "lora_" in name}
        ours = self.module.adapter_parameters()
        assert ours.keys() == theirs.keys()
        return {name: (p, theirs[name]) for name, p in ours.items()}


def trained(family: str, save: Save | Mapping[str, Save] = "recompute") -> Trained:
    """A backbone ready to train; both sides' A and B are random, so that no gradient is zero."""
    model, slab = backbone(family), family_slab(family)
    module = squareq_fx.compile(model, slab, lora=LORA, save=save, progress=False)
    return Trained(module, peft_twin(module, dequantized(model, slab)))


def peft_twin(module: CompiledModule, model: Any) -> nn.Module:
    """`model` with PEFT's adapters, injected by diffusers, on the layers `module` has them; the module's get random values."""
    from peft import LoraConfig

    names = [name.removesuffix(".lora_A.default.weight") for name in module.adapter_parameters() if ".lora_A." in name]
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=LORA.rank, lora_alpha=8, target_modules=names, lora_dropout=0.0))
    theirs = dict(model.named_parameters())
    with torch.no_grad(), seeded(3):
        for name, p in module.adapter_parameters().items():
            p.copy_(torch.randn(p.shape) * (0.05 if "lora_B" in name else p.shape[1] ** -0.5))
            theirs[name].copy_(p)
    return model.eval()


def assert_gradients(one: Trained, call: Mapping[str, Any], limit: float) -> float:
    """Backward of a loss on both sides: none missing, none zero unless PEFT's is, within `limit`; returns the worst error."""
    outputs = [side(**call).sample for side in (one.module, one.reference)]
    assert l2(*(o.detach() for o in outputs)) < limit
    with seeded(5):
        target = torch.randn(outputs[0].shape).to(outputs[0])
    for output in outputs:
        (output - target).square().mean().backward()
    errors = [0.0]
    for name, (ours, theirs) in one.parameters().items():
        assert ours.grad is not None and ours.grad.dtype == torch.float32, f"{name} has no gradient"
        assert ours.grad.isfinite().all(), name
        if theirs.grad is None or not theirs.grad.any():
            assert not ours.grad.any(), name
            continue
        assert ours.grad.any(), f"{name} has a gradient of zeros"
        errors.append(l2(ours.grad, theirs.grad))
        assert errors[-1] <= limit, (name, errors[-1])
        ours.grad = theirs.grad = None
    return max(errors)
