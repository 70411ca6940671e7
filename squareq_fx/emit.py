"""The last step: weights become state, the model's own call signature is bound, the graph becomes a module that runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn

from squareq_fx.adapters.bank import AdapterBank
from squareq_fx.adapters.packing import Slot
from squareq_fx.binding import Binding
from squareq_fx.compiled import CompiledModule, Held
from squareq_fx.errors import SquareQError
from squareq_fx.gradients.halves import forward_only
from squareq_fx.ir import Level, adapter_inputs, clone, identifier, info, program
from squareq_fx.lowering.backends import Backend, Lowering, compiles
from squareq_fx.lowering.kept import KeptPrograms
from squareq_fx.runtime import Runtime, WeightStore
from squareq_fx.runtime.store import Backing
from squareq_fx.slab.reader import Slab
from squareq_fx.specs import spec
from squareq_fx.tracing.skeleton import skeleton
from squareq_fx.training import Training
from squareq_fx.weights import WeightValues

__all__ = ["CompiledModule", "emit"]


def emit(
    gm: fx.GraphModule,
    model: nn.Module,
    slab: Slab,
    *,
    backing: Backing = "host",
    keep_resident: Iterable[str] = (),
    backend: Backend = "eager",
    show: Callable[[str], None] = lambda text: None,
    value_of: Callable[[Any], int] | None = None,
    programs: KeptPrograms | None = None,
) -> CompiledModule:
    """A runnable module from a graph at any stage.

    Args:
        gm: what `pipeline.run` returned; unchanged. Weights that are still inputs become resident parameters and buffers,
            adapters float32 parameters, of which the first are called "default".
        model: where weights the slab does not hold come from; may live on `meta`.
        slab: the quantised weights.
        backing, keep_resident: see `WeightStore`.
        backend: how the graph's functions run (`Lowering`); all of them are compiled here.
        show: called with the progress of that, as text.
        value_of: the number to tune these for, of each size of the graph (`auto.usual_sizes`); default: as it was captured.
        programs: where what Inductor makes of the functions is read and kept; default: nowhere but in Inductor's own cache.

    Raises:
        SlabError: a weight has no value, or its bytes in the slab are damaged.
        SquareQError: there is no such backend, the graph has not come as far as it needs, or Inductor refuses a function.
    """
    whole, gm = gm, forward_only(gm)
    record = program(gm)
    lowering = Lowering(backend, record.device, value_of, programs)
    if backend != "eager" and record.level < Level.STREAMED:
        raise SquareQError(
            f"backend={backend!r} is for streamed graphs, and this one is {record.level.name.lower()}; go "
            'on to the pass stream, or choose backend="eager"'
        )
    values = WeightValues(model, slab, record.constants)
    inputs = {str(info(n).key): n for n in gm.graph.nodes if n.op == "placeholder" and info(n).kind == "weight"}
    streamed = [p.key for packed in record.segments.values() for p in packed]
    values.require([*inputs, *streamed])
    binding = Binding(gm, type(model).__name__)

    body = clone(gm)
    root = nn.Module()
    for name, child in body.named_children():
        root.add_module(name, child)
    paths = {
        key: _attach(root, body.graph, key, values.tensor(key, node.meta["val"].dtype).to(record.device))
        for key, node in inputs.items()
    }
    compiled = CompiledModule(root, body.graph, class_name=f"Compiled{type(model).__name__}")
    compiled.meta = dict(body.meta)
    state = compiled.__dict__
    state["_binding"] = binding
    state["lowering"] = lowering
    state["_original"] = skeleton(model)[0]
    state["config"] = getattr(model, "config", None)
    state["runtime"] = _runtime(gm, values, slab, backing, keep_resident) if record.level >= Level.STREAMED else None
    state["_component"] = "unet" if "UNet" in type(model).__name__ else "transformer"
    for path, holder in list(compiled.named_modules()):
        if type(holder) is nn.Module:
            Held.take(holder, state["_original"], path.removeprefix("weights."))
    state["_bank"] = _adapters(compiled, gm) if adapter_inputs(gm) else None
    state["training_step"] = None
    if program(whole).gradients:

        def resident(key: str) -> torch.Tensor:
            return operator.attrgetter(paths[key])(compiled)

        state["training_step"] = Training(whole, compiled._run, resident, lowering)
    compiled.eval()
    compiled.recompile()
    runtime = state["runtime"]
    if runtime is not None and compiles(backend):
        runtime.start_ahead()  # the weights' way to the device takes as long as programs from a cache
    try:
        lowering.prepare(compiled.lowered(), show)
    except BaseException:
        compiled.shutdown()
        raise
    return compiled


def _adapters(compiled: CompiledModule, gm: fx.GraphModule) -> AdapterBank:
    """The module's adapters, the first one made as the `adapt` pass was told."""
    slots = []
    pairs = iter(adapter_inputs(gm).values())
    for down, up in zip(pairs, pairs):
        a, b = down.meta["val"], up.meta["val"]
        slots.append(Slot(str(info(down).layer), int(a.shape[1]), int(b.shape[0]), spec(a.shape[0]), a.dtype))

    def attach(path: str, owner: nn.Module) -> None:
        parent, _, leaf = path.rpartition(".")
        _holder(compiled, parent)._modules[leaf] = owner
        Held.take(owner, compiled.__dict__["_original"], path)

    def detach(path: str) -> None:
        parent, _, leaf = path.rpartition(".")
        del compiled.get_submodule(parent)._modules[leaf]

    bank = AdapterBank(slots, program(gm).device, attach, detach)
    lora = program(gm).lora
    if lora is not None:
        bank.create("default", lora)
    return bank


