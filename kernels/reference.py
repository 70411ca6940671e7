"""The definition of every operation, in plain torch. Kernels are measured against these, never the reverse.

Source: SquareQ V2 slab format, sections "Quantising" and "Dequantising"."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from squareq_fx.kernels.arguments import FLOATS, check_linear, check_linear_dx, check_matmul, check_quantize_rows, check_rows

__all__ = [
    "activate",
    "dequantize",
    "int8_linear",
    "int8_linear_dx",
    "int8_matmul",
    "packed_width",
    "quantize_rows",
    "quantize_weight",
]

QMAX = 127.0
SMALLEST_SCALE = 1e-8
SMALLEST_ROW = 1e-30
"""A row of activations whose every magnitude is below this counts as zeros."""


def packed_width(in_features: int, pack_k: int = 64) -> int:
    """K': in_features rounded up to a multiple of pack_k; a pack_k of 1 or less means no padding."""
    return in_features if pack_k <= 1 else -(-in_features // pack_k) * pack_k


def quantize_weight(
    weight: torch.Tensor, pack_k: int = 64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Symmetric int8, one scale for each row, bit for bit as SquareQ V2 does it.

    Rows are independent: quantising slices of rows gives slices of the result, so a caller may go in chunks.

    Args:
        weight: [out, in] float32, bfloat16 or float16 (the latter two convert to float32 exactly).
        pack_k: the width is padded with zeros on the right to a multiple of this; 1 or less pads nothing.
    Returns:
        qweight int8 [out, K'] in -127..127, scale float32 [out] (value of one step), zero_point float32 [out]
        (all 0.0).
    Raises:
        TypeError: weight has another dtype.
        ValueError: weight is not two-dimensional, or holds NaN or Inf.
    """
    if weight.dtype not in FLOATS:
        raise TypeError(f"weight must be float32, bfloat16 or float16, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out, in], got shape {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    with torch.no_grad():
        w = weight.detach().to(torch.float32)
        if in_features:
            low, high = torch.aminmax(w, dim=1)
            absmax = torch.maximum(-low, high)
        else:
            absmax = w.new_zeros(out_features)
        if not bool(torch.isfinite(absmax).all()):
            raise ValueError(
                "weight holds NaN or Inf; quantised it would be silently wrong, so repair it first"
            )
        # A tensor divisor: CUDA turns a division by a Python number into a product with its reciprocal.
        scale = (absmax / torch.full_like(absmax, QMAX)).clamp(min=SMALLEST_SCALE)
        q = (w * (1.0 / scale).unsqueeze(1)).round_().clamp_(-QMAX, QMAX)
        qweight = q.new_zeros((out_features, packed_width(in_features, pack_k)), dtype=torch.int8)
        qweight[:, :in_features] = q
        return qweight, scale, torch.zeros_like(scale)


def dequantize(
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """(q - zero_point) * scale in float32, padding dropped, then cast.

    Args:
        qweight: [out, K'] int8; scale, zero_point: [out] float32; in_features: <= K'.
    Returns:
        [out, in_features] in dtype.
    Raises:
        TypeError, ValueError: an argument's dtype, shape or device is wrong, naming it.
    """
    check_rows(qweight, scale, zero_point, in_features, dtype)
    steps = qweight[:, :in_features].to(torch.float32) - zero_point.unsqueeze(1)
    return (steps * scale.unsqueeze(1)).to(dtype)


def int8_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ dequantize(qweight)^T + bias, all in float32, cast to x's dtype at the end.

    Args:
        x: [..., in] bf16, fp16 or fp32; qweight: [out, K' >= in] int8; scale, zero_point: [out] float32;
        bias: [out] float32 or None.
    Returns:
        [..., out] in x's dtype.
    Raises:
        TypeError, ValueError: an argument's dtype, shape or device is wrong, naming it.
    """
    check_linear(x, qweight, scale, zero_point, bias)
    weight = dequantize(qweight, scale, zero_point, x.shape[-1])
    y = torch.matmul(x.to(torch.float32), weight.t())
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def int8_linear_dx(
    dy: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, in_features: int
) -> torch.Tensor:
    """dy @ dequantize(qweight), in float32, cast to dy's dtype at the end: the gradient of int8_linear by x.

    Args:
        dy: [..., out] bf16, fp16 or fp32; qweight: [out, K' >= in_features] int8; scale, zero_point: [out] float32.
    Returns:
        [..., in_features] in dy's dtype.
    Raises:
        TypeError, ValueError: an argument's dtype, shape or device is wrong, naming it.
    """
    check_linear_dx(dy, qweight, scale, zero_point, in_features)
    weight = dequantize(qweight, scale, zero_point, in_features)
    return torch.matmul(dy.to(torch.float32), weight).to(dy.dtype)


def quantize_rows(x: torch.Tensor, beside: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8, one scale for each row of activations: LLM.int8() (arXiv 2208.07339), section 2.1.

    Args:
        x: [..., K] bf16, fp16 or fp32.
        beside: [..., L] of the same dtype: further columns of the same rows, to the right of x; or None, for L = 0.
    Returns:
        xq int8 [..., K + L] in -127..127: x times the reciprocal of a row's step, to the nearest even; sx float32 [..., 2]: the
        value of one step, which is the row's largest magnitude over 127, or 1.0 where that magnitude is below 1e-30, and the
        sum of the row of xq, which a weight's zero points are multiplied with (arXiv 1712.05877, section 2.3). A row with NaN
        or Inf has a step that is not finite.
    Raises:
        TypeError, ValueError: x has another dtype or no dimension, or beside does not fit it.
    """
    check_quantize_rows(x, beside)
    if beside is not None:
        x = torch.cat((x, beside), dim=-1)
    rows = x.to(torch.float32)
    top = rows.abs().amax(dim=-1) if x.shape[-1] else rows.new_zeros(x.shape[:-1])
    step = torch.where(top < SMALLEST_ROW, torch.ones_like(top), top / torch.full_like(top, QMAX))  # NaN and Inf go through
    xq = (rows * (1.0 / step).unsqueeze(-1)).round().clamp(-QMAX, QMAX).to(torch.int8)
    return xq, torch.stack((step, xq.sum(dim=-1, dtype=torch.int32).to(torch.float32)), dim=-1)


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
    """activation((xq @ (qweight - zero_point)^T) * step * scale + bias) + addend, in float32, cast to dtype at the end.

    Args:
        xq: [..., K] int8; sx: [..., 2] float32; qweight: [parts * N, K' >= K] int8; scale, zero_point: [parts * N] float32;
        bias: [parts * N] float32 or None; addend: [..., N] in dtype or None, only with one part.
        activation: "none", "gelu" (exact), "gelu_tanh" or "silu".
        parts: layers whose rows lie one after the other in qweight.
    Returns:
        [..., N] in dtype; with several parts [parts, ..., N].
    Raises:
        TypeError, ValueError: an argument's dtype, shape or device is wrong, naming it.
    """
    check_matmul(xq, sx, qweight, scale, zero_point, bias, dtype, activation, addend, parts)
    # float64 holds every sum of products of bytes exactly, as the int32 accumulators of the kernels do.
    steps = torch.matmul(xq.to(torch.float64), qweight[:, : xq.shape[-1]].to(torch.float64).t()).to(torch.float32)
    y = (steps - sx[..., 1:] * zero_point) * (sx[..., :1] * scale)
    if bias is not None:
        y = y + bias
    y = activate(y, activation)
    if addend is not None:
        y = y + addend.to(torch.float32)
    if parts > 1:
        y = y.unflatten(-1, (parts, -1)).movedim(-2, 0).contiguous()
    return y.to(dtype)


def activate(y: torch.Tensor, activation: str) -> torch.Tensor:
    """One of the epilogues by name; "none" returns y itself."""
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    return F.silu(y) if activation == "silu" else y
