"""A graph run on fake tensors under a tracker: each of its functions once for each kind of arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from squareq_fx.memory.tracking import AllocationTracker

__all__ = ["Rehearsal", "Visit"]


@dataclass(frozen=True)
class Visit:
    """What one node of the top level that takes memory does.

    Args:
        name: the node's.
        peak: most bytes at a time while it runs, held ones included.
        held: bytes held after it.
    """

    name: str
    peak: int
    held: int


@dataclass(frozen=True)
class _Made:
    """A tensor that a function returned.

    Args:
        owner: which of its arguments and earlier results it is a view of; None if it is new.
        storage_bytes: of a new one.
        counts: whether they are memory taken for it.
        offset: in elements, from where its owner begins.
    """

    owner: int | None
    storage_bytes: int
    counts: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Summary:
    """One run of a function: most bytes beyond those held when it began, at which node, and its results."""

    extra: int
    at: str
    results: tuple[Any, ...]
    spec: Any


class Rehearsal:
    """Runs graphs whose values are fake.

    Args:
        tracker, mode: entered while `run` is called, the tracker last; all fake tensors are of this mode.
    """

    def __init__(self, tracker: AllocationTracker, mode: FakeTensorMode) -> None:
        self.tracker, self.mode = tracker, mode
        self._summaries: dict[Any, _Summary | None] = {}

    def run(self, gm: fx.GraphModule, arguments: Sequence[Any]) -> tuple[Any, list[Visit]]:
        """The graph's result, and what each node of its top level did that took memory."""
        level = _TopLevel(gm, self)
        return level.run(*arguments), level.visits

    def call(self, name: str, function: fx.GraphModule, arguments: tuple[Any, ...]) -> Any:
        """The result of a function of the graph that the node `name` calls: run, or as it was with such arguments before."""
        given = pytree.tree_leaves(arguments)
        key = (function, tuple(_kind(leaf, given[:i]) for i, leaf in enumerate(given)))
        before = self.tracker.held
        known = self._summaries.get(key)
        if known is not None:
            results = self._again(known, given)
            self.tracker.reach(before + known.extra, (name, known.at))
            return results
        with self.tracker.span():
            results = _Function(function, self, name).run(*arguments)
            extra, at = self.tracker.peak - before, self.tracker.peak_place[1]
        leaves, spec = pytree.tree_flatten(results)
        made = self._made(leaves, given)
        if made is not None:
            self._summaries[key] = _Summary(extra, at, made, spec)
        return results

    def _made(self, results: Sequence[Any], arguments: Sequence[Any]) -> tuple[Any, ...] | None:
        """How `_again` makes the results; None if it cannot, because one is a view of another type."""
        made: list[Any] = []
        for i, result in enumerate(results):
            if not isinstance(result, torch.Tensor):
                made.append(result)
                continue
            there = [*arguments, *results[:i]]
            owner = next((j for j, other in enumerate(there) if _shares(other, result)), None)
            if owner is not None and there[owner].dtype != result.dtype:
                return None
            counts = self.tracker.bytes_of(result) > 0
            start = int(result.storage_offset()) - (0 if owner is None else int(there[owner].storage_offset()))
            place = tuple(result.shape), result.stride(), start
            made.append(_Made(owner, result.untyped_storage().nbytes(), counts, *place, result.dtype, result.device))
        return tuple(made)

    def _again(self, summary: _Summary, arguments: Sequence[Any]) -> Any:
        there = list(arguments)
        for made in summary.results:
            if not isinstance(made, _Made):
                there.append(made)
                continue
            if made.owner is not None:
                whole = there[made.owner]
            else:
                with contextlib.nullcontext() if made.counts else self.tracker.uncounted():
                    whole = torch.empty(made.storage_bytes // made.dtype.itemsize, dtype=made.dtype, device=made.device)
            there.append(torch.as_strided(whole, made.shape, made.stride, whole.storage_offset() + made.offset))
        return pytree.tree_unflatten(there[len(arguments) :], summary.spec)


def _kind(value: Any, before: Sequence[Any]) -> Any:
    """What a function's use of memory depends on in an argument."""
    if not isinstance(value, torch.Tensor):
        return value
    owner = next((i for i, other in enumerate(before) if _shares(other, value)), None)
    return owner, tuple(value.shape), value.stride(), value.dtype, value.device


def _shares(one: Any, other: torch.Tensor) -> bool:
    return isinstance(one, torch.Tensor) and one.untyped_storage()._cdata == other.untyped_storage()._cdata


class _Function(fx.Interpreter):
    """A function's nodes, one by one; values go when nothing reads them any more, as in the code of a GraphModule."""

    def __init__(self, gm: fx.GraphModule, rehearsal: Rehearsal, caller: str) -> None:
        super().__init__(gm)
        self._rehearsal, self._caller = rehearsal, caller

    def run_node(self, node: fx.Node) -> Any:
        self._rehearsal.tracker.place = self._caller, node.name
        return super().run_node(node)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._rehearsal.mode.from_tensor(super().get_attr(target, args, kwargs))


class _TopLevel(_Function):
    def __init__(self, gm: fx.GraphModule, rehearsal: Rehearsal) -> None:
        super().__init__(gm, rehearsal, "")
        self.visits: list[Visit] = []

    def run_node(self, node: fx.Node) -> Any:
        self._caller = node.name
        tracker = self._rehearsal.tracker
        before = tracker.held
        with tracker.span():
            result = super().run_node(node)
            if tracker.peak > before:
                self.visits.append(Visit(node.name, tracker.peak, tracker.held))
        return result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._rehearsal.call(self._caller, self.fetch_attr(target), args)
