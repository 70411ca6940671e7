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
from squareq_fx.attention_op import attention, run_attention
from squareq_fx.ir import functions

__all__ = ["Lowered", "lowered", "unpacker"]


def lowered(gm: fx.GraphModule, function: Callable[[str, fx.GraphModule], nn.Module] | None = None) -> fx.GraphModule:
    """A twin that computes the same bits, without gradients; `gm` is unchanged. Parameters and buffers are shared.

    Args:
        function: what takes the place of each function of the graph, by its name; default: its own twin.
    """
    root = nn.Module()
    for name, child in functions(gm).items():
        root.add_module(name, lowered(child) if function is None else function(name, child))
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
            views = graph.call_function(unpacker([n.args[1:] for n in mine]), (env[node.args[0]],))
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
        make: makes the twin (`backends.Lowering`); default: `lowered`.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        plain: Callable[..., Any] | None = None,
        make: Callable[[fx.GraphModule], Callable[..., Any]] = lowered,
    ) -> None:
        self.graph = gm
        self._plain = plain or gm
        self._make = make
        self._made_of: tuple[Any, ...] = ()
        self._twin: Callable[..., Any] | None = None
        self._tensors: tuple[Callable[[Any], Any], ...] = ()

    def __call__(self, *arguments: Any) -> Any:
        if _get_current_dispatch_mode() is not None:
            return self._plain(*arguments)
        return self.twin()(*arguments)

    def twin(self) -> Callable[..., Any]:
        """What the next call runs."""
        if self._twin is None or self._state() != self._made_of:
            paths = (str(n.target) for n in self.graph.graph.nodes if n.op == "get_attr")
            self._tensors = tuple(operator.attrgetter(path) for path in paths)
            self.close()
            self._twin, self._made_of = self._make(self.graph), self._state()
        return self._twin

    def close(self) -> None:
        """Free what the twin has recorded, if it records; a later call makes it anew."""
        twin, self._twin = self._twin, None
        close = getattr(twin, "close", None)
        if close is not None:
            close()

    def _state(self) -> tuple[Any, ...]:
        codes = (child._code for child in functions(self.graph).values())
        return (self.graph._code, *codes, *(id(tensor(self.graph)) for tensor in self._tensors))


def _share(root: nn.Module, path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    setattr(root, leaf, value)


def unpacker(pieces: Sequence[tuple[Any, ...]]) -> Callable[[torch.Tensor], list[torch.Tensor]]:
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


_DIRECT: dict[Any, Callable[..., Any]] = {
    ops.int8_linear: ops.kernel("run_int8_linear"),
    ops.int8_linear_dx: ops.kernel("run_int8_linear_dx"),
    ops.int8_linear_parts: ops.kernel("run_int8_linear_parts"),
    ops.quantize_rows: ops.kernel("run_quantize_rows"),
    ops.int8_matmul: ops.kernel("run_int8_matmul"),
    attention: run_attention,
}
