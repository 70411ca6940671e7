"""Each call's weights become one flat buffer that is loaded before the call and evicted after its last use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from squareq_fx import ops
from squareq_fx.edit import call, drop_unused_weights, finish
from squareq_fx.errors import PassError
from squareq_fx.inference import empty
from squareq_fx.ir import Level, Packed, clone, fake_mode, functions, identifier, info, program, set_info, update_program
from squareq_fx.liveness import last_use, shared_storage
from squareq_fx.slab.layout import segment_layout

__all__ = ["Stream"]


@dataclass(frozen=True)
class Stream:
    """Explicit `load` and `evict` around every call that reads weights.

        w = squareq.load('transformer_blocks.0', visit=0, nbytes=...)      u8[nbytes]
        x = self.transformer_block(w, x, temb)
        squareq.evict(w, 'transformer_blocks.0', 0)

    A function takes its weights as one byte buffer and unpacks it with static views (`squareq.unpack`); the layout is
    `segment_layout`'s, which is that of a block in the slab file, so a block is one copy.

    Args:
        hold: a segment stays between two calls that read it when fewer than `hold` other segments are read in between, as long
            as that holds at most `hold` at a time; 1 holds it only if none is. So the blocks that end the forward are not
            loaded again for the backward, which begins with them.

    Requires: an outlined graph.   Preserves: signature, every value bit for bit.
    Weights that nodes outside any function read stay inputs; they are resident.

    Raises:
        PassError: the graph is not outlined, or two callers of a function lay out its weights differently.
    """

    hold: int = 1

    name = "stream"
    requires_level = Level.OUTLINED
    changes_inputs = True

    def __call__(self, gm: fx.GraphModule) -> fx.GraphModule:
        if program(gm).level >= Level.STREAMED:
            return clone(gm)
        for hold in range(self.hold, 1, -1):
            streamed = self._stream(clone(gm), hold)
            if _most_held(streamed) <= hold:  # more where a function returns views of its weights
                return streamed
        return self._stream(clone(gm), 1)

    def _stream(self, gm: fx.GraphModule, hold: int) -> fx.GraphModule:
        calls = [n for n in gm.graph.nodes if n.op == "call_module" and _weights(n)]
        layouts: dict[str, tuple[int, ...]] = {}
        segments: dict[str, tuple[Packed, ...]] = {}
        held = _held([str(info(n).key) for n in calls], hold)
        loads: dict[str, fx.Node] = {}
        visits: dict[str, int] = {}
        for node, stays in zip(calls, held):
            weights = _weights(node)
            packed = _pack(weights)
            segment = str(info(node).key)
            offsets = tuple(p.offset for p in packed)
            function = str(node.target)
            if layouts.setdefault(function, offsets) != offsets:
                raise PassError(f"{node.name} lays out the weights of {function} differently from its other callers")
            if segments.setdefault(segment, packed) != packed:
                raise PassError(f"two calls are both named {segment!r} but read different weights")
            if not stays:
                loads[segment] = self._load(gm, node, segment, visits.get(segment, 0), packed)
                visits[segment] = visits.get(segment, 0) + 1
            node.args = (loads[segment], *node.args[len(weights) :])
        for name in layouts:
            _unpack_inside(functions(gm)[name], layouts[name], fake_mode(gm), program(gm).device)
        _evict(gm)
        drop_unused_weights(gm)
        return update_program(finish(gm), level=Level.STREAMED, segments=segments)

    def _load(
        self, gm: fx.GraphModule, node: fx.Node, segment: str, visit: int, packed: tuple[Packed, ...]
    ) -> fx.Node:
        nbytes = packed[-1].offset + packed[-1].nbytes
        name = f"load_{identifier(segment)}" + (f"_v{visit}" if visit else "")
        with gm.graph.inserting_before(node):
            load = gm.graph.create_node(
                "call_function",
                ops.load,
                (segment,),
                {"visit": visit, "nbytes": nbytes, "offset": None, "device": program(gm).device},
                name=name,
            )
        load.meta["val"] = empty(fake_mode(gm), (nbytes,), torch.uint8, program(gm).device)
        return set_info(load, made_by=self.name, key=segment)


def _held(segments: list[str], hold: int) -> list[bool]:
    """For each call whether its segment is still there from the call before that read it."""
    held: list[bool] = []
    last: dict[str, int] = {}
    for i, segment in enumerate(segments):
        between = set(segments[last[segment] + 1 : i]) if segment in last else None
        held.append(between is not None and len(between) < hold)
        last[segment] = i
    return held


def _most_held(gm: fx.GraphModule) -> int:
    """How many segments are loaded at a time, at most."""
    count = most = 0
    for node in gm.graph.nodes:
        count += (node.target is ops.load) - (node.target is ops.evict)
        most = max(most, count)
    return most


def _weights(node: fx.Node) -> list[fx.Node]:
    """The leading arguments of a call that are weight inputs; `outline` puts them first."""
    found: list[fx.Node] = []
    for argument in node.args:
        if not isinstance(argument, fx.Node) or argument.op != "placeholder" or info(argument).kind != "weight":
            break
        found.append(argument)
    return found


def _pack(weights: list[fx.Node]) -> tuple[Packed, ...]:
    sizes = {str(info(w).key): w.meta["val"].numel() * w.meta["val"].element_size() for w in weights}
    dtypes = {str(info(w).key): w.meta["val"].dtype for w in weights}
    packed = tuple(Packed(key, offset, sizes[key], dtypes[key]) for key, offset in segment_layout(sizes.items()))
    if [p.key for p in packed] != list(sizes):
        raise PassError(f"the weights of this call are not in layout order: {list(sizes)[:3]}...")
    return packed


def _unpack_inside(function: fx.GraphModule, offsets: tuple[int, ...], mode: Any, device: torch.device) -> None:
    placeholders = [n for n in function.graph.nodes if n.op == "placeholder"][: len(offsets)]
    nbytes = offsets[-1] + placeholders[-1].meta["val"].numel() * placeholders[-1].meta["val"].element_size()
    with function.graph.inserting_before(placeholders[0]):
        buffer = function.graph.placeholder("weights")
    buffer.meta["val"] = empty(mode, (nbytes,), torch.uint8, device)
    set_info(buffer, kind="weight", key="weights", made_by="stream")
    first = next(n for n in function.graph.nodes if n.op != "placeholder")
    for old, offset in zip(placeholders, offsets):
        val = old.meta["val"]
        with function.graph.inserting_before(first):
            view = call(
                function.graph, ops.unpack, (buffer, offset, list(val.shape), val.dtype), like=first, made_by="stream"
            )
        set_info(view, key=info(old).key)
        old.replace_all_uses_with(view)
        name = old.name
        function.graph.erase_node(old)
        view.name = name
    finish(function)


def _evict(gm: fx.GraphModule) -> None:
    """After the last node that reads the buffer, also through views that a function returned."""
    roots = shared_storage(gm)
    for load in [n for n in gm.graph.nodes if n.target is ops.load]:
        last = last_use(gm, load, roots)
        if last.op == "output":
            raise PassError(f"the model returns a view of the weights of {load.args[0]!r}, which are gone after the call")
        with gm.graph.inserting_after(last):
            evict = gm.graph.create_node(
                "call_function",
                ops.evict,
                (load, load.args[0], load.kwargs["visit"]),
                name=load.name.replace("load_", "evict_", 1),
            )
        evict.meta["val"] = None
        set_info(evict, made_by="stream", key=str(load.args[0]))
