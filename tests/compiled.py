"""Tiny backbones compiled once for all the tests that only call them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from backbones import backbone
from models import dequantized, make_slab
from torch import nn

import squareq_fx
from squareq_fx import CompiledModule, Slab
from squareq_fx.emit import emit
from squareq_fx.runtime.store import Backing

__all__ = ["Compiled", "compiled", "emitted", "family_slab"]


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
