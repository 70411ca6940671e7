"""Execution order: which module runs when, and from that the segments of the file."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from squareq_fx.errors import SlabError

__all__ = ["group_segments", "record_execution"]

# What a forward on meta tensors can die of when it looks at values, mixes in tensors it made on another
# device, or the like.
_CANNOT_RUN = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, ImportError)


def record_execution(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str] | None:
    """Paths of the modules in the order in which their forwards begin, each as often as it runs.

    A copy of the model runs whose parameters and buffers are on `meta`, so it costs no memory and changes
    nothing, not even what a forward may cache on its module. A module registered twice appears under its
    first path.

    Args:
        args, kwargs: example inputs on `meta`.

    Returns:
        None, with a warning, if the forward cannot run on meta tensors.

    Raises:
        SlabError: the inputs do not fit the forward's signature.
    """
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise SlabError(f"example_inputs do not fit {type(model).__name__}.forward: {error}") from error
    visits: list[str] = []
    try:
        ghost = _on_meta(model)
        for path, module in ghost.named_modules():
            module.register_forward_pre_hook(lambda _module, _args, path=path: visits.append(path))
        with torch.no_grad():
            ghost(*args, **kwargs)
    except _CANNOT_RUN as error:
        warnings.warn(
            f"execution order of {type(model).__name__} could not be recorded, registration order is used: "
            f"its forward on meta tensors raised {type(error).__name__}: {str(error)[:200]}",
            stacklevel=2,
        )
        return None
    return visits


def group_segments(owners: Sequence[str], visits: Iterable[str] | None, blocks: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Cut the owners of tensors into segments: each block is one, and so is each run between two blocks.

    A module that runs in several segments belongs to the first. A module that never runs itself goes with the
    nearest module around it that does (its parent uses its weights directly), or to its block, or else to the
    end.

    Args:
        owners: module paths that own tensors, in registration order.
        visits: from `record_execution`, or None for registration order.
        blocks: paths of the streaming blocks.

    Returns:
        (segment name, owners) in execution order. A block's segment has the block's path, any other
        "glue.<first owner>".
    """
    block_of = _block_finder(owners, set(blocks))
    if visits is None:
        visits, ran = list(owners), set(owners)
    else:
        visits = list(visits)
        ran = set(visits)
    follow: dict[str, list[str]] = {}
    late: list[str] = []
    for owner in owners:
        anchor = next((path for path in _around(owner) if path in ran), None)
        (late if anchor is None else follow.setdefault(anchor, [])).append(owner)
    runs: list[tuple[str | None, list[str]]] = []
    of_block: dict[str, list[str]] = {}
    seen: set[str] = set()
    for owner in [owner for visit in visits for owner in follow.get(visit, ())] + late:
        block = block_of[owner]
        if not runs or runs[-1][0] != block or (owner in late[:1] and block is None):
            members = of_block.setdefault(block, []) if block is not None else []
            runs.append((block, members))
        if owner not in seen:
            seen.add(owner)
            runs[-1][1].append(owner)
    segments: dict[str, list[str]] = {}
    for block, members in runs:
        if members:
            name = block if block is not None else f"glue.{members[0]}".rstrip(".")
            while block is None and (name in segments or name in of_block):
                name += "'"
            segments[name] = members
    return list(segments.items())


def _on_meta(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _around(owner: str) -> Iterable[str]:
    """The module itself and those around it, nearest first, without the root; the root only for its own
    tensors.
    """
    path = owner
    while path:
        yield path
        path = path.rpartition(".")[0]
    if not owner:
        yield ""


def _block_finder(owners: Sequence[str], blocks: set[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for owner in owners:
        found[owner] = next((path for path in _around(owner) if path in blocks), None)
    return found
