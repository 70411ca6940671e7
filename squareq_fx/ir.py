"""What a captured model is: an `fx.GraphModule` whose every input is explicit, plus two frozen records.

`node.meta["squareq"]` holds an `Info`, `gm.meta["squareq"]` a `Program`. Nothing else of ours lives in a `meta`. A pass
never changes a record in place; it sets a new one on its own copy of the graph (`clone`).
"""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from squareq_fx.errors import PassError, VerificationError
from squareq_fx.lora import Lora

if TYPE_CHECKING:
    from squareq_fx.compute import Decisions

__all__ = [
    "CallSpec",
    "Info",
    "Level",
    "Packed",
    "Program",
    "Stage",
    "adapter_inputs",
    "clone",
    "fake_mode",
    "functions",
    "identifier",
    "info",
    "join_layers",
    "layers",
    "model_source",
    "operation_name",
    "program",
    "set_info",
    "set_program",
    "update_program",
    "weight_inputs",
]

_KEY = "squareq"


class Level(enum.IntEnum):
    """How far a graph has come; later levels allow more operations and promise more (`verify`)."""

    CAPTURED = 0
    CANONICAL = 1
    QUANTIZED = 2
    OUTLINED = 3
    DIFFERENTIATED = 4
    STREAMED = 5
    SCHEDULED = 6


@dataclass(frozen=True)
class Info:
    """One node's record.

    Attributes:
        kind: "input" for what the user passes, "weight" for a parameter, buffer, constant or slab tensor, "adapter" for a
            matrix of a LoRA branch, "node" for the rest.
        key: an input's path in the call (`added_cond_kwargs['time_ids']`); a weight's name in the state dict or slab; an
            adapter's, `<layer>.lora_A.weight`.
        layer: the slab layer this node computes or belongs to; several, where layers are computed as one, joined by "+"
            (`layers` tells them apart).
        made_by: the pass that made the node; None for what capture made.
        arguments: (block, name) pairs: what streaming blocks call this value in their own forward.
    """

    kind: str = "node"
    key: str | None = None
    layer: str | None = None
    made_by: str | None = None
    arguments: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class CallSpec:
    """How the original model is called, so that the compiled one answers to the same calls.

    Attributes:
        signature: of the model's `forward`, without `self`.
        input_paths: for every tensor input, its path in the bound arguments, in the order of the graph's inputs.
        literals: path to value, for every captured argument that is not a tensor.
        output_leaves: one entry a leaf of the model's output; None where the graph's next output goes, else a literal in a
            tuple.
        output_spec: the pytree the leaves make.
    """

    signature: inspect.Signature
    input_paths: tuple[str, ...]
    literals: Mapping[str, Any]
    output_leaves: tuple[tuple[Any] | None, ...]
    output_spec: Any


@dataclass(frozen=True)
class Stage:
    """One entry of the history: what a pass returned, and what it changed."""

    name: str
    graph: fx.GraphModule
    seconds: float
    summary: str


@dataclass(frozen=True)
class Packed:
    """Where one weight lies in its segment's flat buffer: offset and size in bytes, and what it is read as."""

    key: str
    offset: int
    nbytes: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Program:
    """The graph's record.

    Attributes:
        level: how far the graph has come.
        call: how the model is called.
        model_class: qualified name of the captured class, for messages.
        model_signature: the slab signature of the model's Linear layers (16 hex digits).
        block_paths: module paths of the streaming blocks.
        device: where the graph runs.
        dtype: the model's floating point type.
        guards: conditions on the input sizes under which the trace is the model's program (sympy expressions).
        segments: for every streamed segment, by name, what its flat buffer holds.
        decisions: how each layer's way to compute was decided, if it was (`squareq_fx.compute`).
        lora: what the `adapt` pass was told; None before it.
        gradients: what the graph returns after the model's outputs: (kind, key) of the adapters and inputs whose gradients they
            are; empty before `differentiate`.
        arena_bytes: size of the device buffer the scheduled loads own ranges of; 0 before `schedule`.
        constants: tensors that are neither parameter nor buffer, by weight key; shared, never written.
        tied: other names of a weight (tied tensors, shared modules), each to the key the graph knows it by.
        notes: what a reader should know and no node shows (layers that are never called).
        capture_seconds: how long the capture took.
        history: every stage so far, capture first.
    """

    level: Level
    call: CallSpec
    model_class: str
    model_signature: str
    block_paths: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    guards: tuple[Any, ...] = ()
    segments: Mapping[str, tuple[Packed, ...]] = field(default_factory=dict)
    decisions: Decisions | None = None
    lora: Lora | None = None
    gradients: tuple[tuple[str, str], ...] = ()
    arena_bytes: int = 0
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    capture_seconds: float = 0.0
    history: tuple[Stage, ...] = ()


