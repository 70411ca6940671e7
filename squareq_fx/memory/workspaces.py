"""Device memory that operations take for their own work: what our kernels allocate, and attention's statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from squareq_fx import ops
from squareq_fx.attention_op import attention
from squareq_fx.memory.tracking import Operation

__all__ = ["workspace_bytes"]

aten = torch.ops.aten


def workspace_bytes(operation: Operation) -> int:
    """Bytes taken and given back by one operation on CUDA; 0 for what is not known here, and on other devices.

    A widened weight is exact, attention's statistics are what torch's kernels document. cuBLAS and cuDNN have workspaces of
    their own, and split tiles leave sums for each other (some tens of MB), which are not here.
    """
    func, args, kwargs = operation
    known = _WORKSPACES.get(func)
    if known is None or not args[0].is_cuda:
        return 0
    return known(*args, **kwargs)


def _linear(x: torch.Tensor, qweight: torch.Tensor, *rest: Any, **options: Any) -> int:
    from squareq_fx.kernels.dispatch import FUSED_MAX_ROWS

    compute = rest[3] if len(rest) > 3 else options.get("compute", "w8a16")
    if compute == "w8a8":
        rows = x.shape[:-1].numel()
        return x.numel() + 8 * rows
    return _widened(x, qweight) if x.shape[:-1].numel() > FUSED_MAX_ROWS[x.dtype] else 0


def _linear_parts(x: torch.Tensor, qweight: torch.Tensor, *rest: Any) -> int:
    return _linear(x, qweight)


def _linear_dx(dy: torch.Tensor, qweight: torch.Tensor, *rest: Any, **options: Any) -> int:
    in_features = rest[2] if len(rest) > 2 else options["in_features"]
    return qweight.shape[0] * int(in_features) * dy.element_size()


def _widened(x: torch.Tensor, qweight: torch.Tensor) -> int:
    return qweight.shape[0] * x.shape[-1] * x.element_size()


def _statistics(query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> int:
    """One float32 a row of the scores; `math` has the scores themselves, several times."""
    if options.get("backend") == "math":
        return 2 * query.shape[:-1].numel() * key.shape[-2] * 4
    return query.shape[:-1].numel() * 4


def _flash_backward(grad: torch.Tensor, query: torch.Tensor, *rest: Any, **options: Any) -> int:
    """The gradient of the query is summed in float32, over rows padded to 128 and heads to 32."""
    *outer, tokens, size = query.shape
    rows = -(-tokens // 128) * 128
    for extent in outer:
        rows *= extent
    return rows * (-(-size // 32) * 32 + 1) * 4


_WORKSPACES: dict[Any, Callable[..., int]] = {
    ops.int8_linear: _linear,
    ops.int8_linear_parts: _linear_parts,
    ops.int8_linear_dx: _linear_dx,
    attention: _statistics,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
}
