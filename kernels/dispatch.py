"""Which kernel runs an int8 layer: decided at each call from the device, the dtype and the number of rows."""

from __future__ import annotations

import functools
import os
from importlib import import_module
from types import ModuleType

import torch

from squareq_fx.kernels import cpu, reference
from squareq_fx.kernels.arguments import (
    check_compute,
    check_linear,
    check_linear_dx,
    check_matmul,
    check_parts,
    check_quantize_rows,
)
from squareq_fx.kernels.tiles import GEMV_MAX_ROWS, gemv_takes

__all__ = [
    "FUSED_MAX_ROWS",
    "GEMV_MAX_ROWS",
    "dequantized_linear",
    "int8_linear",
    "int8_linear_dx",
    "int8_linear_parts",
    "int8_matmul",
    "quantize_rows",
    "run_int8_linear",
    "run_int8_linear_dx",
    "run_int8_linear_parts",
    "run_int8_matmul",
    "run_quantize_rows",
]

FUSED_MAX_ROWS: dict[torch.dtype, int] = {torch.bfloat16: 128, torch.float16: 128, torch.float32: GEMV_MAX_ROWS}
"""Rows of x up to which the fused kernel runs on CUDA; above, the weight is dequantised for cuBLAS.

From what `benchmarks/kernels.py` measured on an H200 (benchmarks/results/kernels.md): in bf16 the fused kernel takes 13 us
where the other way takes 16 for 64 rows of 3072 x 3072, 18 and 16 for 128 rows, 26 and 52 for 64 rows of 12288 x 3072. In
float32, where it has no tensor cores to use, it is ahead for vectors only."""


def int8_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
    compute: str = "w8a16",
) -> torch.Tensor:
    """reference.int8_linear by the fastest kernel for these arguments.

    Repeated calls with the same inputs return the same bits. This is what an operation registers below
    autograd: it defines no gradient. With TRITON_INTERPRET=1 in the environment before Python starts, CPU
    tensors go through the fused kernel in Triton's interpreter, which is for tests.

    Args:
        x: [..., in] bf16, fp16 or fp32, any strides; qweight: [out, K' >= in] int8; scale, zero_point: [out]
            float32; bias: [out] float32 or None.
        compute: "w8a16" multiplies x as it is; "w8a8" quantises its rows first (`quantize_rows`, `int8_matmul`).
    Returns:
        [..., out] in x's dtype.
    Raises:
        TypeError, ValueError: an argument's dtype, shape or device is wrong, naming it.
        RuntimeError: Triton is needed and missing.
    """
    check_linear(x, qweight, scale, zero_point, bias)
    check_compute(compute)
    return run_int8_linear(x, qweight, scale, zero_point, bias, compute)


def run_int8_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
    compute: str = "w8a16",
) -> torch.Tensor:
    """`int8_linear` of arguments that were checked already; a model calls it hundreds of times a step."""
    if compute == "w8a8":
        return run_int8_matmul(*run_quantize_rows(x), qweight, scale, zero_point, bias, x.dtype)
    if not x.is_cuda and not _is_interpreting():
        return cpu.int8_linear(x, qweight, scale, zero_point, bias)
    if x.is_cuda and x.shape[:-1].numel() > FUSED_MAX_ROWS[x.dtype]:
        return _dequantized(x, qweight, scale, zero_point, bias)
    if gemv_takes(x.shape[:-1].numel(), qweight.shape[0], x.shape[-1], x.dtype):
        return _triton_module("int8_gemv").launch(x, qweight, scale, zero_point, bias)
    return _triton_module("int8_linear").launch(x, qweight, scale, zero_point, bias)


def int8_linear_parts(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    parts: int,
) -> torch.Tensor:
    """int8_linear of several layers that read the same x and whose rows lie one after the other.

    Args:
        x: [..., in]; qweight: [parts * out, K' >= in] int8; scale, zero_point, bias: [parts * out] float32.
    Returns:
        [parts, ..., out] in x's dtype, contiguous.
    Raises:
        TypeError, ValueError: an argument's dtype, shape or device is wrong, naming it.
        RuntimeError: Triton is needed and missing.
    """
    check_linear(x, qweight, scale, zero_point, bias)
    check_parts(qweight, parts)
    return run_int8_linear_parts(x, qweight, scale, zero_point, bias, parts)


def run_int8_linear_parts(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    parts: int,
) -> torch.Tensor:
    """`int8_linear_parts` of arguments that were checked already."""
    out_features = qweight.shape[0] // parts
    if x.is_cuda and x.shape[:-1].numel() > FUSED_MAX_ROWS[x.dtype]:
        weight, whole = _triton_module("dequantize_rows").launch_layer(qweight, scale, zero_point, bias, x.shape[-1], x.dtype)
        y = x.new_empty((parts, *x.shape[:-1], out_features))
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        flat = y.view(parts, rows.shape[0], out_features)
        for i, piece in enumerate(weight.view(parts, out_features, x.shape[-1]).unbind()):
            if whole is None:
                torch.mm(rows, piece.t(), out=flat[i])
            else:
                torch.addmm(whole[i * out_features : (i + 1) * out_features], rows, piece.t(), out=flat[i])
        return y
    y = run_int8_linear(x, qweight, scale, zero_point, bias)
    return y.unflatten(-1, (parts, out_features)).movedim(-2, 0).contiguous()


