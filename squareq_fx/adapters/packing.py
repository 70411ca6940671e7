"""From the float32 masters of the active adapters to what the graph takes, and from its gradients back."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

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


@torch.no_grad()
def pack(branches: Sequence[Branch], device: torch.device) -> list[torch.Tensor]:
    """A and B of every branch, in order: [A0, B0, A1, B1, ...], with the factors in B.

    Several adapters become one of the sum of their ranks: B1 A1 + B2 A2 = [B1 B2] [A1; A2]. The matrices are parts of one
    buffer for each dtype, filled by a few kernels.
    """
    own = [branch.rank for branch in branches]
    ranks: dict[str, int] = {}
    for branch, rank in zip(branches, own):
        size = branch.slot.rank_size
        ranks[size] = max(ranks.get(size, 0), rank)
    wide = [ranks[branch.slot.rank_size] for branch in branches]
    shapes = [shape for branch, rank in zip(branches, wide) for shape in _shapes(branch.slot, rank)]
    dtypes = [branch.slot.dtype for branch in branches for _ in range(2)]
    packed = _buffers(shapes, dtypes, device, zeroed=own != wide)
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    factors: list[float] = []
    for branch, down, up, rank in zip(branches, packed[0::2], packed[1::2], wide):
        sources += [tensor for part in branch.parts for tensor in (part.down, part.up)]
        factors += [factor for part in branch.parts for factor in (1.0, part.scaling)]
        targets += _pieces(branch, down, up, rank)
    scaled = [i for i, factor in enumerate(factors) if factor != 1.0]
    if scaled:
        products = torch._foreach_mul([sources[i] for i in scaled], [factors[i] for i in scaled])
        for i, product in zip(scaled, products):
            sources[i] = product
    if targets:
        torch._foreach_copy_(targets, sources)
    return packed


@torch.no_grad()
def unpack_gradients(
    branches: Sequence[Branch], gradients: Sequence[torch.Tensor | None]
) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Gradients of the masters, float32, for every part of every branch, from those of what `pack` gave.

    Args:
        gradients: in the order of `pack`; None where the output does not depend on the matrix.
    """
    factors: list[float] = []
    pieces: list[torch.Tensor | None] = []
    for branch, down, up in zip(branches, gradients[0::2], gradients[1::2]):
        pieces += _pieces(branch, down, up, _rank(down, up))
        factors += [factor for part in branch.parts for factor in (1.0, part.scaling)]
    present = [p for p in pieces if p is not None]
    if present:
        masters = _buffers([p.shape for p in present], [torch.float32] * len(present), present[0].device, zeroed=False)
        torch._foreach_copy_(masters, present)
        wanted = [f for f, p in zip(factors, pieces) if p is not None]
        scaled = [(m, f) for m, f in zip(masters, wanted) if f != 1.0]
        if scaled:
            torch._foreach_mul_([m for m, _ in scaled], [f for _, f in scaled])
        waiting = iter(masters)
        pieces = [None if p is None else next(waiting) for p in pieces]
    return list(zip(pieces[0::2], pieces[1::2]))


_Piece = TypeVar("_Piece", torch.Tensor, torch.Tensor | None)


def _pieces(branch: Branch, down: _Piece, up: _Piece, rank: int) -> list[_Piece]:
    """The parts' own rows of A and columns of B: [A of the first, B of the first, A of the second, ...]. A slice takes a
    microsecond, and a step of SDXL has a thousand of these; most are whole.
    """
    if len(branch.parts) == 1 and branch.rank == rank:
        return [down, up]
    found, start = [], 0
    for part in branch.parts:
        stop = start + part.down.shape[0]
        found += [None if down is None else down[start:stop], None if up is None else up[:, start:stop]]
        start = stop
    return found


def _rank(down: torch.Tensor | None, up: torch.Tensor | None) -> int:
    return down.shape[0] if down is not None else up.shape[1] if up is not None else 0


def _shapes(slot: Slot, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (rank, slot.in_features), (slot.out_features, rank)


def _buffers(
    shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype], device: torch.device, *, zeroed: bool
) -> list[torch.Tensor]:
    """Contiguous tensors of these shapes, each at an aligned place of its dtype's one buffer."""
    sizes, stacks, order = _layout(tuple(map(tuple, shapes)), tuple(dtypes))
    make = torch.zeros if zeroed else torch.empty
    buffers = {dtype: make(size, dtype=dtype, device=device) for dtype, size in sizes.items()}
    tensors = [t for stack in stacks for t in buffers[stack.dtype].as_strided(stack.shape, stack.strides, stack.start).unbind()]
    return [tensors[i] for i in order]


class _Stack(NamedTuple):
    """Tensors of one shape behind each other: a thousand views by a few calls."""

    dtype: torch.dtype
    shape: tuple[int, int, int]
    strides: tuple[int, int, int]
    start: int


@functools.lru_cache(maxsize=16)
def _layout(
    shapes: tuple[tuple[int, int], ...], dtypes: tuple[torch.dtype, ...]
) -> tuple[dict[torch.dtype, int], list[_Stack], list[int]]:
    """Elements of each dtype's buffer; its stacks; which of their tensors each shape gets. Every step asks for the same."""
    kinds: dict[tuple[torch.dtype, tuple[int, int]], list[int]] = {}
    for i, kind in enumerate(zip(dtypes, shapes)):
        kinds.setdefault(kind, []).append(i)
    sizes = dict.fromkeys(dtypes, 0)
    stacks = []
    for (dtype, (rows, columns)), members in kinds.items():
        step = -(-rows * columns // _ALIGNMENT) * _ALIGNMENT
        stacks.append(_Stack(dtype, (len(members), rows, columns), (step, columns, 1), sizes[dtype]))
        sizes[dtype] += len(members) * step
    place = {i: at for at, i in enumerate(i for members in kinds.values() for i in members)}
    return sizes, stacks, [place[i] for i in range(len(shapes))]
