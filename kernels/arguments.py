"""What the arguments of an int8 layer must be; every kernel refuses anything else in the same words."""

from __future__ import annotations

import torch

__all__ = [
    "ACTIVATIONS",
    "COMPUTES",
    "FLOATS",
    "check_compute",
    "check_linear",
    "check_linear_dx",
    "check_matmul",
    "check_parts",
    "check_quantize_rows",
    "check_rows",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""The dtypes a kernel computes in and returns."""

COMPUTES = ("w8a16", "w8a8")
"""What an int8 layer multiplies: widened weights with activations as they are, or int8 with int8."""

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu")
"""The epilogues of int8_matmul."""


def check_rows(
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Check one quantised weight: int8 [out, K'], two float32 [out], and in_features <= K'.

    Raises:
        TypeError: a dtype is wrong; the message names the argument.
        ValueError: a shape or a device is wrong, or in_features does not fit.
    """
    if qweight.dtype != torch.int8:
        raise TypeError(f"qweight must be int8, got {qweight.dtype}")
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    if qweight.dim() != 2:
        raise ValueError(f"qweight must be [out, K'], got shape {tuple(qweight.shape)}")
    _check_row_vector("scale", scale, qweight)
    _check_row_vector("zero_point", zero_point, qweight)
    if not 0 <= in_features <= qweight.shape[1]:
        raise ValueError(
            f"in_features must lie between 0 and qweight's width {qweight.shape[1]}, got {in_features}"
        )


def check_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Check int8_linear's arguments: x [..., in] float, qweight [out, K' >= in], bias None or float32 [out].

    Raises:
        TypeError: a dtype is wrong; the message names the argument.
        ValueError: a shape or a device is wrong.
    """
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float16, bfloat16 or float32, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError("x must be [..., in], got a tensor without dimensions")
    check_rows(qweight, scale, zero_point, min(x.shape[-1], qweight.shape[-1]) if qweight.dim() else 0)
    if x.shape[-1] > qweight.shape[1]:
        raise ValueError(
            f"x has {x.shape[-1]} input features but qweight {tuple(qweight.shape)} is only "
            f"{qweight.shape[1]} wide"
        )
    if x.device != qweight.device:
        raise ValueError(f"x is on {x.device} but qweight is on {qweight.device}; move one of them")
    if bias is not None:
        _check_row_vector("bias", bias, qweight)


def check_linear_dx(
    dy: torch.Tensor, qweight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, in_features: int
) -> None:
    """Check int8_linear_dx's arguments: dy [..., out] float, qweight [out, K' >= in_features].

    Raises:
        TypeError: a dtype is wrong; the message names the argument.
        ValueError: a shape or a device is wrong.
    """
    if dy.dtype not in FLOATS:
        raise TypeError(f"dy must be float16, bfloat16 or float32, got {dy.dtype}")
    check_rows(qweight, scale, zero_point, in_features)
    if dy.dim() < 1 or dy.shape[-1] != qweight.shape[0]:
        raise ValueError(f"dy must be [..., {qweight.shape[0]}], one column for each row of qweight, got {tuple(dy.shape)}")
    if dy.device != qweight.device:
        raise ValueError(f"dy is on {dy.device} but qweight is on {qweight.device}; move one of them")


def check_compute(compute: str) -> None:
    """Check the name of a way to compute.

    Raises:
        ValueError: it is none of COMPUTES.
    """
    if compute not in COMPUTES:
        raise ValueError(f"compute must be one of {', '.join(COMPUTES)}, got {compute!r}")


def check_parts(qweight: torch.Tensor, parts: int) -> None:
    """Check that a weight is `parts` layers of equal height.

    Raises:
        ValueError: it is not.
    """
    if parts < 1 or (qweight.dim() == 2 and qweight.shape[0] % parts):
        raise ValueError(f"qweight {tuple(qweight.shape)} cannot be {parts} layers of equal height")


def check_quantize_rows(x: torch.Tensor, beside: torch.Tensor | None = None) -> None:
    """Check quantize_rows' arguments: x [..., K] float, beside [..., L] of its dtype and rows.

    Raises:
        TypeError, ValueError: x has another dtype, or no dimension; beside is of another dtype, device or number of rows.
    """
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float16, bfloat16 or float32, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError("x must be [..., K], got a tensor without dimensions")
    if beside is None:
        return
    if beside.dtype != x.dtype:
        raise TypeError(f"beside must be {x.dtype} as x is, got {beside.dtype}")
    if beside.device != x.device or beside.dim() < 1 or beside.shape[:-1] != x.shape[:-1]:
        wanted, got = f"{tuple(x.shape)} on {x.device}", f"{tuple(beside.shape)} on {beside.device}"
        raise ValueError(f"beside must be [..., L] with the rows of x {wanted}, got {got}")


def check_matmul(
    xq: torch.Tensor,
    sx: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    activation: str,
    addend: torch.Tensor | None,
    parts: int,
) -> None:
    """Check int8_matmul's arguments; see reference.int8_matmul.

    Raises:
        TypeError: a dtype is wrong; the message names the argument.
        ValueError: a shape, a device, the activation or the number of parts is wrong.
    """
    if xq.dtype != torch.int8:
        raise TypeError(f"xq must be int8, got {xq.dtype}; quantize_rows makes it")
    if sx.dtype != torch.float32:
        raise TypeError(f"sx must be float32, got {sx.dtype}")
    if xq.dim() < 1 or sx.shape != (*xq.shape[:-1], 2):
        raise ValueError(f"sx must have step and sum of each row of xq {tuple(xq.shape)}, got shape {tuple(sx.shape)}")
    check_rows(qweight, scale, zero_point, min(xq.shape[-1], qweight.shape[-1]) if qweight.dim() else 0, dtype)
    if xq.shape[-1] > qweight.shape[1]:
        raise ValueError(f"xq has {xq.shape[-1]} columns but qweight {tuple(qweight.shape)} is only {qweight.shape[1]} wide")
    if bias is not None:
        _check_row_vector("bias", bias, qweight)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    check_parts(qweight, parts)
    if addend is not None and (parts > 1 or addend.dtype != dtype or addend.shape != (*xq.shape[:-1], qweight.shape[0])):
        shape = (*xq.shape[:-1], qweight.shape[0])
        raise ValueError(f"addend must be {tuple(shape)} {dtype}, with one part, got {tuple(addend.shape)} {addend.dtype}")
    for name, tensor in (("sx", sx), ("qweight", qweight), ("addend", addend)):
        if tensor is not None and tensor.device != xq.device:
            raise ValueError(f"xq is on {xq.device} but {name} is on {tensor.device}; move one of them")


def _check_row_vector(name: str, vector: torch.Tensor, qweight: torch.Tensor) -> None:
    if vector.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {vector.dtype}")
    if vector.dim() != 1 or vector.shape[0] != qweight.shape[0]:
        raise ValueError(
            f"{name} must have shape ({qweight.shape[0]},), one value for each row of qweight, "
            f"got {tuple(vector.shape)}"
        )
    if vector.device != qweight.device:
        raise ValueError(f"{name} is on {vector.device} but qweight is on {qweight.device}; move one of them")
