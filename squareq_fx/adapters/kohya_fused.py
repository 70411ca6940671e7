"""Several layers in one pair of A and B, as Black Forest Labs' models have q, k and v in one weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from squareq_fx.adapters.groups import Group
from squareq_fx.adapters.kohya_names import Slot
from squareq_fx.adapters.state import LayerAdapter

__all__ = ["fuse", "split", "with_alpha"]


def with_alpha(part: LayerAdapter, alpha: float) -> LayerAdapter:
    """The same function with another alpha; B takes up the difference, rounded once."""
    return part if part.alpha == alpha else LayerAdapter(part.down, (part.up.double() * (part.alpha / alpha)).float(), alpha)


def fuse(slots: Sequence[Slot], parts: Sequence[LayerAdapter | None], rows: Sequence[int]) -> LayerAdapter:
    """One pair for all slots: A of the ranks' sum, B block-diagonal; a layer without adapter has rows of zeros, so nothing.

    Args:
        parts: of each slot; at least one is there.
        rows: out of each slot's layer.
    """
    pairs = [_swapped(part) if part is not None and slot.swapped else part for slot, part in zip(slots, parts)]
    present = [part for part in pairs if part is not None]
    if len(slots) == 1:
        return present[0]
    scaling, rank = present[0].scaling, sum(part.rank for part in present)
    up = torch.zeros(sum(rows), rank)
    row = column = 0
    for part, out in zip(pairs, rows):
        if part is not None:
            up[row : row + out, column : column + part.rank] = with_alpha(part, scaling * part.rank).up.detach()
            column += part.rank
        row += out
    return LayerAdapter(torch.cat([part.down for part in present]), up, scaling * rank)


def split(
    pair: Group, slots: Sequence[Slot], rows: Sequence[int], ranks: Sequence[int] | None
) -> list[LayerAdapter | None]:
    """What each slot has of a pair; None for a layer that was written without an adapter.

    Args:
        rows: out of each slot's layer; they add up to the rows of B.
        ranks: of each slot, if the file says so; believed if B is zero elsewhere.
    """
    alpha = float(pair.rank if pair.alpha is None else pair.alpha)
    ups = pair.up.split(list(rows))
    equal = [pair.rank // len(rows)] * len(rows)
    own = next((given for given in (ranks, equal) if given is not None and _is_block_diagonal(ups, pair.rank, given)), None)
    if own is None:
        parts: list[LayerAdapter | None] = [LayerAdapter(pair.down.clone(), up.clone(), alpha) for up in ups]
    else:
        blocks = zip(pair.down.split(list(own)), ups, own, _starts(own))
        parts = [
            LayerAdapter(down.clone(), up[:, start : start + rank].clone(), alpha * rank / pair.rank) if rank else None
            for down, up, rank, start in blocks
        ]
    return [_swapped(part) if part is not None and slot.swapped else part for slot, part in zip(slots, parts)]


def _is_block_diagonal(ups: Sequence[torch.Tensor], rank: int, ranks: Sequence[int]) -> bool:
    if (len(ranks), sum(ranks)) != (len(ups), rank) or min(ranks) < 0:
        return False
    outside = (
        bool(up[:, :start].any() or up[:, start + own :].any()) for up, own, start in zip(ups, ranks, _starts(ranks))
    )
    return not any(outside)


def _starts(ranks: Sequence[int]) -> list[int]:
    return [sum(ranks[:i]) for i in range(len(ranks))]


def _swapped(part: LayerAdapter) -> LayerAdapter:
    first, second = part.up.chunk(2)
    return replace(part, up=torch.cat([second, first]))
