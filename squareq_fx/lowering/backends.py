"""How the functions of a graph are made to run: `backend="eager"`, `"inductor"`, `"cudagraph"` or `"eager+cudagraph"`.

Each unique function is lowered once, whichever of a module's graphs calls it; loads, evictions and prefetches stay outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import fx, nn

from squareq_fx.errors import SquareQError
from squareq_fx.ir import functions
from squareq_fx.lowering.ahead import ask_ahead
from squareq_fx.lowering.inductor import Compilation, compile_function
from squareq_fx.lowering.kept import KeptPrograms
from squareq_fx.lowering.lowered import Lowered, lowered
from squareq_fx.recording.cuda_graphs import CudaRecorder, check_device
from squareq_fx.recording.recorded import recorded
from squareq_fx.specs import spec

__all__ = ["Backend", "Lowering", "check_backend", "compiles"]

Backend = Literal["eager", "inductor", "cudagraph", "eager+cudagraph"]


def compiles(backend: str) -> bool:
    """Whether Inductor compiles the functions."""
    return backend in ("inductor", "cudagraph")


def _records(backend: str) -> bool:
    return backend in ("cudagraph", "eager+cudagraph")


def check_backend(backend: str, device: torch.device | str | None = None) -> None:
    """To be asked before a long compilation.

    Raises:
        SquareQError: there is no such backend, or it does not run on the device.
    """
    if backend not in get_args(Backend):
        raise SquareQError(f"backend={backend!r} is none of {', '.join(get_args(Backend))}")
    if _records(backend) and device is not None:
        check_device(device, backend)


class Lowering:
    """Makes what runs in place of the graphs of one module; a function that several of them call is compiled once.

    Args:
        backend: "eager" runs the graph's operations one by one; "inductor" compiles each function; "cudagraph" and
            "eager+cudagraph" do the same, and record what whole forwards and backwards launch.
        device: where the graphs run.
        value_of: the sizes that programs are tuned for (`inductor.compile_function`).
        programs: where Inductor's programs are read and kept.

    Raises:
        SquareQError: there is no such backend, or it does not run on the device.
    """

    def __init__(
        self,
        backend: Backend = "eager",
        device: torch.device | None = None,
        value_of: Callable[[Any], int] | None = None,
        programs: KeptPrograms | None = None,
    ) -> None:
        check_backend(backend, device)
        self.backend = backend
        self._programs = programs
        self._kind = device.type if device is not None else ""
        self._value_of = value_of
        self._recorder = CudaRecorder(device) if _records(backend) and device is not None else None
        self._functions: dict[tuple[Any, ...], nn.Module] = {}
        self._compilations: list[Compilation] = []

    @property
    def compilations(self) -> tuple[Compilation, ...]:
        """Every program so far: one for each function, unless one had to be compiled for other sizes again."""
        return tuple(self._compilations)

    def __call__(self, gm: fx.GraphModule) -> Callable[..., Any]:
        """The twin of a graph (`lowered`), with this backend."""
        twin = lowered(gm, self._function) if compiles(self.backend) else lowered(gm)
        return recorded(twin, recorder=self._recorder) if _records(self.backend) else twin

    def prepare(self, graphs: Iterable[Lowered], show: Callable[[str], None]) -> None:
        """Lower now what the first calls of `graphs` would.

        Args:
            show: called with the progress, as text, before each function.
        """
        graphs = list(graphs)
        if not compiles(self.backend):
            return
        if self._kind == "cpu":
            ask_ahead("cpu").join()
        unique = {_key(f): (name, f) for one in graphs for name, f in functions(one.graph).items()}
        for done, (name, function) in enumerate(unique.values()):
            show(f"inductor: {done} of {len(unique)} functions, now {name}")
            self._function(name, function)
        for one in graphs:
            one.twin()

    def _function(self, name: str, function: fx.GraphModule) -> nn.Module:
        key = _key(function)
        if key not in self._functions:
            self._functions[key] = compile_function(
                name, function, self._compilations.append, self._value_of, self._programs
            )
        return self._functions[key]


def _key(function: fx.GraphModule) -> tuple[Any, ...]:
    """Equal for functions that compute the same on the same types."""
    return function._code, tuple(spec(n.meta["val"]) for n in function.graph.nodes if n.op == "placeholder")
