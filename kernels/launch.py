"""What every Triton launcher here needs: whether it is interpreted, and on which device it goes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton

__all__ = ["is_interpreted", "launch_device", "stored_dtype"]


def is_interpreted(kernel: object) -> bool:
    """Whether a kernel runs in Triton's interpreter: TRITON_INTERPRET decides when its module is imported."""
    return not isinstance(kernel, triton.runtime.JITFunction)


def stored_dtype(dtype: torch.dtype, interpreted: bool) -> torch.dtype:
    """The dtype a kernel writes for a result of dtype: the same, but float32 for bfloat16 when interpreted.

    Triton's interpreter keeps bfloat16 as raw 16-bit integers and truncates where the compiled kernel rounds
    to nearest even, so there torch does the rounding.
    """
    return torch.float32 if interpreted and dtype == torch.bfloat16 else dtype


def launch_device(tensor: torch.Tensor, interpreted: bool) -> AbstractContextManager[object]:
    """A context in which a Triton launch goes to the tensor's device rather than to the current one.

    Raises:
        ValueError: the tensor is not on a CUDA device and the kernel is compiled, not interpreted.
    """
    if tensor.is_cuda:
        here = tensor.device.index == torch.cuda.current_device()  # entering a context costs several times the question
        return nullcontext() if here else torch.cuda.device(tensor.device)
    if not interpreted:
        raise ValueError(
            f"the Triton kernels run on CUDA devices but the tensors are on {tensor.device}; call "
            "squareq_fx.kernels.dispatch, or set TRITON_INTERPRET=1 before triton is first imported"
        )
    return nullcontext()
