"""Which modules of a model are its streaming blocks."""

from __future__ import annotations

import re
from collections import Counter

from torch import nn

from squareq_fx.errors import CaptureError

__all__ = ["block_paths"]

_MIN_LINEARS = 2
_MIN_LINEAR_SHARE = 0.5


def block_paths(model: nn.Module, pattern: str | None = None) -> tuple[str, ...]:
    """Module paths that are loaded and evicted as one unit, in registration order.

    Without a pattern a block is an entry of an `nn.ModuleList` or `nn.Sequential` that holds at least two Linear
    layers which are at least half of its weights, whose class occurs at least twice, and that contains no
    such entry itself (the deepest wins). For SDXL these are the 70 `BasicTransformerBlock`s, for Flux the 19 double
    and 38 single blocks.

    Args:
        model: the model; only names, types and shapes are read, so it may live on `meta`.
        pattern: a regular expression that must match a whole module path.

    Raises:
        CaptureError: the pattern is not a regular expression, matches nothing, or matches nested modules.
    """
    if pattern is not None:
        return _matching(model, pattern)
    entries = [
        (path, module)
        for path, module in model.named_modules()
        if _is_container_entry(model, path) and _is_linear_heavy(module)
    ]
    count = Counter(type(module) for _, module in entries)
    repeated = [path for path, module in entries if count[type(module)] > 1]
    return tuple(p for p in repeated if not any(q.startswith(p + ".") for q in repeated))


def _matching(model: nn.Module, pattern: str) -> tuple[str, ...]:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise CaptureError(f"block_pattern {pattern!r} is not a regular expression: {error}") from error
    names = [path for path, _ in model.named_modules() if path]
    found = tuple(path for path in names if regex.fullmatch(path))
    if not found:
        raise CaptureError(
            f"block_pattern {pattern!r} matches no module; module paths look like {', '.join(names[:5])}"
        )
    for path in found:
        inner = [other for other in found if other.startswith(path + ".")]
        if inner:
            raise CaptureError(f"block_pattern {pattern!r} matches {path} and {inner[0]} inside it; blocks cannot nest")
    return found


def _is_container_entry(model: nn.Module, path: str) -> bool:
    parent, _, leaf = path.rpartition(".")
    return leaf.isdigit() and isinstance(model.get_submodule(parent), nn.ModuleList | nn.Sequential)


def _is_linear_heavy(module: nn.Module) -> bool:
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    if len(linears) < _MIN_LINEARS:
        return False
    total = sum(p.numel() for p in module.parameters())
    return sum(m.weight.numel() for m in linears) >= _MIN_LINEAR_SHARE * total
