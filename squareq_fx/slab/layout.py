"""Where the tensors of one streamed segment lie. The only definition; the runtime and the builder both use
it.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["ALIGNMENT", "segment_layout"]

ALIGNMENT = 256
"""The largest alignment a tensor gets; a segment that starts at a multiple of it has every tensor aligned."""


def segment_layout(entries: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Order the tensors of a segment and give each its byte offset from the segment's start.

    Sorted by falling alignment (the largest power of two that divides the size, at most 256; an empty tensor
    last), then by name. Every tensor therefore lies at a multiple of its alignment, and so of its element
    size, with no padding at all.

    Args:
        entries: (name, nbytes) pairs in any order; names are unique.

    Returns:
        (name, offset) in file order; the segment's size is the sum of the sizes.
    """
    placed, end = [], 0
    for name, nbytes in sorted(entries, key=lambda e: (-_alignment(e[1]), e[0])):
        placed.append((name, end))
        end += nbytes
    return placed


def _alignment(nbytes: int) -> int:
    return min(nbytes & -nbytes, ALIGNMENT)
