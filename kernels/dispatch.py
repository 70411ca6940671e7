"""Which kernel runs an int8 layer: decided at each call from the device, the dtype and the number of rows."""

from __future__ import annotations

import os

import torch

from squareq_fx.kernels import cpu
from squareq_fx.kernels.arguments import check_linear

__all__ = ["FUSED_MAX_ROWS", "int8_linear"]

FUSED_MAX_ROWS: dict[torch.dtype, int] = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16}
"""Rows of x up to which the fused kernel runs on CUDA; above, the weight is dequantised for cuBLAS.

The temporary costs its traffic once; the fused kernel loses to cuBLAS in every row, and in float32 it has no
tensor cores to use. `benchmarks/kernels.py` measures the crossover."""


def int8_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """reference.int8_linear by the fastest kernel for these arguments; nothing is kept for autograd.

    Repeated calls with the same inputs return the same bits. With TRITON_INTERPRET=1 in the environment CPU
    tensors go through the fused Triton kernel in Triton's interpreter, which is for tests.

    Args:
        x: [..., in] bf16, fp16 or fp32, any strides; qweight: [out, K' >= in] int8; scale, zero_point: [out]
            float32; bias: [out] float32 or None.
    Returns:
        [..., out] in x's dtype.
    Raises:
        TypeError, ValueError: an argument's dtype, shape or device is wrong, naming it.
        RuntimeError: Triton is needed and missing, or TRITON_INTERPRET came after triton's import.
    """
    check_linear(x, qweight, scale, zero_point, bias)
    if x.is_cuda:
        return _cuda(x, qweight, scale, zero_point, bias)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _interpreted(x, qweight, scale, zero_point, bias)
    return cpu.int8_linear(x, qweight, scale, zero_point, bias)


def _cuda(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    try:
        from squareq_fx.kernels import dequantize_rows, int8_linear
    except ImportError as error:
        raise RuntimeError("int8 layers on a CUDA device need Triton: pip install triton") from error
    if x.shape[:-1].numel() <= FUSED_MAX_ROWS[x.dtype]:
        return int8_linear.int8_linear(x, qweight, scale, zero_point, bias)
    weight = dequantize_rows.dequantize_rows(qweight, scale, zero_point, x.shape[-1], x.dtype)
    # The bias rounds to x's dtype, as in any 16-bit layer, but meets the float32 accumulator; an exact bias
    # would be added to a product that is rounded already, for no smaller error and one more pass over y.
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _interpreted(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    try:
        from squareq_fx.kernels import int8_linear
    except ImportError as error:
        raise RuntimeError("TRITON_INTERPRET=1 asks for Triton's interpreter: pip install triton") from error
    if not int8_linear.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 came after triton was imported; set it before Python starts")
    return int8_linear.int8_linear(x, qweight, scale, zero_point, bias)
