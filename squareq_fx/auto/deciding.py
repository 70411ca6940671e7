"""`compute="auto"`: what w8a8 costs each layer in exactness is calibrated, what it gains in time measured, and both decided on;
once for a slab on a machine.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from squareq_fx import ops
from squareq_fx.auto.calibration import LayerError, calibrate, inputs_id
from squareq_fx.auto.timings import Shape, Table, machine
from squareq_fx.auto.tuning import layer_times, tune, unique_shapes, use_known_tiles
from squareq_fx.binding import Binding
from squareq_fx.calls import normalise_example
from squareq_fx.compute import Decisions, Measured, decide
from squareq_fx.errors import BindingError, SquareQError
from squareq_fx.families import usual_call
from squareq_fx.ir import info, program
from squareq_fx.passes import Canonicalize, Quantize
from squareq_fx.slab.inputs import restore_inputs
from squareq_fx.slab.reader import Slab

__all__ = ["decisions_for", "tune_kernels", "usual_sizes"]

_LOG = logging.getLogger(__name__)


def decisions_for(
    graph: fx.GraphModule,
    model: nn.Module,
    slab: Slab,
    *,
    error_budget: float,
    keep: Iterable[str] = (),
    calibration: Sequence[Any] | None = None,
    example_inputs: Any = None,
    progress: bool = True,
) -> Decisions:
    """How each layer computes on this device; read from `<slab>.compute.json` if that was made for it, else measured and
    written there.

    Args:
        graph: what `capture` returned.
        calibration: real inputs of the model. Without them errors are measured on normally distributed values, and times at the
            sizes of `example_inputs`, else of the model's family, else of the slab's record.

    Raises:
        SquareQError: see `calibrate` and `decide`.
    """
    keep = tuple(keep)
    where, device = machine(program(graph).device), program(graph).device
    dtype = str(program(graph).dtype).removeprefix("torch.")
    given = None if calibration is None else inputs_id(calibration)
    path = Decisions.path_beside(slab)
    known = _known(path)
    if known is not None and not known.mismatches(slab, where, dtype, error_budget, keep) and given in (None, known.inputs_id):
        return known
    quantised = Quantize(slab)(Canonicalize()(graph))
    start = time.perf_counter()
    errors = calibrate(quantised, model, slab, calibration, progress=progress)
    if calibration is None:
        errors, of_sizes = _at_usual_rows(quantised, model, slab, errors, example_inputs)
        inputs = f"random normal inputs, timed at {of_sizes} (pass calibration= for errors on real inputs)"
    else:
        inputs = f"{len(calibration)} calibration input{'s' if len(calibration) != 1 else ''}"
    merged = _merged(quantised, slab)
    sizes = {}
    for name, of in errors.items():
        width, inner = slab.layers[name].orig_shape
        sizes[name] = _input_type(quantised, name), of.rows, width * merged[name], inner
    calibrated = time.perf_counter()
    table = Table.of(device)
    tune(_products(sizes.values()), device, table, progress=progress)
    times = layer_times(sizes.values(), device, table, progress=progress)
    _LOG.info("errors measured in %.1f s, times in %.1f s", calibrated - start, time.perf_counter() - calibrated)
    measured = {
        name: Measured(of.error, of.rows, *(ms / merged[name] for ms in times[sizes[name]])) for name, of in errors.items()
    }
    decisions = decide(
        slab,
        measured,
        machine=where,
        dtype=dtype,
        inputs=inputs,
        inputs_id=given or "random",
        error_budget=error_budget,
        keep=keep,
        blocks=program(graph).block_paths,
    )
    try:
        decisions.save(path)
    except OSError as error:
        warnings.warn(f"the decisions cannot be kept beside the slab ({error}); the next compile measures again", stacklevel=3)
    return decisions


def _known(path: os.PathLike[str]) -> Decisions | None:
    if not os.path.exists(path):
        return None
    try:
        return Decisions.load(path)
    except SquareQError as error:
        warnings.warn(f"{error}; deciding again", stacklevel=4)
        return None


def _merged(gm: fx.GraphModule, slab: Slab) -> dict[str, int]:
    """Of how many layers each is one that `fuse` will make one product of, with one quantisation: q, k and v of one input."""
    together: dict[tuple[Any, ...], set[str]] = {}
    for node in gm.graph.nodes:
        if node.target is ops.int8_linear:
            name = str(info(node).layer)
            key = node.args[0], name.rpartition(".")[0], tuple(slab.layers[name].orig_shape)
            together.setdefault(key, set()).add(name)
    merged: dict[str, int] = {}
    for names in together.values():  # a layer that is called twice may be merged in one place only
        merged.update({name: min(len(names), merged.get(name, len(names))) for name in names})
    return merged


def _input_type(gm: fx.GraphModule, layer: str) -> torch.dtype:
    node = next(n for n in gm.graph.nodes if n.target is ops.int8_linear and info(n).layer == layer)
    return node.args[0].meta["val"].dtype


def _products(layers: Iterable[tuple[torch.dtype, int, int, int]]) -> list[Shape]:
    """What the layers multiply in either way."""
    return [
        Shape(kernel, str(dtype).removeprefix("torch."), *sizes)
        for dtype, *sizes in layers
        for kernel in ("int8_linear", "int8_matmul")
    ]


def _at_usual_rows(
    gm: fx.GraphModule, model: nn.Module, slab: Slab, errors: dict[str, LayerError], example_inputs: Any
) -> tuple[dict[str, LayerError], str]:
    """The same errors with the rows a layer has at the sizes that will be run, as far as these are known."""
    concrete, what = _sizes(gm, model, slab, example_inputs)
    if concrete is None:
        return errors, what
    rows: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.target is ops.int8_linear:
            count = torch.Size(concrete(node.args[0].meta["val"])[:-1]).numel()
            rows[str(info(node).layer)] = max(count, rows.get(str(info(node).layer), 0))
    return {name: LayerError(of.error, rows[name]) for name, of in errors.items()}, what


def _sizes(
    gm: fx.GraphModule, model: nn.Module, slab: Slab, example_inputs: Any
) -> tuple[Callable[[torch.Tensor], tuple[int, ...]] | None, str]:
    """What gives the sizes of a value at the sizes that will be run, and whose these are; None for those it was traced with."""
    bound, what = _usual(gm, model, slab, example_inputs)
    if bound is None:
        return None, what
    binding, tensors = bound
    return lambda val: binding.concrete(val, tensors), what


def usual_sizes(
    gm: fx.GraphModule, model: nn.Module, slab: Slab, *, example_inputs: Any = None
) -> Callable[[Any], int] | None:
    """What gives a size of the graph at the sizes that will be run: those of `example_inputs`, else of the model's family, else
    of the slab's record. It raises KeyError where these do not tell; None stands for the sizes the graph was traced with.
    """
    bound, _ = _usual(gm, model, slab, example_inputs)
    return None if bound is None else bound[0].sizes(bound[1])


def _usual(
    gm: fx.GraphModule, model: nn.Module, slab: Slab, example_inputs: Any
) -> tuple[tuple[Binding, list[torch.Tensor]] | None, str]:
    """The inputs of a call as it will be, bound, and whose sizes they have."""
    record = program(gm)
    usual = usual_call(model)
    if example_inputs is not None:
        call, what = example_inputs, "the example inputs' sizes"
    elif usual is not None:
        call, what = usual, "the usual sizes of the model's family"
    elif slab.input_signature is not None:
        call, what = restore_inputs(slab.input_signature), "the sizes of the slab's recorded inputs"
    else:
        return None, "the sizes it was traced with"
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=record.device), normalise_example(call)
    )
    binding = Binding(gm, record.model_class.rpartition(".")[2])
    try:
        tensors, _ = binding.tensors(args, kwargs)
    except BindingError:  # another type than the model has now, or sizes of another branch
        return None, "the sizes it was traced with"
    return (binding, tensors), what


def tune_kernels(
    gm: fx.GraphModule,
    model: nn.Module,
    slab: Slab,
    *,
    example_inputs: Any = None,
    measure: bool = False,
    progress: bool = True,
) -> None:
    """Let the kernels take the tiles that were measured on this machine; on CUDA only, elsewhere they have none.

    Args:
        gm: after the last pass: which products there are is known then.
        measure: also measure those that never were, at the sizes of `example_inputs`, else of the model's family, else of the
            slab's record. Some seconds a shape, once a machine.
    """
    device = program(gm).device
    if device.type != "cuda":
        return
    table = Table.of(device)
    if measure:
        concrete, _ = _sizes(gm, model, slab, example_inputs)
        tune(unique_shapes(gm, concrete), device, table, progress=progress)
    else:
        use_known_tiles(table, device)
