"""What this project adds to a V2 slab: one JSON string in the safetensors header, under the key "squareq_fx".

It holds the segments in execution order with a checksum for each tensor, aliases of tied tensors, per-layer
fidelity, the block paths, the input signature, the hash of the manifest's text and the hash of the header
itself; so no bit of a slab is without a check, and a data file never passes with another build's manifest.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from squareq_fx.errors import SlabError
from squareq_fx.slab import strict_json
from squareq_fx.slab.inputs import restore_inputs
from squareq_fx.slab.safetensors_header import Header, TensorEntry, pack_header

__all__ = ["EXTRAS_KEY", "Extras", "pack_slab_header", "parse_extras"]

EXTRAS_KEY = "squareq_fx"
_FORMAT = 1
_SEAL = "header_sha256"
_NO_HASH = "0" * 64
_NO_CHECKSUM = "0" * 16
_WIDEST_FLOAT = -1.23456789e-123
_KEYS = {
    "format",
    "header_sha256",
    "manifest_sha256",
    "block_paths",
    "input_signature",
    "aliases",
    "fidelity",
    "segments",
}


@dataclass(frozen=True)
class Extras:
    """The additive part of a slab.

    Attributes:
        manifest_sha256: of the manifest file's bytes.
        block_paths: module paths of the streaming blocks.
        input_signature: `describe_inputs`'s result or None.
        aliases: name -> name under which the same tensor is stored.
        fidelity: layer -> (cosine, relative L2 error) of the dequantised weight against the original.
        segments: (name, tensor keys in file order), in file order, which is execution order.
        checksums: tensor key -> xxh3_64 of its bytes, 16 hex digits.
    """

    manifest_sha256: str
    block_paths: tuple[str, ...]
    input_signature: Any
    aliases: dict[str, str]
    fidelity: dict[str, tuple[float, float]]
    segments: tuple[tuple[str, tuple[str, ...]], ...]
    checksums: dict[str, str]


def pack_slab_header(
    tensors: Iterable[TensorEntry], extras: Extras, layers: Iterable[str] = (), length: int | None = None
) -> bytes:
    """The header of a slab.

    Checksums and fidelity are known only when everything is written, the header's length before anything is.
    Called without `length` and with the names of the `layers` it makes the longest header these values can
    need; called again with that one's length it makes the real one.
    """
    widest = dict.fromkeys(layers, (_WIDEST_FLOAT, _WIDEST_FLOAT))
    document = {
        "format": _FORMAT,
        "header_sha256": _NO_HASH,
        "manifest_sha256": extras.manifest_sha256,
        "block_paths": extras.block_paths,
        "input_signature": extras.input_signature,
        "aliases": extras.aliases,
        "fidelity": {**widest, **extras.fidelity},
        "segments": [
            {"name": name, "tensors": {key: extras.checksums.get(key, _NO_CHECKSUM) for key in keys}}
            for name, keys in extras.segments
        ],
    }
    raw = pack_header(tensors, {EXTRAS_KEY: json.dumps(document, separators=(",", ":"))}, length)
    return raw.replace(_NO_HASH.encode(), hashlib.sha256(raw).hexdigest().encode(), 1)


def parse_extras(header: Header, problems: list[str]) -> Extras | None:
    """Read the additive part; faults are appended to `problems`.

    Returns:
        None for a slab without one (the original's), or if it cannot be read.
    """
    text = header.metadata.get(EXTRAS_KEY)
    if text is None:
        # One flipped bit in the key must not turn the slab into one without checksums and passthrough.
        if any(_SEAL in value for value in header.metadata.values()):
            problems.append(f"the header's metadata is damaged: its key is not {EXTRAS_KEY!r}")
        return None
    try:
        document = strict_json.loads(text, "the squareq_fx metadata")
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise SlabError(f"the squareq_fx metadata is not of format {_FORMAT}; update squareq_fx")
        _check_types(document)
        if document["input_signature"] is not None:
            restore_inputs(document["input_signature"])
    except SlabError as error:
        problems.append(str(error))
        return None
    claimed = document["header_sha256"].encode()
    if hashlib.sha256(header.raw.replace(claimed, _NO_HASH.encode(), 1)).hexdigest().encode() != claimed:
        problems.append("the header's checksum does not match: it was changed after it was written")
    segments = tuple((s["name"], tuple(s["tensors"])) for s in document["segments"])
    return Extras(
        manifest_sha256=document["manifest_sha256"],
        block_paths=tuple(document["block_paths"]),
        input_signature=document["input_signature"],
        aliases=document["aliases"],
        fidelity={name: (float(c), float(r)) for name, (c, r) in document["fidelity"].items()},
        segments=segments,
        checksums={key: value for s in document["segments"] for key, value in s["tensors"].items()},
    )


def _check_types(document: dict[str, Any]) -> None:
    faults = [f"the key {key} is missing" for key in sorted(_KEYS - set(document))]
    faults += [f"unknown key {key!a}" for key in sorted(set(document) - _KEYS)]
    if not faults:
        tests = {
            "format": strict_json.plain_int(document["format"]),
            "header_sha256": _is_hex(document["header_sha256"], 64),
            "manifest_sha256": _is_hex(document["manifest_sha256"], 64),
            "block_paths": _is_list_of(document["block_paths"], str),
            "aliases": _is_map_of(document["aliases"], str),
            "fidelity": _is_map_of(document["fidelity"], list)
            and all(len(v) == 2 and all(_is_finite(x) for x in v) for v in document["fidelity"].values()),
            "segments": _is_list_of(document["segments"], dict)
            and all(
                set(s) == {"name", "tensors"}
                and isinstance(s["name"], str)
                and _is_map_of(s["tensors"], str)
                and all(_is_hex(v, 16) for v in s["tensors"].values())
                for s in document["segments"]
            ),
        }
        faults = [f"{key} has the wrong type" for key, good in tests.items() if not good]
    if faults:
        raise SlabError("the squareq_fx metadata is wrong: " + "; ".join(faults))


def _is_hex(value: object, digits: int) -> bool:
    return isinstance(value, str) and re.fullmatch(rf"[0-9a-f]{{{digits}}}", value) is not None


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(v, kind) for v in value)


def _is_map_of(value: object, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(v, kind) for v in value.values())


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
