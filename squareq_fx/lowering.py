"""What runs in place of a graph: the same graph with our own operations called directly, past torch's dispatcher.

A registered operation written in Python costs the host some tens of microseconds a call, which a large model pays thousands of
times a step and a fast card cannot hide. The graph that is printed, checked and edited keeps the operations.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from squareq_fx import ops
from squareq_fx.ir import functions

__all__ = ["Lowered", "lowered"]


def lowered(gm: fx.GraphModule) -> fx.GraphModule:
    """A twin that computes the same bits, without gradients; `gm` is unchanged. Parameters and buffers are shared."""
    root = nn.Module()
    for name, child in functions(gm).items():
        root.add_module(name, lowered(child))
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            _share(root, str(node.target), operator.attrgetter(str(node.target))(gm))
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node in env:
            continue
        if node.target is ops.unpack:
            mine = [n for n in node.args[0].users if n.target is ops.unpack]
            views = graph.call_function(_unpacker([n.args[1:] for n in mine]), (env[node.args[0]],))
            env.update({n: graph.call_function(operator.getitem, (views, i), name=n.name) for i, n in enumerate(mine)})
            continue
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].target = _DIRECT.get(node.target, node.target)
    return fx.GraphModule(root, graph, class_name=f"Lowered{type(gm).__name__}")


class Lowered:
    """The twin of a graph, made anew when the graph, one of its functions, or one of its own tensors has been replaced.

    Under a `TorchDispatchMode`, which is there to see every operation, the graph itself runs.

    Args:
        plain: runs the graph itself; default: `gm`.
    """

    def __init__(self, gm: fx.GraphModule, plain: Callable[..., Any] | None = None) -> None:
        self._gm = gm
        self._plain = plain or gm
        self._made_of: tuple[Any, ...] = ()
        self._twin: fx.GraphModule | None = None
        self._tensors: tuple[Callable[[Any], Any], ...] = ()

    def __call__(self, *arguments: Any) -> Any:
        if _get_current_dispatch_mode() is not None:
            return self._plain(*arguments)
        made_of = self._state()
        if self._twin is None or made_of != self._made_of:
            paths = (str(n.target) for n in self._gm.graph.nodes if n.op == "get_attr")
            self._tensors = tuple(operator.attrgetter(path) for path in paths)
            self._twin, self._made_of = lowered(self._gm), self._state()
        return self._twin(*arguments)

    def _state(self) -> tuple[Any, ...]:
        codes = (child._code for child in functions(self._gm).values())
        return (self._gm._code, *codes, *(id(tensor(self._gm)) for tensor in self._tensors))


def _share(root: nn.Module, path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    setattr(root, leaf, value)


def _unpacker(pieces: Sequence[tuple[Any, ...]]) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """All views into one buffer at once: one strided view each, where `squareq.unpack` makes three.

    Args:
        pieces: offset in bytes, size and dtype of each; `segment_layout` places a tensor at a multiple of its dtype's size.
    """
    plan = []
    for offset, size, dtype in pieces:
        strides = [math.prod(max(1, extent) for extent in size[i + 1 :]) for i in range(len(size))]
        start = offset // dtype.itemsize if math.prod(size) else 0  # an empty tensor may lie at any offset
        plan.append((dtype, tuple(size), tuple(strides), start))
    dtypes = tuple(dict.fromkeys(dtype for dtype, *_ in plan))

    def unpack_all(weights: torch.Tensor) -> list[torch.Tensor]:
        typed = {}
        for dtype in dtypes:
            whole = weights[: weights.shape[0] // dtype.itemsize * dtype.itemsize].view(dtype)
            typed[dtype] = whole, whole.storage_offset()
        return [
            torch.as_strided(typed[dtype][0], size, strides, typed[dtype][1] + start) for dtype, size, strides, start in plan
        ]

    return unpack_all


def _int8_linear(*arguments: Any) -> torch.Tensor:
    from squareq_fx.kernels.dispatch import run_int8_linear

    return run_int8_linear(*arguments)


def _int8_linear_dx(*arguments: Any) -> torch.Tensor:
    from squareq_fx.kernels.dispatch import run_int8_linear_dx

    return run_int8_linear_dx(*arguments)


_DIRECT: dict[Any, Callable[..., Any]] = {
    ops.int8_linear: _int8_linear,
    ops.int8_linear_dx: _int8_linear_dx,
}
