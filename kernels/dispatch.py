"""Which kernel runs an int8 layer: decided at each call from the device, the dtype and the number of rows."""

from __future__ import annotations

import functools
import os
from importlib import import_module
from types import ModuleType

import torch

from squareq_fx.kernels import cpu
from squareq_fx.kernels.arguments import check_linear, check_linear_dx

__all__ = ["FUSED_MAX_ROWS", "dequantized_linear", "int8_linear", "int8_linear_dx", "run_int8_linear", "run_int8_linear_dx"]

FUSED_MAX_ROWS: dict[torch.dtype, int] = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 0}
"""Rows of x up to which the fused kernel runs on CUDA; above, the weight is dequantised for cuBLAS.

The crossover `benchmarks/kernels.py` measured on an H200 at 3072 x 3072 (benchmarks/results/kernels.md): in bf16 the fused
kernel is ahead up to 128 rows, in float32, where it has no tensor cores to use, nowhere."""


def int8_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """reference.int8_linear by the fastest kernel for these arguments.

    Repeated calls with the same inputs return the same bits. This is what an operation registers below
    autograd: it defines no gradient. With TRITON_INTERPRET=1 in the environment before Python starts, CPU
    tensors go through the fused kernel in Triton's interpreter, which is for tests.

    Args:
        x: [..., in] bf16, fp16 or fp32, any strides; qweight: [out, K' >= in] int8; scale, zero_point: [out]
            float32; bias: [out] float32 or None.
    Returns:
        [..., out] in x's dtype.
    Raises:
        TypeError, ValueError: an argument's dtype, shape or device is wrong, naming it.
        RuntimeError: Triton is needed and missing.
    """
    check_linear(x, qweight, scale, zero_point, bias)
    return run_int8_linear(x, qweight, scale, zero_point, bias)


def run_int8_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`int8_linear` of arguments that were checked already; a model calls it hundreds of times a step."""
    if not x.is_cuda and not _is_interpreting():
        return cpu.int8_linear(x, qweight, scale, zero_point, bias)
    if x.is_cuda and x.shape[:-1].numel() > FUSED_MAX_ROWS[x.dtype]:
        return _dequantized(x, qweight, scale, zero_point, bias)
    fused = _triton_module("int8_linear")
    return fused.int8_linear(x, qweight, scale, zero_point, bias)


def int8_linear_dx(
    dy: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, in_features: int
) -> torch.Tensor:
    """reference.int8_linear_dx: on CUDA by a temporary weight in dy's dtype and cuBLAS, freed with the call.

    Args:
        dy: [..., out] bf16, fp16 or fp32, any strides; qweight: [out, K' >= in_features] int8; scale, zero_point: [out]
            float32.
    Returns:
        [..., in_features] in dy's dtype.
    Raises:
        TypeError, ValueError: an argument's dtype, shape or device is wrong, naming it.
        RuntimeError: Triton is needed and missing.
    """
    check_linear_dx(dy, qweight, scale, zero_point, in_features)
    return run_int8_linear_dx(dy, qweight, scale, zero_point, in_features)


def run_int8_linear_dx(
    dy: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, in_features: int
) -> torch.Tensor:
    """`int8_linear_dx` of arguments that were checked already."""
    if not dy.is_cuda and not _is_interpreting():
        return cpu.int8_linear_dx(dy, qweight, scale, zero_point, in_features)
    weight = _triton_module("dequantize_rows").launch(qweight, scale, zero_point, in_features, dy.dtype)
    return torch.matmul(dy, weight)


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
    rows = _triton_module("dequantize_rows")
    weight = rows.launch(qweight, scale, zero_point, x.shape[-1], x.dtype)
    # The rounded bias meets the float32 accumulator, as in any 16-bit layer. An exact bias would be added to
    # a product that is rounded already, for no smaller error and one more pass over y.
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _is_interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_module(name: str) -> ModuleType:
    try:
        return import_module(f"squareq_fx.kernels.{name}")
    except ImportError as error:
        raise RuntimeError(
            "int8 layers on CUDA, or TRITON_INTERPRET=1, need Triton: pip install triton"
        ) from error