def quantize_rows(x: torch.Tensor, beside: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """reference.quantize_rows by the fastest kernel for x's device.

    Args:
        x: [..., K] bf16, fp16 or fp32, any strides.
        beside: [..., L] of the same dtype, any strides, or None.
    Returns:
        xq int8 [..., K + L], contiguous; sx float32 [..., 2], step and sum of each row.
    Raises:
        TypeError, ValueError: x has another dtype or no dimension, or beside does not fit it.
        RuntimeError: Triton is needed and missing.
    """
    check_quantize_rows(x, beside)
    return run_quantize_rows(x, beside)


def run_quantize_rows(x: torch.Tensor, beside: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` of arguments that were checked already."""
    if not x.is_cuda and not _is_interpreting():
        xq, sx = reference.quantize_rows(x, beside)
        return xq.contiguous(), sx.contiguous()
    return _triton_module("quantize_rows").launch(x, beside)


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
    """reference.int8_matmul by the fastest kernel for these arguments, which see.

    The sums of products are exact (int32), so the result is a function of the inputs alone, bit for bit.

    Raises:
        TypeError, ValueError: an argument's dtype, shape or device is wrong, naming it.
        RuntimeError: Triton is needed and missing.
    """
    check_matmul(xq, sx, qweight, scale, zero_point, bias, dtype, activation, addend, parts)
    return run_int8_matmul(xq, sx, qweight, scale, zero_point, bias, dtype, activation, addend, parts)


def run_int8_matmul(
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
    """`int8_matmul` of arguments that were checked already."""
    kernel = cpu.int8_matmul if not xq.is_cuda and not _is_interpreting() else _triton_module("int8_matmul").launch
    return kernel(xq, sx, qweight, scale, zero_point, bias, dtype, activation, addend, parts)


def int8_linear_dx(
    dy: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    in_features: int,
    compute: str = "w8a16",
) -> torch.Tensor:
    """reference.int8_linear_dx: on CUDA by a temporary weight in dy's dtype and cuBLAS, freed with the call.

    Args:
        dy: [..., out] bf16, fp16 or fp32, any strides; qweight: [out, K' >= in_features] int8; scale, zero_point: [out]
            float32.
        compute: "w8a8" folds the rows' scales into dy and quantises that per row: less exact, as one large column sets the
            step of its whole row.
    Returns:
        [..., in_features] in dy's dtype.
    Raises:
        TypeError, ValueError: an argument's dtype, shape or device is wrong, naming it.
        RuntimeError: Triton is needed and missing.
    """
    check_linear_dx(dy, qweight, scale, zero_point, in_features)
    check_compute(compute)
    return run_int8_linear_dx(dy, qweight, scale, zero_point, in_features, compute)


def run_int8_linear_dx(
    dy: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    in_features: int,
    compute: str = "w8a16",
) -> torch.Tensor:
    """`int8_linear_dx` of arguments that were checked already."""
    if compute == "w8a8":
        return _dx_by_int8(dy, qweight, scale, zero_point, in_features)
    if not dy.is_cuda and not _is_interpreting():
        return cpu.int8_linear_dx(dy, qweight, scale, zero_point, in_features)
    weight = _triton_module("dequantize_rows").launch(qweight, scale, zero_point, in_features, dy.dtype)
    return torch.matmul(dy, weight)


def _dx_by_int8(
    dy: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, in_features: int
) -> torch.Tensor:
    """dx = quantised(dy * scale) @ q - rowsum(dy * scale * zero_point): the weight's scales lie along the summed axis."""
    scaled = dy.to(torch.float32) * scale
    dq, sd = run_quantize_rows(scaled)
    turned = qweight[:, :in_features].t().contiguous()
    one, none = scale.new_ones(in_features), scale.new_zeros(in_features)
    dx = run_int8_matmul(dq, sd, turned, one, none, None, torch.float32)
    return (dx - (scaled @ zero_point).unsqueeze(-1)).to(dy.dtype)


def dequantized_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """int8_linear by a temporary weight in x's dtype and torch's own linear; it is freed with the call.

    Arguments, result and errors are int8_linear's. The weight and the bias round to x's dtype first.
    """
    check_linear(x, qweight, scale, zero_point, bias)
    return _dequantized(x, qweight, scale, zero_point, bias)


def _dequantized(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    weight, rounded = _triton_module("dequantize_rows").launch_layer(qweight, scale, zero_point, bias, x.shape[-1], x.dtype)
    # The rounded bias meets the float32 accumulator, as in any 16-bit layer. An exact bias would be added to
    # a product that is rounded already, for no smaller error and one more pass over y.
    return torch.nn.functional.linear(x, weight, rounded)


def _is_interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_module(name: str) -> ModuleType:
    try:
        return import_module(f"squareq_fx.kernels.{name}")
    except ImportError as error:
        raise RuntimeError("int8 layers on CUDA, or TRITON_INTERPRET=1, need Triton: pip install triton") from error
