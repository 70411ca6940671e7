"""The header of a safetensors file: read strictly, and written with the data section on a page boundary.

Source: the safetensors format (8 bytes little-endian header length, JSON, then the tensors without holes).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from squareq_fx.errors import SlabError
from squareq_fx.slab import strict_json

__all__ = ["DTYPE_NAMES", "Header", "TensorEntry", "pack_header", "read_header"]

_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in _DTYPES.items()}
"""The safetensors name of every dtype that can be stored."""

_LONGEST_HEADER = 100_000_000  # the format's own limit
_LARGEST = 2**62
_MOST_DIMS = 64
_PAGE = 4096
_METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        name: its key in the file.
        dtype, shape: as stored.
        offset, nbytes: its byte range relative to the start of the data section.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A parsed header.

    Attributes:
        tensors: by name, in file order; together they fill the data section without holes.
        metadata: the `__metadata__` strings, empty if there are none.
        raw: the JSON as it stands in the file, padding included.
        data_start: file offset of the data section.
        data_nbytes: its size.
    """

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    raw: bytes
    data_start: int
    data_nbytes: int


def read_header(fd: int, name: str) -> Header:
    """Read and check the header of the open file `fd`.

    Raises:
        SlabError: too short, a length that does not fit, not strict JSON, or any entry wrong (unknown dtype,
            negative or fractional sizes, a byte range that does not fit the shape, overlaps, holes, trailing
            bytes); all of the entries' faults are listed.
    """
    size = os.fstat(fd).st_size
    prefix = os.pread(fd, 8, 0)
    if len(prefix) < 8:
        raise SlabError(f"{name} is not a safetensors file: it has only {size} bytes")
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
        raise SlabError(f"{name} is truncated or not a safetensors file: header of {length} bytes, file of {size}")
    raw = os.pread(fd, length, 8)
    if len(raw) != length or raw[:1] != b"{":
        raise SlabError(f"{name} is truncated or not a safetensors file: its header does not start with '{{'")
    document = strict_json.loads(raw, f"the header of {name}")
    problems: list[str] = []
    metadata = _parse_metadata(document.pop(_METADATA, {}), problems)
    entries = [_parse_entry(key, value, problems) for key, value in document.items()]
    tensors = sorted((e for e in entries if e is not None), key=lambda e: (e.offset, e.offset + e.nbytes))
    if not problems:
        _check_contiguous(tensors, size - 8 - length, problems)
    if problems:
        raise SlabError(f"the header of {name} is wrong", problems)
    return Header({e.name: e for e in tensors}, metadata, raw, 8 + length, size - 8 - length)


def pack_header(tensors: Iterable[TensorEntry], metadata: Mapping[str, str], length: int | None = None) -> bytes:
    """The JSON of a header, padded with spaces so that the data section starts on a 4096 byte boundary.

    Args:
        length: pad to this length instead (reserved earlier); the text must fit.
    """
    document: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    for entry in tensors:
        document[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.offset, entry.offset + entry.nbytes],
        }
    raw = json.dumps(document, separators=(",", ":")).encode("ascii")
    if length is None:
        length = -(-(8 + len(raw)) // _PAGE) * _PAGE - 8
    if len(raw) > min(length, _LONGEST_HEADER):
        raise SlabError(f"the header needs {len(raw)} bytes, more than the {min(length, _LONGEST_HEADER)} there are")
    return raw.ljust(length, b" ")


def _parse_metadata(value: object, problems: list[str]) -> dict[str, str]:
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return value
    problems.append("__metadata__ must map strings to strings")
    return {}


def _parse_entry(name: str, value: object, problems: list[str]) -> TensorEntry | None:
    shown = ascii(name)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        problems.append(f"{shown}: an entry has exactly dtype, shape and data_offsets")
        return None
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        problems.append(f"{shown}: unknown dtype {ascii(dtype)[:40]}")
        return None
    if not _sizes(shape) or len(shape) > _MOST_DIMS or math.prod(d or 1 for d in shape) > _LARGEST:
        problems.append(f"{shown}: shape must be a list of sizes, got {ascii(shape)[:80]}")
        return None
    if not _sizes(offsets) or len(offsets) != 2:
        problems.append(f"{shown}: data_offsets must be two byte offsets, got {ascii(offsets)[:80]}")
        return None
    begin, end = offsets
    nbytes = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != nbytes:
        problems.append(f"{shown}: {dtype} {shape} takes {nbytes} bytes but data_offsets span {end - begin}")
        return None
    return TensorEntry(name, _DTYPES[dtype], tuple(shape), begin, nbytes)


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(strict_json.plain_int(v) and 0 <= v <= _LARGEST for v in value)


def _check_contiguous(tensors: list[TensorEntry], data_nbytes: int, problems: list[str]) -> None:
    end = 0
    for entry in tensors:
        if entry.offset != end:
            kind = "overlaps the tensor before it" if entry.offset < end else "leaves a hole before it"
            problems.append(f"{entry.name!a}: starts at {entry.offset} instead of {end}, so it {kind}")
        end = max(end, entry.offset + entry.nbytes)
    if end != data_nbytes:
        problems.append(f"the tensors take {end} bytes but the file holds {data_nbytes}: truncated or overlong")
