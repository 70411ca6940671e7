"""Where the tensors of one streamed segment lie. The only definition; the runtime and the builder both use
it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["ALIGNMENT", "is_aligned_layout", "segment_layout"]

ALIGNMENT = 256
"""The largest alignment a tensor gets; a segment that starts at a multiple of it has every tensor aligned."""

_ROLES = {"q": 0, "query": 0, "wq": 0, "k": 1, "key": 1, "wk": 1, "v": 2, "value": 2, "wv": 2}


def segment_layout(entries: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Order the tensors of a segment and give each its byte offset from the segment's start.

    Sorted by falling alignment (the largest power of two that divides the size, at most 256; an empty tensor
    last). Every tensor therefore lies at a multiple of its alignment, and so of its element size, with no
    padding at all.

    Within one alignment, what one product could read lies side by side: sorted by the last part of the name
    (`bias`, `qweight`, `scale`, `weight`, `zero_point`), then the module that holds the layer, then the
    layer's height, then its name. Names that differ only in q, k and v are one after the other in this order,
    for in cross-attention k and v have an input of their own. So `attn.to_q`, `attn.to_k` and `attn.to_v` are
    neighbours, in their qweights as in their scales, zero points and biases.

    Args:
        entries: (name, nbytes) pairs in any order; names are unique.

    Returns:
        (name, offset) in file order; the segment's size is the sum of the sizes.
    """
    entries = list(entries)
    sizes = dict(entries)
    placed, end = [], 0
    for name, nbytes in sorted(entries, key=lambda entry: _place(entry[0], entry[1], sizes)):
        placed.append((name, end))
        end += nbytes
    return placed


def is_aligned_layout(placed: Sequence[tuple[int, int]]) -> bool:
    """Whether tensors at (offset, nbytes), in file order, fill a segment without a gap, each at its alignment.

    True of `segment_layout`, and of the order that earlier builds wrote: by alignment, then by name.
    """
    end = 0
    for offset, nbytes in placed:
        if offset != end or (nbytes and offset % _alignment(nbytes)):
            return False
        end += nbytes
    return True


def _place(name: str, nbytes: int, sizes: dict[str, int]) -> tuple[object, ...]:
    layer, _, kind = name.rpartition(".")
    parent, _, own = layer.rpartition(".")
    height = sizes.get(f"{layer}.scale", 0)
    words = own.split("_")
    role = next((_ROLES[word] for word in words if word in _ROLES), 0)
    stem = ["" if word in _ROLES else word for word in words]
    return -_alignment(nbytes), kind, parent, height, stem, role, layer


def _alignment(nbytes: int) -> int:
    return min(nbytes & -nbytes, ALIGNMENT)
