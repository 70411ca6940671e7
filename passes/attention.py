"""aten.scaled_dot_product_attention(q, k, v)  ->  squareq.attention(q, k, v, backend=...)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from squareq_fx.attention_op import attention
from squareq_fx.attention_rules import BACKENDS, Backend, refusal
from squareq_fx.edit import call, finish
from squareq_fx.errors import PassError
from squareq_fx.inference import infer
from squareq_fx.ir import Level, clone, fake_mode, functions, info, model_source, program, set_info
from squareq_fx.specs import spec

__all__ = ["Attention"]

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Attention:
    """The kernel of every attention is named in the graph.

    Args:
        backend: "auto", or the one kernel to use: "cudnn", "flash", "efficient", "math" (`squareq_fx.attention_op`).

    "auto" takes the first that takes these types: on CUDA cudnn (on devices of capability 9 and 10, from cuDNN 9.15.1 on, whose
    older versions erred on lengths that are no multiple of 128), flash, efficient, math; on the CPU flash, math. Attention with
    dropout stays as it is, and the backward keeps the kernels its trace has: cuDNN's dies on the layouts diffusers makes.

    Requires: a streamed graph (after `differentiate`, since the operation has no derivative).   Preserves: signature, sizes and
    types; values to rounding, and bit for bit on the CPU. Where a kernel leaves its result in another memory layout, the types
    of what follows are inferred anew; where that would reach the end of a function, the layout is restored by a copy.

    Raises:
        PassError: the chosen backend does not take a call, or there is no such backend.
    """

    backend: Backend | Literal["auto"] = "auto"

    name = "attention"
    requires_level = Level.STREAMED

    def __post_init__(self) -> None:
        if self.backend not in ("auto", *BACKENDS):
            raise PassError(f"backend={self.backend!r} is none of auto, {', '.join(BACKENDS)}")

    def __call__(self, gm: fx.GraphModule) -> fx.GraphModule:
        gm = clone(gm)
        device = program(gm).device
        mode = fake_mode(gm)
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        for graph in (gm, *functions(gm).values()):
            for node in [n for n in graph.graph.nodes if n.target is _SDPA]:
                arguments = _arguments(node)
                if not arguments.pop("dropout_p"):
                    _replace(node, arguments, self._choice(node, arguments, device.type, capability), mode)
            graph.recompile()
        return finish(gm)

    def ensures(self, before: fx.GraphModule, after: fx.GraphModule) -> None:
        """No attention without dropout is left to choose its kernel at run time, unless its layout is no kernel's.

        Raises:
            PassError: naming the call.
        """
        for graph in (after, *functions(after).values()):
            for node in graph.graph.nodes:
                if node.target is _SDPA and not _arguments(node)["dropout_p"] and _is_plain(node.meta["val"]):
                    raise PassError(f"{node.name} still chooses its kernel at run time\n  model source: {model_source(node)}")

    def _choice(self, node: fx.Node, arguments: dict[str, Any], device: str, capability: tuple[int, int]) -> str:
        types = {k: v.meta["val"] if isinstance(v, fx.Node) else v for k, v in arguments.items() if k != "scale"}
        order = _order(device, capability) if self.backend == "auto" else (self.backend,)
        reasons = {b: refusal(b, **types, device=device, capability=capability) for b in order}
        chosen = next((b for b, reason in reasons.items() if reason is None), None)
        if chosen is None:
            raise PassError(
                f"attention {node.name} cannot be computed by {self.backend}: {reasons[self.backend]}. Leave backend='auto'.\n"
                f"  model source: {model_source(node)}"
            )
        return chosen


def _order(device: str, capability: tuple[int, int]) -> tuple[str, ...]:
    if device != "cuda":
        return ("flash", "math")
    fast = capability[0] in (9, 10) and (torch.backends.cudnn.version() or 0) > 91500
    return (*(("cudnn",) if fast else ()), "flash", "efficient", "math")


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The call's arguments by name, with the defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema), node.args)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def _replace(node: fx.Node, arguments: dict[str, Any], backend: str, mode: Any) -> None:
    tensors = [arguments[name] for name in ("query", "key", "value")]
    options = [arguments[name] for name in ("attn_mask", "is_causal", "scale", "enable_gqa")]
    while options and (options[-1] is None or options[-1] is False):
        options.pop()
    stated = node.meta["val"]
    with node.graph.inserting_before(node):
        new = call(node.graph, attention, (*tensors, *options), {"backend": backend}, like=node, layer=info(node).layer)
    set_info(new, arguments=info(node).arguments)
    users = list(node.users)
    for user in users:
        user.replace_input_with(node, new)
    if spec(new.meta["val"]) != spec(stated) and not _revalued(new, mode):
        restored = _restored(new, stated)
        for user in users:
            user.replace_input_with(new, restored if restored is not None else node)
        if restored is None:
            node.graph.erase_node(new)
            return
    name = node.name
    node.graph.erase_node(node)
    new.name = name


def _revalued(new: fx.Node, mode: Any) -> bool:
    """Infer anew what follows from the node's new type; False, and nothing changed, if the function's result would change."""
    changed = {new: new.meta["val"]}
    old: dict[fx.Node, Any] = {}
    done = True
    for node in _after(new):
        if not any(a in changed for a in node.all_input_nodes):
            continue
        try:
            val = infer(node.target, node.args, node.kwargs, mode) if node.op == "call_function" else None  # type: ignore[arg-type]
        except PassError:
            val = None
        if val is None:
            done = False
            break
        if spec(val) != spec(node.meta["val"]):
            old[node] = node.meta["val"]
            node.meta["val"] = changed[node] = val
    if not done:
        for node, val in old.items():
            node.meta["val"] = val
    return done


def _after(node: fx.Node) -> list[fx.Node]:
    nodes = list(node.graph.nodes)
    return nodes[nodes.index(node) + 1 :]


def _restored(new: fx.Node, stated: torch.Tensor) -> fx.Node | None:
    """The result copied to the memory layout stated; None if that is neither of the two that are plain."""
    made: list[fx.Node] = []

    def then(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with new.graph.inserting_before(made[-1].next if made else new.next):
            made.append(call(new.graph, target, args, kwargs, like=new))
        return made[-1]

    copy = {"memory_format": torch.contiguous_format}
    result = then(aten.clone.default, new, **copy)
    if spec(result.meta["val"]) != spec(stated):
        result = then(aten.transpose.int, then(aten.clone.default, then(aten.transpose.int, new, 1, 2), **copy), 1, 2)
    found = spec(result.meta["val"]) == spec(stated)
    for node in reversed(made):
        if not node.users and (node is not result or not found):
            new.graph.erase_node(node)
    return result if found else None


def _is_plain(val: torch.Tensor) -> bool:
    """Is it dense in memory, with heads or tokens first?"""
    swapped = val.transpose(-3, -2) if val.dim() > 2 else val
    return any(spec(t) == spec(t.new_empty(t.shape)) for t in (val, swapped))
