"""`compile`: capture, run the passes, emit."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from torch import nn

from squareq_fx.auto.deciding import decisions_for, tune_kernels, usual_sizes
from squareq_fx.cached_graphs import CachedGraphs
from squareq_fx.capture import capture
from squareq_fx.collector import paused, resumed
from squareq_fx.compute import ERROR_BUDGET, Compute, Decisions
from squareq_fx.emit import CompiledModule, emit
from squareq_fx.errors import SquareQError
from squareq_fx.ir import Stage
from squareq_fx.kernels.arguments import COMPUTES
from squareq_fx.lora import Lora
from squareq_fx.lowering.ahead import ask_ahead
from squareq_fx.lowering.backends import Backend, check_backend, compiles
from squareq_fx.lowering.kept import KeptPrograms
from squareq_fx.passes import Quantize, Save, default_passes
from squareq_fx.pipeline import Pass
from squareq_fx.runtime.store import Backing
from squareq_fx.slab import Slab, open_slab
from squareq_fx.stored.cache import ProgramCache
from squareq_fx.weights import check_same_model, check_same_weights

__all__ = ["compile"]


@paused()
def compile(
    model: nn.Module,
    slab: Slab | str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    passes: Iterable[Pass] | None = None,
    until: str | None = None,
    compute: Compute | str | os.PathLike[str] | Mapping[str, Compute] | Decisions = "w8a16",
    error_budget: float = ERROR_BUDGET,
    keep: Iterable[str] = (),
    calibration: Sequence[Any] | None = None,
    tune: bool = False,
    lora: Lora | None = None,
    save: Save | Mapping[str, Save] = "recompute",
    inputs: Iterable[str] = (),
    device: torch.device | str | None = None,
    backing: Backing = "host",
    keep_resident: Iterable[str] = (),
    backend: Backend = "eager",
    slots: int = 2,
    distance: int = 1,
    budget: int | None = None,
    block_pattern: str | None = None,
    observe: Callable[[Stage], None] | None = None,
    progress: bool = True,
    cache: bool | str | os.PathLike[str] = True,
) -> CompiledModule:
    """A model that computes on a slab's INT8 weights and loads them block by block.

    Args:
        model: the module, real or on `meta`; it is not changed. On `meta` everything comes from the slab.
        slab: an opened slab, or the path of one.
        example_inputs: what the model is called with (dict, tuple, or a pair of both); only sizes and dtypes are read, and
            every size is dynamic as far as the model allows. Default: the slab's record, else the model's diffusers family.
        passes: instead of `default_passes(slab, ...)`.
        until: stop after the pass of this name; the result still runs, with the weights resident.
        compute: what the layers multiply. "w8a16": activations as they are; "w8a8": int8 activations too, row by row; "auto":
            for each layer the faster of both whose error is within `error_budget`, read from `<slab>.compute.json` if that was
            made for this slab, machine and budget, else measured now and written there. Also layer name to "w8a16" or "w8a8",
            `Decisions`, or the path of a file of them.
        error_budget: of "auto": the largest relative L2 error that w8a8 may make in a layer's output.
        keep: layers that compute in 16 bits whatever `compute` says (`Quantize`).
        calibration: of "auto": calls of the model with real values (dicts, tuples, or pairs of both) to measure these errors
            on; without them normally distributed values, a weak substitute.
        tune: measure which tiles of the CUDA kernels are fastest for this model's shapes, where that was not done on this
            machine before; "auto" does. Kept in `$SQUAREQ_CACHE_DIR` or `~/.cache/squareq_fx`; what is there is used anyway.
        lora: adapters to train, or to load into; the module then has a backward.
        save: what each block keeps for the backward (`Differentiate`): "recompute", "save" or "offload", for all or by segment.
        inputs: paths of inputs of the model that get a gradient too.
        device: where it runs; default: where the model is, the CPU for `meta`.
        backing: "host" (pinned memory), "disk" (the mapped file), or "resident" (everything on the device).
        keep_resident: segments that are never evicted.
        backend: how the blocks run. "eager": operation by operation. "inductor": each unique function of the graph compiled by
            TorchInductor, here and once for all sizes; a second process finds the programs (`cache`). "cudagraph":
            the same, and what a whole forward or backward launches is recorded and replayed. "eager+cudagraph": "eager",
            recorded; there is nothing to compile, and the bits are those of "eager". While Inductor works the weights go to
            the device; otherwise the first call brings them.
        slots, distance, budget: of the `schedule` pass: segments the arena holds, loads started ahead, most bytes.
        block_pattern: which modules are blocks (`block_paths`); default: the slab's record.
        observe: called after each stage.
        progress: show the running stage on a terminal.
        cache: keep the graph after the passes on disk, and use it instead of tracing when nothing it depends on has changed
            (`stored.cache`). True: below `$SQUAREQ_CACHE_DIR` or `~/.cache/squareq_fx`, unless `$SQUAREQ_CACHE` is 0; or a
            folder. Graphs of passes that are not the default ones are not kept. Inductor's programs are kept there too, and
            executed from there: give no folder that others may write into.

    Returns:
        A runnable `torch.fx.GraphModule`, called as the model is.

    Raises:
        SlabError: the slab is damaged, of another model, or lacks a weight.
        CaptureError: the model cannot be captured or it is unknown what to call it with.
        PassError: a pass refuses the graph or broke it; `compute` or `keep` name what the slab does not have.
        SquareQError: there is no such `backing` or `backend`, Inductor refuses a function, or `compute` is no way to
            compute and no file of decisions, or given together with `passes`.
    """
    check_backend(backend, device)
    if backing not in get_args(Backing):
        raise SquareQError(f"backing={backing!r} is none of {', '.join(get_args(Backing))}")
    kind = torch.device(device).type if device is not None else next((p.device.type for p in model.parameters()), "meta")
    if kind == "cuda" or (kind in ("cpu", "meta") and compiles(backend)):
        ask_ahead("cuda" if kind == "cuda" else "cpu")
    opened = slab if isinstance(slab, Slab) else open_slab(slab)
    check_same_model(model, opened)
    check_same_weights(model, opened)
    how, auto, keep = _chosen(compute), compute == "auto", tuple(keep)
    programs = ProgramCache.of(cache) if passes is None else None
    if passes is None:
        passes = default_passes(
            opened, compute=how, keep=keep, lora=lora, save=save, inputs=inputs, slots=slots, distance=distance, budget=budget
        )
    elif compute != "w8a16" or keep:
        raise SquareQError("compute and keep are options of the default passes; give your own Quantize(slab, compute, keep)")
    passes = tuple(passes)
    status = partial(_status, type(model).__name__, progress)
    graphs = CachedGraphs(
        model,
        opened,
        capture=capture,
        traced_as={"example_inputs": example_inputs, "device": device, "block_pattern": block_pattern},
        cache=programs,
        status=status,
        observe=observe,
    )
    captured = None
    if auto:
        captured = graphs.after((), until="capture")
        with resumed():
            decisions = decisions_for(
                captured,
                model,
                opened,
                error_budget=error_budget,
                keep=keep,
                calibration=calibration,
                example_inputs=example_inputs,
                progress=progress,
            )
        passes = tuple(replace(p, compute=decisions) if isinstance(p, Quantize) else p for p in passes)
    graph = graphs.after(passes, until, captured)
    with resumed():
        tune_kernels(graph, model, opened, example_inputs=example_inputs, measure=tune or auto, progress=progress)
    value_of = usual_sizes(graph, model, opened, example_inputs=example_inputs) if compiles(backend) else None
    with status() as show:
        return emit(
            graph,
            model,
            opened,
            backing=backing,
            keep_resident=keep_resident,
            backend=backend,
            show=show,
            value_of=value_of,
            programs=KeptPrograms.of(cache),
        )


def _chosen(compute: Any) -> Compute | Mapping[str, Compute] | Decisions:
    """What `Quantize` takes; for "auto" the default, until it is decided."""
    if isinstance(compute, Mapping | Decisions) or compute in COMPUTES:
        return compute
    if compute == "auto":
        return "w8a16"
    if not isinstance(compute, str | os.PathLike) or not os.path.exists(compute):
        choices = f"{', '.join(map(repr, COMPUTES))}, 'auto', a mapping by layer, Decisions, or the path of a file of them"
        raise SquareQError(f"compute={compute!r} is none of {choices}")
    return Decisions.load(compute)


@contextlib.contextmanager
def _status(name: str, progress: bool) -> Iterator[Callable[[str], None]]:
    """A line on standard error that says what is going on; silent if that is not a terminal."""
    if not progress:
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status(f"compiling {name}") as status:
        yield lambda text: status.update(f"compiling {name}: {text}")
