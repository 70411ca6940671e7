"""What quantising its activations does to each layer, measured on real inputs: the quantised graph is run node by node, and
only the weights of the operation that runs are on the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from squareq_fx import ops
from squareq_fx.binding import Binding
from squareq_fx.calls import normalise_example
from squareq_fx.errors import SquareQError
from squareq_fx.ir import Level, info, model_source, program
from squareq_fx.progress import count_bar
from squareq_fx.slab.reader import Slab
from squareq_fx.weights import WeightValues

__all__ = ["LayerError", "calibrate", "inputs_id"]


@dataclass(frozen=True)
class LayerError:
    """Of one layer: the largest relative L2 error of its output in w8a8, against w8a16, over all calls and inputs; and the
    most rows its input had."""

    error: float
    rows: int


def calibrate(
    gm: fx.GraphModule, model: nn.Module, slab: Slab, inputs: Sequence[Any] | None, *, progress: bool = True
) -> dict[str, LayerError]:
    """The error that w8a8 would make in each int8 layer, every layer on what w8a16 feeds it.

    The graph runs on the device it was captured for. Weights come from the slab (or the model, where they are not in it) when
    an operation reads them, and go after it; of the activations, what is still needed stays.

    Args:
        gm: a flat graph after `quantize`.
        model: real or on `meta`.
        inputs: calls of the model: dicts of keywords, tuples, or pairs of both, with real values. None: one call of normally
            distributed values (zeros for integers) at the sizes the graph was traced with. That is a weak substitute: what
            makes w8a8 inexact are channels far larger than the others, which a trained model has and noise may not excite.
        progress: show a bar on a terminal.

    Returns:
        layer name to its error; layers that are never called are not in it.

    Raises:
        SquareQError: the graph is not flat and quantised, there are no inputs, one is on `meta`, or an output of a layer is not
            finite.
        BindingError: an input does not fit the captured call.
        SlabError: a weight has no value.
    """
    record = program(gm)
    if not Level.QUANTIZED <= record.level < Level.OUTLINED:
        raise SquareQError(f"calibrate runs a flat, quantised graph, this one is {record.level.name.lower()}")
    if inputs is not None and not inputs:
        raise SquareQError("calibrate needs at least one input: a dict of the model's keyword arguments, with real values")
    calls = [_random_tensors(gm)] if inputs is None else _bound(gm, inputs)
    values = WeightValues(model, slab, record.constants)
    layers = [n for n in gm.graph.nodes if n.target is ops.int8_linear]
    found: dict[str, LayerError] = {}
    with count_bar(len(layers) * len(calls), "calibrating", progress) as advance, torch.no_grad():
        for tensors in calls:
            run = _Calibration(gm, values, advance)
            with torch.autocast(record.device.type, enabled=False):
                run.run(*run.arguments(tensors))
            for name, of_call in run.errors():
                before = found.get(name, of_call)
                found[name] = LayerError(max(before.error, of_call.error), max(before.rows, of_call.rows))
    return found


def _bound(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[list[torch.Tensor]]:
    record = program(gm)
    binding = Binding(gm, record.model_class.rpartition(".")[2])
    found = []
    for number, call in enumerate(inputs):
        real = functools.partial(_real, number=number, device=record.device)
        found.append(binding.tensors(*pytree.tree_map_only(torch.Tensor, real, normalise_example(call)))[0])
    return found


def _random_tensors(gm: fx.GraphModule) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for val in (n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder" and info(n).kind == "input"):
        shape = [size if isinstance(size, int) else int(size.node.hint) for size in val.shape]
        value = torch.randn(shape, generator=generator) if val.is_floating_point() else torch.zeros(shape)
        found.append(value.to(program(gm).device, val.dtype))
    return found


def _real(tensor: torch.Tensor, number: int, device: torch.device) -> torch.Tensor:
    if tensor.device.type == "meta":
        raise SquareQError(f"calibration input {number} holds a tensor on 'meta'; calibration needs its values")
    return tensor.detach().to(device)


@dataclass(frozen=True)
class _Pending:
    """A weight that is fetched when an operation reads it."""

    key: str
    dtype: torch.dtype


class _Calibration(fx.Interpreter):
    """One run of the graph; it frees every value after its last use."""

    def __init__(self, gm: fx.GraphModule, values: WeightValues, advance: Callable[[str], None]) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self._values, self._advance = values, advance
        self._device = program(gm).device
        self._measured: list[tuple[fx.Node, torch.Tensor, int]] = []

    def arguments(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        given = iter(tensors)
        placeholders = [n for n in self.module.graph.nodes if n.op == "placeholder"]  # type: ignore[union-attr]
        return [
            _Pending(str(info(n).key), n.meta["val"].dtype) if info(n).kind == "weight" else next(given) for n in placeholders
        ]

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            return super().run_node(n)
        args, kwargs = map_aggregate(self.fetch_args_kwargs_from_env(n), self._fetched)  # type: ignore[misc]
        if n.op == "output":
            return args[0]
        if n.target is not ops.int8_linear:
            return n.target(*args, **kwargs)  # type: ignore[operator]
        y = ops.int8_linear(*args[:5])
        coarse = ops.int8_linear(*args[:5], "w8a8")
        norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in (coarse - y, y)]
        self._measured.append((n, torch.stack(norms), args[0].shape[:-1].numel()))
        self._advance(str(info(n).layer))
        return y

    def errors(self) -> list[tuple[str, LayerError]]:
        """One entry a call of a layer."""
        found = []
        for node, measured, rows in self._measured:
            distance, size = measured.tolist()
            if not (math.isfinite(distance) and math.isfinite(size)):
                raise SquareQError(
                    f"layer {info(node).layer} gives values that are not finite on a calibration input; calibrate with inputs "
                    f"the model is made for, in a type that holds their range\n  model source: {model_source(node)}"
                )
            error = distance / size if size else (math.inf if distance else 0.0)
            found.append((str(info(node).layer), LayerError(error, rows)))
        return found

    def _fetched(self, value: Any) -> Any:
        return self._values.tensor(value.key, value.dtype).to(self._device) if isinstance(value, _Pending) else value


def inputs_id(inputs: Sequence[Any]) -> str:
    """16 hex digits that differ between sets of calibration inputs of different values."""
    digest = xxhash.xxh3_64()
    for leaf in pytree.tree_leaves([normalise_example(call) for call in inputs]):
        if isinstance(leaf, torch.Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
