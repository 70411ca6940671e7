"""Sizes that a forward wants to be multiples, found by a first trace and said beforehand in a second.

A UNet asks whether its sample can be halved at every level. In a trace with any size `s` the levels are then nested floor
divisions, and one size comes in two spellings, `(s - 1)//2 + 1` on the way down and `2*((s - 1)//4) + 2` on the way up, which
only the condition makes equal. With `4*n` for `s` both are `2*n`. For many of diffusers' models it is known (`families`).
"""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod

from squareq_fx.ir import fake_mode, info

__all__ = ["wanted_multiples"]

_TRIED = 128
"""Sizes that are tried, from 1 on."""
Dims = dict[str, tuple[str | None, ...]]


def wanted_multiples(gm: fx.GraphModule) -> tuple[Dims, list[torch.Tensor]] | None:
    """How to trace the model of a captured graph once more, or None if that would tell nothing new.

    Returns:
        the dimensions of each input by its path, None for one that does not vary, else a symbol or a multiple of one
        ("4*s2"); and tensors of the first trace's sizes, on `meta`, in the same order.
    """
    conditions = [guard.expr for guard in fake_mode(gm).shape_env.guards]
    equal = [c for c in conditions if isinstance(c, sympy.Eq) and c.has(FloorDiv)]
    factors = _implied(equal) | _asked(conditions)
    if not any(c.free_symbols & set(factors) for c in equal):
        return None
    dims: Dims = {}
    tensors = []
    for node in gm.graph.nodes:
        if node.op != "placeholder" or info(node).kind != "input":
            continue
        val: torch.Tensor = node.meta["val"]
        sizes = [_expression(size) for size in val.shape]
        extents = [size.node.hint if isinstance(size, torch.SymInt) else size for size in val.shape]
        if not all(s is None or s.is_Symbol for s in sizes):
            return None  # the first trace knows more than names can say
        if any(extent < 2 * factors.get(s, 1) for s, extent in zip(sizes, extents) if s is not None):
            return None  # torch takes a size of 1 for one that never varies
        dims[str(info(node).key)] = tuple(_dim(s, factors) for s in sizes)
        tensors.append(torch.empty(extents, dtype=val.dtype, device="meta"))
    return dims, tensors


def _expression(size: int | torch.SymInt) -> Any:
    """None for a number."""
    return size.node.expr if isinstance(size, torch.SymInt) and not size.node.expr.is_number else None


def _asked(conditions: list[Any]) -> dict[Any, int]:
    """What each size must be a multiple of, as the forward asks."""
    found: dict[Any, int] = {}
    for condition in conditions:
        if isinstance(condition, sympy.Eq) and condition.rhs == 0 and isinstance(condition.lhs, Mod):
            size, factor = condition.lhs.args
            if size.is_Symbol and factor.is_Integer:
                found[size] = math.lcm(found.get(size, 1), int(factor))
    return found


def _implied(equal: list[Any]) -> dict[Any, int]:
    """The same where the forward does not ask but joins what it has halved with what it has not: found by trying sizes."""
    found = {}
    for size in {symbol for condition in equal for symbol in condition.free_symbols}:
        own = [c for c in equal if c.free_symbols == {size}]
        if not any(_is_halved(c.lhs) and _is_halved(c.rhs) for c in own):
            continue
        good = [n for n in range(1, _TRIED + 1) if all(_holds(c, size, n) for c in own)]
        factor = math.gcd(*good)
        if 1 < factor <= _TRIED // 4 and good == list(range(good[0], _TRIED + 1, factor)):  # four tell a multiple from a size
            found[size] = factor
    return found


def _is_halved(size: Any) -> bool:
    """Whether it is what a strided convolution leaves of another, `(s - 1)//2 + 1`."""
    return any(division.args[0].is_Add for division in size.atoms(FloorDiv))


def _holds(condition: Any, size: Any, value: int) -> bool:
    try:
        return bool(condition.subs(size, value) == sympy.true)
    except ZeroDivisionError:  # it divides by something that is 0 for this size
        return False


def _dim(size: Any, factors: dict[Any, int]) -> str | None:
    if size is None:
        return None
    return f"{factors[size]}*{size}" if size in factors else str(size)
