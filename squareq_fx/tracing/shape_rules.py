"""Shape rules for the two operations whose decomposition tracing would otherwise spend half of its time in.

`torch.export` learns a result's type by running what `linear` and attention are made of: thirty operations on symbolic sizes
for each attention on `meta`. The type itself is one line. What a rule does not cover takes torch's own way. Nothing rests on
the rules: `explicit.relocate` infers every node again without them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["shape_rules"]

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_LINEAR = torch.ops.aten.linear.default
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@contextlib.contextmanager
def shape_rules() -> Iterator[None]:
    """While this is entered, and the Python dispatcher is on, linear layers and attention on `meta` give empty results."""
    rules: dict[Any, Callable[..., torch.Tensor]] = {_LINEAR: _linear, _ATTENTION: _attention}
    free = {op: rule for op, rule in rules.items() if _COMPOSITE not in op.py_kernels}
    for op, rule in free.items():
        op.py_kernels[_COMPOSITE] = rule
        op._dispatch_cache.clear()
    try:
        yield
    finally:
        for op in free:
            del op.py_kernels[_COMPOSITE]
            op._dispatch_cache.clear()


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in], weight [out, in], bias [out]  ->  [..., out], contiguous"""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    covered = _alike(tensors) and x.dim() > 1 and weight.dim() == 2 and _equal(x.shape[-1], weight.shape[1])
    if not covered or (bias is not None and (bias.dim() != 1 or not _equal(bias.shape[0], weight.shape[0]))):
        return _LINEAR._op_dk(_COMPOSITE, x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """query [..., L, E], key [..., S, E], value [..., S, V]  ->  [..., L, V], contiguous"""
    shapes = query.shape, key.shape, value.shape
    covered = attn_mask is None and _alike((query, key, value)) and query.dim() > 2 and len({len(s) for s in shapes}) == 1
    covered = covered and all(_equal(q, k) and _equal(q, v) for q, k, v in zip(*(s[:-2] for s in shapes)))
    if not covered or not _equal(query.shape[-1], key.shape[-1]) or not _equal(key.shape[-2], value.shape[-2]):
        return _ATTENTION._op_dk(_COMPOSITE, query, key, value, attn_mask, dropout_p, is_causal, **options)
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _alike(tensors: tuple[torch.Tensor, ...]) -> bool:
    return all(t.device.type == "meta" and t.dtype == tensors[0].dtype and t.is_floating_point() for t in tensors)


def _equal(one: Any, other: Any) -> bool:
    """The very same number or expression; asking whether two expressions are equal would put a condition on the graph."""
    if isinstance(one, torch.SymInt) and isinstance(other, torch.SymInt):
        return bool(one.node.expr == other.node.expr)
    return type(one) is type(other) and one == other