def info(node: fx.Node) -> Info:
    """The node's record; a default one if nothing is known of it."""
    return node.meta.get(_KEY, _DEFAULT)


_DEFAULT = Info()


def layers(node: fx.Node) -> tuple[str, ...]:
    """The slab layers that `node` computes or belongs to; empty for none."""
    layer = info(node).layer
    return () if layer is None else tuple(layer.split(_JOIN))


def join_layers(names: Iterable[str]) -> str | None:
    """The value of `Info.layer` for a node that computes several layers, each named once; None for none."""
    return _JOIN.join(dict.fromkeys(names)) or None


_JOIN = "+"


def set_info(node: fx.Node, **changes: Any) -> fx.Node:
    """Give `node` a new record with `changes`; returns the node."""
    node.meta[_KEY] = replace(info(node), **changes)
    return node


def program(gm: fx.GraphModule) -> Program:
    """The graph's record.

    Raises:
        PassError: the graph was not made by `squareq_fx.capture`.
    """
    if _KEY not in gm.meta:
        raise PassError("this GraphModule has no squareq program record; make it with squareq_fx.capture(model)")
    return gm.meta[_KEY]


def set_program(gm: fx.GraphModule, record: Program) -> fx.GraphModule:
    """Attach `record` to `gm`, which the caller owns; returns it."""
    gm.meta[_KEY] = record
    return gm


def update_program(gm: fx.GraphModule, **changes: Any) -> fx.GraphModule:
    """Attach a changed record to `gm`, which the caller owns; returns it."""
    return set_program(gm, replace(program(gm), **changes))


def clone(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph and of its functions, sharing every tensor, record and `val`; what a pass may edit."""
    children = {name: clone(child) for name, child in functions(gm).items()}
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)  # copies meta one level deep
    copied = fx.GraphModule(children, graph, class_name=type(gm).__name__)
    copied.meta = dict(gm.meta)
    return copied


def functions(gm: fx.GraphModule) -> dict[str, fx.GraphModule]:
    """The unique functions the graph calls: its GraphModule children, by name."""
    return {name: child for name, child in gm.named_children() if isinstance(child, fx.GraphModule)}


def weight_inputs(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """The graph's weight placeholders by weight key, in order."""
    return _inputs(gm, "weight")


def adapter_inputs(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """The graph's adapter placeholders by key (`<layer>.lora_A.weight`), in order."""
    return _inputs(gm, "adapter")


def _inputs(gm: fx.GraphModule, kind: str) -> dict[str, fx.Node]:
    return {str(info(n).key): n for n in gm.graph.nodes if n.op == "placeholder" and info(n).kind == kind}


def fake_mode(gm: fx.GraphModule) -> Any:
    """The `FakeTensorMode` all `val`s of the graph live in.

    Raises:
        VerificationError: no node holds a fake tensor, so the graph was not made by `capture`.
    """
    for node in gm.graph.nodes:
        val = node.meta.get("val")
        for leaf in val if isinstance(val, tuple | list) else (val,):
            if isinstance(leaf, torch.Tensor) and hasattr(leaf, "fake_mode"):
                return leaf.fake_mode
    raise VerificationError("no node of this graph has a fake tensor in meta['val']; start from squareq_fx.capture(model)")


def identifier(text: str) -> str:
    """`text` as a Python identifier: `blocks.0['a']` becomes `blocks_0_a`."""
    name = re.sub(r"\W+", "_", text).strip("_")
    return f"_{name}" if not name or name[0].isdigit() else name


def operation_name(target: Any) -> str:
    """What a node that calls `target` is named after: `aten.add.Tensor` gives `add`."""
    return identifier(str(getattr(target, "_opname", None) or getattr(target, "__name__", "node")))


def model_source(node: fx.Node) -> str:
    """The line of the model's source that made `node`, or one it reads or is read by: module path and innermost line outside
    torch.
    """
    near = (node, *node.all_input_nodes, *node.users)
    return next((source for n in near if (source := _source(n))), "no source recorded")


def _source(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next((entry[0] for entry in reversed(list(stack.values())) if entry[0] and "metadata_hook" not in entry[0]), "")
    lines = str(node.meta.get("stack_trace") or "").strip().splitlines()
    frames = [i for i, line in enumerate(lines) if line.lstrip().startswith("File ")]
    outside = [i for i in frames if "/torch/" not in lines[i] and "squareq_fx/tracing" not in lines[i]] or frames
    where = ""
    if outside:
        i = outside[-1]
        code = lines[i + 1].strip() if i + 1 < len(lines) else ""
        where = f"{lines[i].strip()}: {code}"
    return "; ".join(part for part in (f"in {path}" if path else "", where) if part)
