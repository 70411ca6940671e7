"""Open a slab: everything that can be wrong with it is looked for and listed at once, before any of it is
used.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import sys

import torch

from squareq_fx.errors import SlabError
from squareq_fx.slab.checksums import checksum
from squareq_fx.slab.extras import Extras, parse_extras
from squareq_fx.slab.layout import is_aligned_layout
from squareq_fx.slab.manifest import Manifest, check_tensors, parse_manifest
from squareq_fx.slab.paths import SlabPaths
from squareq_fx.slab.reader import Slab
from squareq_fx.slab.safetensors_header import Header, TensorEntry, read_header

__all__ = ["open_slab"]

_LONGEST_MANIFEST = 100_000_000
# Without it Linux refuses a private mapping larger than the memory there is; the mmap module knows the name
# from 3.13 on.
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0


def open_slab(path: str | os.PathLike[str], *, expected_signature: str | None = None) -> Slab:
    """Open a SquareQ V2 slab, this project's or the original's.

    Checked here: both files' syntax, manifest against tensors (presence, dtypes, shapes, byte totals), ABI,
    bits, the values of scales, zero points and biases, and for slabs with checksums the header, the
    manifest's hash and the segments' layout. The big data's checksums wait for the first use of a segment.

    Args:
        path: without suffix, or either file.
        expected_signature: `model_signature` of the model it will be used with; another one is refused.

    Raises:
        SlabError: listing every fault.
    """
    paths = SlabPaths.of(path)
    absent = [str(p) for p in (paths.data, paths.manifest) if not p.is_file()]
    if absent:
        raise SlabError(f"no slab at {paths.stem}", [f"{p} does not exist" for p in absent])
    problems: list[str] = []
    try:
        raw_manifest = _read_manifest(paths)
        manifest = parse_manifest(raw_manifest, f"the manifest {paths.manifest.name}", problems)
        header, mapping = _map_file(paths, problems)
    except OSError as error:
        raise SlabError(f"cannot read slab {paths.stem}: {error}") from error
    extras = parse_extras(header, problems) if header else None
    if extras and extras.manifest_sha256 != hashlib.sha256(raw_manifest).hexdigest():
        problems.append("the manifest is not the one the data file was written with; they are of different builds")
    if manifest and expected_signature is not None and manifest.model_signature != expected_signature:
        problems.append(f"built for a model of signature {manifest.model_signature}, this one has {expected_signature}")
    if manifest and header:
        check_tensors(manifest, header.tensors, problems)
        _check_values(manifest, header, mapping, extras.checksums if extras else {}, problems)
        if extras:
            _check_segments(extras, header.tensors, problems)
            _check_names(extras, manifest, header.tensors, problems)
    if problems or not (manifest and header):
        raise SlabError(f"slab {paths.stem} cannot be used", problems)
    return Slab(paths.data, manifest, header.tensors, extras, mapping, header.data_start)


def _read_manifest(paths: SlabPaths) -> bytes:
    with open(paths.manifest, "rb") as file:
        raw = file.read(_LONGEST_MANIFEST + 1)
    if len(raw) > _LONGEST_MANIFEST:
        raise SlabError(f"the manifest {paths.manifest} is larger than {_LONGEST_MANIFEST} bytes")
    return raw


def _map_file(paths: SlabPaths, problems: list[str]) -> tuple[Header | None, torch.Tensor]:
    fd = os.open(paths.data, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header = read_header(fd, paths.data.name)
        size = header.data_start + header.data_nbytes
        private = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return header, torch.frombuffer(private, dtype=torch.uint8)
    except SlabError as error:
        problems += [str(error)] if not error.problems else [f"header: {p}" for p in error.problems]
    except ValueError as error:
        problems.append(f"{paths.data.name} changed while it was opened: {error}")
    finally:
        os.close(fd)
    return None, torch.empty(0, dtype=torch.uint8)


def _check_values(
    manifest: Manifest, header: Header, mapping: torch.Tensor, checksums: dict[str, str], problems: list[str]
) -> None:
    data = mapping[header.data_start :]
    for layer in manifest.layers:
        for key in layer.keys[1:]:
            entry = header.tensors.get(key)
            if entry is None or entry.dtype != torch.float32:
                continue
            raw = data[entry.offset : entry.offset + entry.nbytes].clone()
            if key in checksums and checksum(raw) != checksums[key]:
                problems.append(f"the data of {key!a} does not match its checksum")
            values = raw.view(torch.float32)
            nan, infinite = int(values.isnan().sum()), int(values.isinf().sum())
            if nan or infinite:
                problems.append(f"{key!a} holds {nan} NaN and {infinite} Inf")
            elif key == layer.scale_key and bool((values <= 0).any()):
                zeros, negative = int((values == 0).sum()), int((values < 0).sum())
                problems.append(f"{key!a} holds {zeros} zero and {negative} negative scales")


def _check_segments(extras: Extras, tensors: dict[str, TensorEntry], problems: list[str]) -> None:
    listed = [key for _, keys in extras.segments for key in keys]
    if listed != list(tensors):
        problems.append("the segments do not list the tensors in file order, each once")
        return
    names = [name for name, _ in extras.segments]
    if len(set(names)) != len(names) or not all(keys for _, keys in extras.segments):
        problems.append("segments must have different names and at least one tensor each")
        return
    for name, keys in extras.segments:
        start = tensors[keys[0]].offset
        if not is_aligned_layout([(tensors[key].offset - start, tensors[key].nbytes) for key in keys]):
            problems.append(f"segment {name!a} has a gap, or a tensor that is not aligned; build the slab again")


def _check_names(extras: Extras, manifest: Manifest, tensors: dict[str, TensorEntry], problems: list[str]) -> None:
    layers = {layer.canonical_name for layer in manifest.layers}
    if set(extras.fidelity) != layers:
        problems.append("the fidelity figures are not those of the manifest's layers")
    for name, target in extras.aliases.items():
        if target not in tensors and target.rpartition(".")[0] not in layers:
            problems.append(f"alias {name!a} points to {target!a}, which is not in the slab")
