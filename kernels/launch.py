"""What every Triton launch here needs: whether it is interpreted, on which device it goes, and a short way to the card."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton

__all__ = ["Launcher", "stored_dtype"]


def stored_dtype(dtype: torch.dtype, interpreted: bool) -> torch.dtype:
    """The dtype a kernel writes for a result of dtype: the same, but float32 for bfloat16 when interpreted.

    Triton's interpreter keeps bfloat16 as raw 16-bit integers and truncates where the compiled kernel rounds
    to nearest even, so there torch does the rounding.
    """
    return torch.float32 if interpreted and dtype == torch.bfloat16 else dtype


class Launcher:
    """Launches one Triton kernel; what Triton compiled for arguments of a kind is called directly from the second time on.

    Finding it again is most of what a launch costs the host: Triton looks at each argument for whatever a program could be
    specialised on. Here a kernel's parameters come in an order that tells: pointers, integers that are not specialised on,
    integers that are, constants.

    Args:
        kernel: a function under `triton.jit` or `gluon.jit`, whose `do_not_specialize` names its `free` integers.

    Attributes:
        interpreted: whether it runs in Triton's interpreter: TRITON_INTERPRET decides when the kernel's module is imported.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, Any] = {}
        self.interpreted = not isinstance(kernel, triton.runtime.JITFunction)

    def __call__(
        self,
        programs: int,
        pointers: Sequence[Any],
        free: tuple[int, ...],
        sizes: tuple[int, ...],
        constants: tuple[Any, ...],
        **options: Any,
    ) -> None:
        """Launch so many programs on the device of the first pointer.

        Args:
            pointers: tensors, tensor descriptors, or None; the first one is a tensor or a descriptor.
            options: `num_warps` and the like, the same ones at every launch.
        """
        arguments = (*pointers, *free, *sizes, *constants)
        if self.interpreted:
            self._kernel[(programs,)](*arguments, **options)
            return
        first = pointers[0]
        index = (first if isinstance(first, torch.Tensor) else first.base).get_device()
        if index != torch.cuda.current_device():  # entering a context costs several times the question
            with torch.cuda.device(index):
                self(programs, pointers, free, sizes, constants, **options)
            return
        kind = _kind(index, pointers, free, sizes, constants, options)
        compiled = self._compiled.get(kind)
        if compiled is not None:
            compiled[(programs, 1, 1)](*arguments, stream=torch._C._cuda_getCurrentRawStream(index))
            return
        compiled = self._kernel[(programs,)](*arguments, **options)
        if kind is not None:
            self._compiled[kind] = compiled

    def check(self, tensor: torch.Tensor) -> None:
        """Raises ValueError: the tensor is not on a CUDA device and the kernel is compiled, not interpreted."""
        if not tensor.is_cuda and not self.interpreted:
            raise ValueError(
                f"the Triton kernels run on CUDA devices but the tensors are on {tensor.device}; call "
                "squareq_fx.kernels.dispatch, or set TRITON_INTERPRET=1 before triton is first imported"
            )


def _kind(
    index: int,
    pointers: Sequence[Any],
    free: tuple[int, ...],
    sizes: tuple[int, ...],
    constants: tuple[Any, ...],
    options: dict[str, Any],
) -> Hashable | None:
    """All that Triton specialises on; None if a pointer is not a multiple of 16, which is another program and a rare one."""
    kinds: list[Any] = []
    for pointer in pointers:
        if pointer is None:
            kinds.append(None)
        elif not isinstance(pointer, torch.Tensor):  # a descriptor, Triton's or Gluon's, whose layout follows from its block
            kinds.append((pointer.base.dtype, *pointer.block_shape))
        elif pointer.data_ptr() % 16:
            return None
        else:
            kinds.append(pointer.dtype)
    return index, *kinds, max(free, default=0) >> 31, sizes, constants, *options.values()
