"""From the float32 masters of the active adapters to what the graph takes, and from its gradients back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Branch", "Part", "Slot", "pack", "unpack_gradients"]

_ALIGNMENT = 16  # elements: matrix products want rows that begin at 16 bytes


@dataclass(frozen=True)
class Slot:
    """One adapted layer of the graph: where A [r, in] and B [out, r] go.

    Args:
        rank_size: layers of one rank size get matrices of one rank, padded with zeros if need be.
        dtype: what the graph computes the branch in.
    """

    layer: str
    in_features: int
    out_features: int
    rank_size: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Part:
    """One adapter's share of one layer: float32 masters A [r, in] and B [out, r], and the factor of its branch."""

    down: torch.Tensor
    up: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class Branch:
    """A slot and the parts of the active adapters in it, side by side along the rank."""

    slot: Slot
    parts: tuple[Part, ...]

    @property
    def rank(self) -> int:
        return sum(part.down.shape[0] for part in self.parts)


def pack(branches: Sequence[Branch], device: torch.device) -> list[torch.Tensor]:
    """A and B of every branch, in order: [A0, B0, A1, B1, ...], with the factors in B.

    Several adapters become one of the sum of their ranks: B1 A1 + B2 A2 = [B1 B2] [A1; A2]. The matrices are parts of one
    buffer for each dtype, filled by a few kernels.
    """
    ranks: dict[str, int] = {}
    for branch in branches:
        size = branch.slot.rank_size
        ranks[size] = max(ranks.get(size, 0), branch.rank)
    padded = any(branch.rank != ranks[branch.slot.rank_size] for branch in branches)
    shapes = [shape for branch in branches for shape in _shapes(branch.slot, ranks[branch.slot.rank_size])]
    dtypes = [branch.slot.dtype for branch in branches for _ in range(2)]
    packed = _buffers(shapes, dtypes, device, zeroed=padded)
    targets, sources = [], []
    scaled = _scaled([part for branch in branches for part in branch.parts])
    for branch, down, up in zip(branches, packed[0::2], packed[1::2]):
        start = 0
        for part in branch.parts:
            stop = start + part.down.shape[0]
            targets += [down[start:stop], up[:, start:stop]]
            sources += [part.down.detach(), next(scaled)]
            start = stop
    if targets:
        torch._foreach_copy_(targets, sources)
    return packed


def unpack_gradients(
    branches: Sequence[Branch], gradients: Sequence[torch.Tensor | None]
) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Gradients of the masters, float32, for every part of every branch, from those of what `pack` gave.

    Args:
        gradients: in the order of `pack`; None where the output does not depend on the matrix.
    """
    found: list[tuple[torch.Tensor | None, torch.Tensor | None]] = []
    factors: list[float] = []
    pieces: list[torch.Tensor | None] = []
    for branch, down, up in zip(branches, gradients[0::2], gradients[1::2]):
        start = 0
        for part in branch.parts:
            stop = start + part.down.shape[0]
            pieces += [None if down is None else down[start:stop], None if up is None else up[:, start:stop]]
            factors += [1.0, part.scaling]
            start = stop
    present = [p for p in pieces if p is not None]
    if present:
        masters = _buffers([p.shape for p in present], [torch.float32] * len(present), present[0].device, zeroed=False)
        torch._foreach_copy_(masters, present)
        torch._foreach_mul_(masters, [f for f, p in zip(factors, pieces) if p is not None])
        waiting = iter(masters)
        pieces = [None if p is None else next(waiting) for p in pieces]
    for down, up in zip(pieces[0::2], pieces[1::2]):
        found.append((down, up))
    return found


def _shapes(slot: Slot, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (rank, slot.in_features), (slot.out_features, rank)


def _scaled(parts: Sequence[Part]) -> Iterator[torch.Tensor]:
    if not parts:
        return iter(())
    return iter(torch._foreach_mul([part.up.detach() for part in parts], [part.scaling for part in parts]))


def _buffers(
    shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype], device: torch.device, *, zeroed: bool
) -> list[torch.Tensor]:
    """Contiguous tensors of these shapes, each at an aligned place of its dtype's one buffer."""
    sizes = [-(-shape[0] * shape[1] // _ALIGNMENT) * _ALIGNMENT for shape in shapes]
    make = torch.zeros if zeroed else torch.empty
    pieces = {}
    for dtype in dict.fromkeys(dtypes):
        own = [size for size, d in zip(sizes, dtypes) if d == dtype]
        pieces[dtype] = iter(make(sum(own), dtype=dtype, device=device).split(own))
    return [_shaped(next(pieces[dtype]), shape) for shape, dtype in zip(shapes, dtypes)]


def _shaped(piece: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    numel = shape[0] * shape[1]
    return (piece if piece.numel() == numel else piece[:numel]).view(shape[0], shape[1])
