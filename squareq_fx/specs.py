"""Types of values as text: what the checker compares, what sharing of functions is decided by, what is printed."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch

__all__ = ["short_spec", "spec"]

_DTYPES = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
}


def spec(val: Any) -> str:
    """The full type of a `val`: dtype, sizes, strides, device; sizes are canonical expressions of the input sizes.

    Sizes only known at run time (unbacked symbols) are all written `u`, because every inference makes new ones.
    """
    if isinstance(val, torch.Tensor):
        cached = vars(val).get(_CACHE)
        if cached is None:
            cached = vars(val)[_CACHE] = _tensor_spec(val)
        return cached
    if isinstance(val, torch.SymInt | torch.SymFloat | torch.SymBool):
        text = _canonical(val)
        return text if val.node.expr.is_number else f"sym:{text}"
    if isinstance(val, tuple | list):
        return "(" + ", ".join(map(spec, val)) + ")"
    return repr(val)


_CACHE = "_squareq_spec"


def _tensor_spec(val: torch.Tensor) -> str:
    strides = ",".join(map(_stride, val.stride())) if val.layout == torch.strided else str(val.layout)
    return f"{_dtype(val.dtype)}[{','.join(map(_canonical, val.shape))}]({strides})@{val.device}"


def short_spec(val: Any) -> str:
    """The type as people read it: `bf16[2, s0, 64]`."""
    if isinstance(val, torch.Tensor):
        return f"{_dtype(val.dtype)}[{', '.join(map(_size, val.shape))}]"
    if isinstance(val, torch.SymInt | torch.SymFloat | torch.SymBool):
        return f"int {_size(val)}"
    if isinstance(val, tuple | list):
        return "(" + ", ".join(map(short_spec, val)) + ")"
    return type(val).__name__


def _size(value: Any) -> str:
    if isinstance(value, int):
        return str(value)
    return re.sub(r"\bu\d+\b", "u", str(value.node.expr))


def _canonical(value: Any) -> str:
    """As `_size`, multiplied out: torch writes one product as `4*(n + 1)*m` or `(2*n + 2)*2*m`, as it comes."""
    return str(value) if isinstance(value, int) else _multiplied_out(value.node.expr)


@functools.lru_cache(maxsize=4096)
def _multiplied_out(expression: Any) -> str:
    return re.sub(r"\bu\d+\b", "u", str(expression.expand()))


def _stride(value: Any) -> str:
    """A stride's `Max(1, n)` is `n`: they differ for empty tensors only, whose strides mean nothing, and torch writes now the
    one and now the other.
    """
    if isinstance(value, int) or "Max(1, " not in _size(value):
        return _canonical(value)
    return _multiplied_out(value.node.expr.replace(_is_at_least_one, lambda e: e.func(*(a for a in e.args if a != 1))))


def _is_at_least_one(expression: Any) -> bool:
    return type(expression).__name__ == "Max" and 1 in expression.args


def _dtype(dtype: torch.dtype) -> str:
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))
