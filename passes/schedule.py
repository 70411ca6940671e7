"""Which bytes of the arena each load owns, and where its copy is started."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from squareq_fx import ops
from squareq_fx.edit import finish
from squareq_fx.errors import PassError
from squareq_fx.ir import Level, clone, info, program, set_info, update_program

__all__ = ["Schedule"]

_ALIGNMENT = 256


@dataclass(frozen=True)
class Schedule:
    """A ring of equal slots and a fixed prefetch distance.

    Args:
        slots: how many segments the arena holds at once; each slot is as large as the largest segment.
        distance: how many loads ahead a copy is started; less than `slots`, or it would wait for its own slot.
        budget: the most bytes the arena may take; None for no limit.

    Requires: a streamed graph without prefetches.   Preserves: signature, every value bit for bit.
    A prefetch is issued right after an earlier load, as soon as a slot is free: the copy runs while that block computes.

    Raises:
        PassError: the ring does not fit the budget (naming the largest segment), or a load finds no free slot.
    """

    slots: int = 2
    distance: int = 1
    budget: int | None = None

    name = "schedule"
    requires_level = Level.STREAMED

    def __post_init__(self) -> None:
        if self.slots < 1 or not 0 <= self.distance < self.slots:
            raise PassError(
                f"schedule: distance {self.distance} needs at least {self.distance + 1} slots, there are {self.slots}"
            )

    def __call__(self, gm: fx.GraphModule) -> fx.GraphModule:
        gm = clone(gm)
        if program(gm).level >= Level.SCHEDULED:
            return gm
        loads = [n for n in gm.graph.nodes if n.target is ops.load]
        slot_bytes = max((_aligned(int(n.kwargs["nbytes"])) for n in loads), default=0)
        slots = min(self.slots, len(loads))
        self._check_budget(loads, slots * slot_bytes)
        self._assign(gm, loads, slots, slot_bytes)
        return update_program(finish(gm), level=Level.SCHEDULED, arena_bytes=slots * slot_bytes)

    def _check_budget(self, loads: list[fx.Node], arena: int) -> None:
        if self.budget is None or arena <= self.budget:
            return
        largest = max(loads, key=lambda n: int(n.kwargs["nbytes"]))  # type: ignore[arg-type]
        raise PassError(
            f"the arena needs {arena:,} bytes ({self.slots} slots of the largest segment, {largest.args[0]!r} with "
            f"{largest.kwargs['nbytes']:,} bytes), the budget is {self.budget:,}. Raise the budget, use fewer slots, or cut "
            "the model into smaller blocks with block_pattern."
        )

    def _assign(self, gm: fx.GraphModule, loads: list[fx.Node], slots: int, slot_bytes: int) -> None:
        """Walk the graph once. A load that is reached takes its copy if it has none; then later copies are started."""
        free = list(range(slots))
        slot_of: dict[fx.Node, int] = {}
        following = 0  # the first load whose copy is not started yet
        started = 0
        for node in list(gm.graph.nodes):
            if node.target is ops.evict:
                free.append(slot_of[node.args[0]])  # type: ignore[index]
                last = node
                wanted = started + self.distance
            elif node.target is ops.load:
                if node not in slot_of:
                    if not free:
                        raise PassError(
                            f"{node.name}: no slot is free; earlier segments are still in use. Use more slots than {slots}."
                        )
                    slot_of[node] = free.pop(0)
                    following = loads.index(node) + 1
                started = loads.index(node) + 1
                last = node
                wanted = started + self.distance
            else:
                continue
            while following < min(wanted, len(loads)) and free:
                target = loads[following]
                slot_of[target] = free.pop(0)
                last = _prefetch(gm.graph, last, target, slot_of[target] * slot_bytes)
                following += 1
        for load, slot in slot_of.items():
            load.kwargs = {**load.kwargs, "offset": slot * slot_bytes}


def _prefetch(graph: fx.Graph, after: fx.Node, load: fx.Node, offset: int) -> fx.Node:
    with graph.inserting_after(after):
        node = graph.create_node(
            "call_function",
            ops.prefetch,
            (load.args[0],),
            {"visit": load.kwargs["visit"], "nbytes": load.kwargs["nbytes"], "offset": offset},
            name=load.name.replace("load_", "prefetch_", 1),
        )
    node.meta["val"] = None
    return set_info(node, made_by="schedule", key=info(load).key)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
