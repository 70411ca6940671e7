"""`compile`: capture, run the passes, emit."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, get_args

import torch
from torch import nn

from squareq_fx.capture import capture
from squareq_fx.emit import CompiledModule, emit
from squareq_fx.errors import SquareQError
from squareq_fx.ir import Stage
from squareq_fx.lora import Lora
from squareq_fx.passes import Save, default_passes
from squareq_fx.pipeline import Pass, run
from squareq_fx.runtime.store import Backing
from squareq_fx.slab import Slab, open_slab
from squareq_fx.weights import check_same_model, check_same_weights

__all__ = ["compile"]


def compile(
    model: nn.Module,
    slab: Slab | str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    passes: Iterable[Pass] | None = None,
    until: str | None = None,
    lora: Lora | None = None,
    save: Save | Mapping[str, Save] = "recompute",
    inputs: Iterable[str] = (),
    device: torch.device | str | None = None,
    backing: Backing = "host",
    keep_resident: Iterable[str] = (),
    slots: int = 2,
    distance: int = 1,
    budget: int | None = None,
    block_pattern: str | None = None,
    observe: Callable[[Stage], None] | None = None,
    progress: bool = True,
) -> CompiledModule:
    """A model that computes on a slab's INT8 weights and loads them block by block.

    Args:
        model: the module, real or on `meta`; it is not changed. On `meta` everything comes from the slab.
        slab: an opened slab, or the path of one.
        example_inputs: what the model is called with (dict, tuple, or a pair of both); only sizes and dtypes are read, and
            every size is dynamic as far as the model allows. Default: the slab's record, else the model's diffusers family.
        passes: instead of `default_passes(slab, ...)`.
        until: stop after the pass of this name; the result still runs, with the weights resident.
        lora: adapters to train, or to load into; the module then has a backward.
        save: what each block keeps for the backward (`Differentiate`): "recompute", "save" or "offload", for all or by segment.
        inputs: paths of inputs of the model that get a gradient too.
        device: where it runs; default: where the model is, the CPU for `meta`.
        backing: "host" (pinned memory), "disk" (the mapped file), or "resident" (everything on the device).
        keep_resident: segments that are never evicted.
        slots, distance, budget: of the `schedule` pass: segments the arena holds, loads started ahead, most bytes.
        block_pattern: which modules are blocks (`block_paths`); default: the slab's record.
        observe: called after each stage.
        progress: show the running stage on a terminal.

    Returns:
        A runnable `torch.fx.GraphModule`, called as the model is.

    Raises:
        SlabError: the slab is damaged, of another model, or lacks a weight.
        CaptureError: the model cannot be captured or it is unknown what to call it with.
        PassError: a pass refuses the graph or broke it.
        SquareQError: `backing` is not one of the three.
    """
    if backing not in get_args(Backing):
        raise SquareQError(f"backing={backing!r} is none of {', '.join(get_args(Backing))}")
    opened = slab if isinstance(slab, Slab) else open_slab(slab)
    check_same_model(model, opened)
    check_same_weights(model, opened)
    if passes is None:
        passes = default_passes(
            opened, lora=lora, save=save, inputs=inputs, slots=slots, distance=distance, budget=budget
        )
    with _status(type(model).__name__, progress) as show_stage:

        def on_stage(stage: Stage) -> None:
            show_stage(f"{stage.name} done in {stage.seconds:.1f} s")
            if observe is not None:
                observe(stage)

        show_stage("capturing; half a minute for the largest models")
        graph = capture(model, example_inputs, slab=opened, device=device, block_pattern=block_pattern)
        graph = run(graph, passes, until=until, observe=on_stage)
        return emit(graph, model, opened, backing=backing, keep_resident=keep_resident)


@contextlib.contextmanager
def _status(name: str, progress: bool) -> Iterator[Callable[[str], None]]:
    """A line on standard error that says what is going on; silent if that is not a terminal."""
    from rich.console import Console

    console = Console(stderr=True, quiet=not progress)
    with console.status(f"compiling {name}") as status:
        yield lambda text: status.update(f"compiling {name}: {text}")