def _holder(compiled: CompiledModule, path: str) -> nn.Module:
    """The module at a path, made if need be; looks like the original's there, and holds nothing of it."""
    owner: nn.Module = compiled
    done: list[str] = []
    for part in path.split("."):
        done.append(part)
        if part not in owner._modules:
            owner._modules[part] = nn.Module()  # add_module would find the original's of that name
            Held.take(owner._modules[part], compiled.__dict__["_original"], ".".join(done))  # type: ignore[arg-type]
        owner = owner._modules[part]  # type: ignore[assignment]
    return owner


def _attach(root: nn.Module, graph: fx.Graph, key: str, value: torch.Tensor) -> str:
    """The weight becomes a parameter or buffer under its own name, its placeholder a `get_attr`; returns its path."""
    node = next(n for n in graph.nodes if n.op == "placeholder" and info(n).key == key and info(n).kind == "weight")
    path = _free_path(root, key)
    owner = root
    for part in path.split(".")[:-1]:
        if part not in dict(owner.named_children()):
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    leaf = path.rpartition(".")[2]
    quantised = info(node).layer is not None
    if value.is_floating_point() and not quantised:
        owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    else:
        owner.register_buffer(leaf, value)
    with graph.inserting_before(node):
        attribute = graph.create_node("get_attr", path, name=identifier(key))
    attribute.meta = dict(node.meta)
    node.replace_all_uses_with(attribute)
    graph.erase_node(node)
    return path


def _free_path(root: nn.Module, key: str) -> str:
    """`key`, unless its first part is the name of a function of the graph or of an attribute of the module."""
    first = key.partition(".")[0]
    taken = isinstance(getattr(root, first, None), fx.GraphModule) or hasattr(CompiledModule, first)
    taken = taken or first in ("config", "lowering", "meta", "runtime", "training")
    return f"weights.{key}" if taken else key


def _runtime(
    gm: fx.GraphModule, values: WeightValues, slab: Slab, backing: Backing, keep_resident: Iterable[str]
) -> Runtime:
    record = program(gm)
    segments = [values.segment(name, packed) for name, packed in record.segments.items()]
    keys = {name: values.slab_keys(packed) for name, packed in record.segments.items()}
    store = WeightStore(
        slab.data,
        segments,
        backing=backing,
        keep_resident=keep_resident,
        verify=lambda name: slab.verify_segment(keys[name]),
    )
    return Runtime(store, device=record.device, arena_bytes=record.arena_bytes)


