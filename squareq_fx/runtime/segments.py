"""What a streamed segment is made of: byte ranges of the slab, and tensors that are in memory already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from squareq_fx.errors import RuntimeStateError

__all__ = ["ALIGNMENT", "Piece", "Segment", "packed_offsets"]

ALIGNMENT = 256
"""Segments start at multiples of this many bytes, in the arena and wherever several share one buffer."""


@dataclass(frozen=True, eq=False)
class Piece:
    """`nbytes` bytes of a segment, starting `flat_offset` bytes into it.

    Args:
        flat_offset: where the bytes go, relative to the start of the segment.
        nbytes: how many.
        source: an offset into the store's `data`, or a CPU tensor of any dtype and shape with exactly that
            many bytes. A contiguous tensor is not copied: it is read when the segment is packed or copied.

    Raises:
        RuntimeStateError: negative numbers, or a tensor of another size or device.
    """

    flat_offset: int
    nbytes: int
    source: int | torch.Tensor

    def __post_init__(self) -> None:
        if self.flat_offset < 0 or self.nbytes < 0:
            raise RuntimeStateError(
                f"a piece at {self.flat_offset} of {self.nbytes} bytes: neither may be negative"
            )
        if isinstance(self.source, torch.Tensor):
            object.__setattr__(self, "source", _as_bytes(self.source, self.nbytes))
        elif self.source < 0:
            raise RuntimeStateError(
                f"a piece at {self.flat_offset} reads from {self.source}: offsets start at 0"
            )


@dataclass(frozen=True, eq=False)
class Segment:
    """One flat byte buffer that is loaded and evicted as a unit.

    Args:
        name: what `load`, `evict` and `prefetch` call it.
        nbytes: its length.
        pieces: where the bytes are; in any order. Kept sorted, with neighbours in one source range merged.

    Raises:
        RuntimeStateError: the pieces do not cover every byte exactly once. Nothing is ever filled with zeros.
    """

    name: str
    nbytes: int
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        pieces = sorted((p for p in self.pieces if p.nbytes), key=lambda p: p.flat_offset)
        end = 0
        for piece in pieces:
            if piece.flat_offset != end:
                self._refuse(
                    min(end, piece.flat_offset), max(end, piece.flat_offset), piece.flat_offset > end
                )
            end = piece.flat_offset + piece.nbytes
        if end != self.nbytes:
            self._refuse(min(end, self.nbytes), max(end, self.nbytes), end < self.nbytes)
        object.__setattr__(self, "pieces", _merged(pieces))

    def _refuse(self, start: int, end: int, is_gap: bool) -> None:
        fault = "have no source" if is_gap else "lie outside it or have two sources"
        raise RuntimeStateError(
            f"segment {self.name!r} of {self.nbytes} bytes: bytes {start} to {end} {fault}; every byte "
            "needs exactly one piece, a missing parameter is never filled in"
        )

    @property
    def data_offset(self) -> int | None:
        """Where the whole segment lies in the store's `data`, or None if it has to be assembled."""
        if len(self.pieces) == 1 and isinstance(self.pieces[0].source, int):
            return self.pieces[0].source
        return None


def packed_offsets(segments: Iterable[Segment]) -> tuple[dict[str, int], int]:
    """Offsets that put segments one after another, aligned, and the size of the buffer for all of them."""
    offsets: dict[str, int] = {}
    end = 0
    for segment in segments:
        offsets[segment.name] = end
        end += -(-segment.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, end


def _as_bytes(tensor: torch.Tensor, nbytes: int) -> torch.Tensor:
    if tensor.device.type != "cpu":
        raise RuntimeStateError(f"a piece's tensor is on {tensor.device}; the store keeps bytes on the CPU")
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.numel() * flat.element_size() != nbytes:
        raise RuntimeStateError(
            f"a piece of {nbytes} bytes was given a tensor of {flat.numel() * flat.element_size()} bytes"
        )
    return flat.view(torch.uint8)


def _merged(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if (
            last is not None
            and isinstance(last.source, int)
            and isinstance(piece.source, int)
            and last.source + last.nbytes == piece.source
        ):
            merged[-1] = Piece(last.flat_offset, last.nbytes + piece.nbytes, last.source)
        else:
            merged.append(piece)
    return tuple(merged)
