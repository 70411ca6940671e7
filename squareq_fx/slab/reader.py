"""An opened slab: validated once, mapped privately, its data checked on first use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
import xxhash

from squareq_fx.errors import SlabError
from squareq_fx.slab.checksums import checksum
from squareq_fx.slab.extras import Extras
from squareq_fx.slab.manifest import LayerEntry, Manifest
from squareq_fx.slab.safetensors_header import TensorEntry

__all__ = ["SegmentEntry", "Slab"]


@dataclass(frozen=True)
class SegmentEntry:
    """One contiguous byte range of the data section: a block, or what runs between two blocks.

    Attributes:
        name: the block's module path, or "glue.<first module>".
        tensors: keys in file order.
        offset, nbytes: the range, relative to the data section.
        sha: xxh3_128 over the tensors' checksums; changes if any byte of the segment does.
    """

    name: str
    tensors: tuple[str, ...]
    offset: int
    nbytes: int
    sha: str


class Slab:
    """A validated slab. Made by `open_slab` and `build_slab`; also a context manager.

    Attributes:
        path: the .safetensors file.
        manifest: the V2 manifest; `signature` is its model_signature.
        layers: canonical name -> LayerEntry, sorted by name.
        tensors: key -> TensorEntry, in file order.
        passthrough: the subset of `tensors` that belongs to no quantised layer; empty for the original's
            slabs.
        segments: in file order, which is execution order; empty for the original's slabs.
        aliases: state-dict name -> the name under which that same tensor is stored (tied weights, shared
            modules).
        fidelity: layer -> (cosine, relative L2 error) of its dequantised weight.
        block_paths: module paths of the streaming blocks.
        input_signature: see `describe_inputs`; None if unknown.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        tensors: dict[str, TensorEntry],
        extras: Extras | None,
        mapping: torch.Tensor,
        data_start: int,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.layers: Mapping[str, LayerEntry] = MappingProxyType({e.canonical_name: e for e in manifest.layers})
        self.tensors: Mapping[str, TensorEntry] = MappingProxyType(tensors)
        quantised = {key for layer in manifest.layers for key in layer.keys}
        self.passthrough: Mapping[str, TensorEntry] = MappingProxyType(
            {key: e for key, e in tensors.items() if extras and key not in quantised}
        )
        self.block_paths: tuple[str, ...] = extras.block_paths if extras else ()
        self.aliases: Mapping[str, str] = MappingProxyType(extras.aliases if extras else {})
        self.fidelity: Mapping[str, tuple[float, float]] = MappingProxyType(extras.fidelity if extras else {})
        self.input_signature: Any = extras.input_signature if extras else None
        self._checksums = extras.checksums if extras else {}
        self.segments: tuple[SegmentEntry, ...] = tuple(
            self._segment(name, keys) for name, keys in (extras.segments if extras else ())
        )
        self._segment_of = {key: s.tensors for s in self.segments for key in s.tensors}
        self._data: torch.Tensor | None = mapping[data_start:]
        self._verified: set[str] = set()

    @property
    def signature(self) -> str:
        """The signature of the model this slab was built from."""
        return self.manifest.model_signature

    @property
    def data(self) -> torch.Tensor:
        """uint8 CPU tensor [data bytes]: a private mapping of the data section, page aligned for slabs built
        here.

        Writing to it changes this process's copy, never the file.

        Raises:
            SlabError: the slab is closed.
        """
        if self._data is None:
            raise SlabError(f"slab {self.path} is closed; open it again with open_slab")
        return self._data

    def tensor(self, key: str, verify: bool = True) -> torch.Tensor:
        """One tensor in its stored dtype and shape, as a view of `data`.

        It is a copy only where the file puts it at an address its dtype cannot be read from. With `verify`
        the checksums of the whole segment are compared on first use.

        Raises:
            SlabError: no such key, a checksum that does not match, or a closed slab.
        """
        entry = self.tensors.get(key)
        if entry is None:
            raise SlabError(f"slab {self.path} has no tensor {key!r}" + self._alias_hint(key))
        if verify:
            self.verify_segment(self._segment_of.get(key, ()))
        data = self.data[entry.offset : entry.offset + entry.nbytes]
        if data.storage_offset() % entry.dtype.itemsize:
            data = data.clone()
        return data.view(entry.dtype).reshape(entry.shape)

    def verify_segment(self, keys: Iterable[str]) -> None:
        """Compare the checksums of these tensors, except those already found good. The original's slabs have none.

        Raises:
            SlabError: listing every one that does not match.
        """
        if not self._checksums:
            return
        self._refuse([key for key in keys if key not in self._verified and not self._matches(key)])

    def _refuse(self, bad: Sequence[str]) -> None:
        if bad:
            raise SlabError(
                f"slab {self.path} is corrupt: copy or build it again",
                (f"the data of {key!a} does not match its checksum" for key in bad),
            )

    def verify(self) -> None:
        """Read everything again and compare all checksums. The original's slabs have none, so they always
        pass.

        Raises:
            SlabError: listing every tensor that does not match.
        """
        self._verified.clear()
        self._refuse([key for key in self._checksums if not self._matches(key)])

    def close(self) -> None:
        """Forget the mapping; its memory goes back with the last view of it. Closing twice is harmless."""
        self._data = None

    def __enter__(self) -> Slab:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        nbytes = sum(e.nbytes for e in self.tensors.values())
        return (
            f"Slab({str(self.path)!r}, {len(self.layers)} layers, {len(self.segments)} segments, "
            f"{len(self.passthrough)} passthrough tensors, {nbytes} bytes)"
        )

    def _matches(self, key: str) -> bool:
        entry = self.tensors[key]
        if checksum(self.data[entry.offset : entry.offset + entry.nbytes]) == self._checksums[key]:
            self._verified.add(key)
            return True
        return False

    def _segment(self, name: str, keys: tuple[str, ...]) -> SegmentEntry:
        digest = xxhash.xxh3_128("".join(self._checksums[key] for key in keys).encode()).hexdigest()
        start = self.tensors[keys[0]].offset
        return SegmentEntry(name, keys, start, sum(self.tensors[key].nbytes for key in keys), digest)

    def _alias_hint(self, key: str) -> str:
        if key in self.aliases:
            return f"; it is stored as {self.aliases[key]!r}"
        layer = key.rpartition(".")[0]
        return f"; {layer!r} is quantised, ask for {layer}.qweight" if layer in self.layers else ""
