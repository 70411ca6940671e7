"""What compilers find out once a process by waiting for files and processes, on a thread beside the reading of graphs."""

from __future__ import annotations

import contextvars
import functools
import threading

__all__ = ["ask_ahead"]


@functools.cache
def ask_ahead(kind: str) -> threading.Thread:
    """Begin to find it out; once a process for each kind of device. It is kept where those who need it look.

    Args:
        kind: "cuda": Triton reads itself, half a gigabyte, to name its cache. "cpu": Inductor tries vector instructions in
            processes of their own; who needs these waits for the thread, for it would try them again.
    """
    context = contextvars.copy_context()  # Inductor's settings
    question = _triton if kind == "cuda" else _vectors
    thread = threading.Thread(target=context.run, args=(question,), name="squareq-ask", daemon=True)
    if kind == "cpu":
        import torch._inductor.codecache  # noqa: F401  here, because imports on two threads may meet half-way
    thread.start()
    return thread


def _triton() -> None:
    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # there is no Triton, or it has this elsewhere: it is found out when it is needed
        return
    triton_key()


def _vectors() -> None:
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    try:
        pick_vec_isa()
    except (RuntimeError, OSError, ValueError):
        return  # whoever needs it meets the same error, and can name the function
