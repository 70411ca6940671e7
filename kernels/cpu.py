"""int8_linear from plain ATen operations: the path of CPU tensors, where no Triton compiler reaches.

The weight is widened a slice of rows at a time into one small buffer that every slice reuses. At 16x3072x3072
on one core that took 10 ms where dequantising the whole weight first took 40 to 100: a temporary of tens of
megabytes is mapped, faulted in page by page and unmapped again at every call, while a slice stays in cache.
"""

from __future__ import annotations

import functools

import torch

from squareq_fx.kernels.arguments import check_linear, check_linear_dx, check_matmul
from squareq_fx.kernels.reference import activate

__all__ = ["SLICE_ELEMENTS", "int8_linear", "int8_linear_dx", "int8_matmul"]

SLICE_ELEMENTS = 1 << 19
"""Elements of the float32 slice buffer (2 MiB): measured best or within noise of it from 2^16 to 2^20."""


def int8_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ ((q - zero_point) * scale)^T + bias in float32 whatever x's dtype, rounded once at the end.

    Args:
        x: [..., in] bf16, fp16 or fp32; qweight: [out, K' >= in] int8; scale, zero_point: [out] float32;
        bias: [out] float32 or None.
    Returns:
        [..., out] in x's dtype, a function of the inputs alone, bit for bit.
    Raises:
        TypeError, ValueError: an argument's dtype, shape or device is wrong, naming it.
    """
    check_linear(x, qweight, scale, zero_point, bias)
    in_features, out_features = x.shape[-1], qweight.shape[0]
    rows = x.to(torch.float32).reshape(x.shape[:-1].numel(), in_features)
    shift = zero_point.unsqueeze(1) if bool(zero_point.any()) else None
    height = max(1, SLICE_ELEMENTS // max(1, in_features))
    if out_features <= height:  # a small layer, where the few operations saved are a third of the time
        steps = qweight[:, :in_features].to(torch.float32)
        if shift is not None:
            steps.sub_(shift)
        y = torch.mm(rows, steps.t())
    else:
        y = rows.new_empty(rows.shape[0], out_features)
        buffer = rows.new_empty(height, in_features)
        for start in range(0, out_features, height):
            stop = min(start + height, out_features)
            steps = buffer[: stop - start].copy_(qweight[start:stop, :in_features])
            if shift is not None:
                steps.sub_(shift[start:stop])
            torch.mm(rows, steps.t(), out=y[:, start:stop])
    # The scale goes to the product: one pass, with the bias, over [M, out] instead of one over [out, in].
    if bias is None:
        y.mul_(scale)
    else:
        torch.addcmul(bias, y, scale, out=y)
    return y.to(x.dtype).reshape(*x.shape[:-1], out_features)


def int8_linear_dx(
    dy: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, in_features: int
) -> torch.Tensor:
    """dy @ ((q - zero_point) * scale) in float32 whatever dy's dtype, rounded once at the end.

    Args:
        dy: [..., out] bf16, fp16 or fp32; qweight: [out, K' >= in_features] int8; scale, zero_point: [out] float32.
    Returns:
        [..., in_features] in dy's dtype, a function of the inputs alone, bit for bit.
    Raises:
        TypeError, ValueError: an argument's dtype, shape or device is wrong, naming it.
    """
    check_linear_dx(dy, qweight, scale, zero_point, in_features)
    out_features = qweight.shape[0]
    rows = dy.to(torch.float32).reshape(dy.shape[:-1].numel(), out_features) * scale  # the rows' scales go to dy
    shift = zero_point.unsqueeze(1) if bool(zero_point.any()) else None
    height = max(1, SLICE_ELEMENTS // max(1, in_features))
    dx = rows.new_zeros(rows.shape[0], in_features)
    buffer = rows.new_empty(min(height, out_features), in_features)
    for start in range(0, out_features, height):
        stop = min(start + height, out_features)
        steps = buffer[: stop - start].copy_(qweight[start:stop, :in_features])
        if shift is not None:
            steps.sub_(shift[start:stop])
        dx.addmm_(rows[:, start:stop], steps)
    return dx.to(dy.dtype).reshape(*dy.shape[:-1], in_features)


def int8_matmul(
    xq: torch.Tensor,
    sx: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    activation: str = "none",
    addend: torch.Tensor | None = None,
    parts: int = 1,
) -> torch.Tensor:
    """reference.int8_matmul with int32 sums of the products: exact up to the scales.

    Arguments, result and errors are reference.int8_matmul's.
    """
    check_matmul(xq, sx, qweight, scale, zero_point, bias, dtype, activation, addend, parts)
    in_features, rows = xq.shape[-1], xq.shape[:-1].numel()
    flat = xq.reshape(rows, in_features)
    y = _int_product(flat, qweight[:, :in_features]).to(torch.float32)
    sx = sx.reshape(rows, 2)
    if bool(zero_point.any()):
        y -= sx[:, 1:] * zero_point
    y *= sx[:, :1] * scale
    if bias is not None:
        y += bias
    y = activate(y, activation)
    if addend is not None:
        y = y + addend.reshape(y.shape).to(torch.float32)
    if parts == 1:
        return y.to(dtype).reshape(*xq.shape[:-1], qweight.shape[0])
    split = y.unflatten(1, (parts, qweight.shape[0] // parts)).movedim(1, 0).to(dtype).contiguous()
    return split.reshape(parts, *xq.shape[:-1], qweight.shape[0] // parts)


def _int_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b^T of int8 matrices, exactly, as int32."""
    if not a.numel() or not b.numel():
        return a.new_zeros((a.shape[0], b.shape[0]), dtype=torch.int32)
    if a.shape[1] > 1 and _int_mm_is_exact():
        return torch._int_mm(_in_rows(a), _in_rows(b).t())
    total = a.new_zeros((a.shape[0], b.shape[0]), dtype=torch.int32)
    for start in range(0, a.shape[1], 1024):  # so many products of bytes add up to less than 2^24: float32 holds each sum
        x, w = (part[:, start : start + 1024].to(torch.float32) for part in (a, b))
        total += torch.mm(x, w.t()).to(torch.int32)
    return total


def _in_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The same values in rows that follow each other: for overlapping ones, and for a depth of 1, torch's product leaves its
    result as the memory was (pytorch/pytorch issue 195066). `contiguous` accepts any stride for a single row.
    """
    good = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
    return matrix if good else matrix.clone(memory_format=torch.contiguous_format)


@functools.cache
def _int_mm_is_exact() -> bool:
    """Whether torch's int8 product is: on x86 without VNNI, oneDNN adds two products in 16 bits, which overflow."""
    a, b = (torch.full((32, 64), value, dtype=torch.int8) for value in (127, -127))
    return all(bool((torch._int_mm(x, y.t()) == int(x[0, 0]) * int(y[0, 0]) * 64).all()) for x in (a, b) for y in (a, b))
