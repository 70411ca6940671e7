"""Where a build reads its tensors from: safetensors files, read piece by piece, or a module in memory."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import xxhash
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from squareq_fx.errors import SlabError
from squareq_fx.slab.checksums import raw_bytes
from squareq_fx.slab.safetensors_header import TensorEntry, read_header

__all__ = ["Checkpoint", "MemoryTensors", "Overlay", "SourceTensor", "TensorSource"]

_PIECE = 1 << 20  # elements


@dataclass(frozen=True)
class SourceTensor:
    """dtype and shape of a tensor as it is stored."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorSource(Protocol):
    """Named tensors that can be read in pieces; `specs` has every one there is."""

    specs: dict[str, SourceTensor]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of the row-major order, as a 1-D CPU tensor valid until this thread's next
        call.
        """

    def fingerprint(self) -> str:
        """Changes if any of the data may have changed."""

    def close(self) -> None:
        """Give back files."""


class MemoryTensors:
    """Tensors that are in memory already, on any device; each is moved to the CPU in pieces.

    One that is not initialised yet has no dtype or shape and is left out. Threads may read at the same time.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = {
            name: tensor.detach() for name, tensor in tensors.items() if not isinstance(tensor, UninitializedTensorMixin)
        }
        self._local = threading.local()
        self.specs = {name: SourceTensor(t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        local = self._local  # a tensor that is not contiguous is copied, once for all of its pieces
        if getattr(local, "name", None) != name:
            local.name, local.flat = name, self._tensors[name].reshape(-1)
        return local.flat[start:stop].cpu().resolve_conj()

    def fingerprint(self) -> str:
        digest = xxhash.xxh3_128()
        for name in sorted(self._tensors):
            spec = self._tensors[name]
            digest.update(f"{name}:{spec.dtype}:{tuple(spec.shape)}".encode())
            for start in range(0, spec.numel(), _PIECE):
                digest.update(raw_bytes(self.read(name, start, min(start + _PIECE, spec.numel()))))
        return digest.hexdigest()

    def close(self) -> None:
        self._local = threading.local()


class Checkpoint:
    """The tensors of one or several safetensors files.

    They are read with plain reads into one reused buffer a thread: pages of a mapping would count as this
    process's memory.
    """

    def __init__(self, files: list[Path]) -> None:
        self._fds: dict[Path, int] = {}
        self._entries: dict[str, tuple[int, int, TensorEntry]] = {}
        self._hash = hashlib.sha256()
        self._local = threading.local()
        problems: list[str] = []
        try:
            for file in files:
                try:
                    self._open(file, problems)
                except SlabError as error:
                    problems += error.problems or [str(error)]
                except OSError as error:
                    problems.append(f"cannot read {file}: {error.strerror}")
            if problems:
                raise SlabError(f"the checkpoint in {files[0].parent} cannot be read", problems)
        except BaseException:
            self.close()
            raise
        self.specs = {name: SourceTensor(e.dtype, e.shape) for name, (_, _, e) in self._entries.items()}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        fd, data_start, entry = self._entries[name]
        size = entry.dtype.itemsize
        nbytes = (stop - start) * size
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._local.buffer = torch.empty(nbytes, dtype=torch.uint8)
        view = raw_bytes(buffer)[:nbytes]
        position = data_start + entry.offset + start * size
        done = 0
        while done < nbytes:
            count = os.preadv(fd, [view[done:]], position + done)
            if count == 0:
                raise SlabError(f"the checkpoint file of {name} was truncated while it was read")
            done += count
        return buffer[:nbytes].view(entry.dtype)

    def fingerprint(self) -> str:
        return self._hash.hexdigest()

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _open(self, file: Path, problems: list[str]) -> None:
        fd = self._fds[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        header = read_header(fd, file.name)
        stat = os.fstat(fd)
        self._hash.update(f"{file.name}:{stat.st_size}:{stat.st_mtime_ns}:".encode() + header.raw)
        for name, entry in header.tensors.items():
            if name in self._entries:
                problems.append(f"tensor {name} is in two files, one of them {file.name}")
            self._entries[name] = fd, header.data_start, entry


class Overlay:
    """A checkpoint, and behind it the tensors a checkpoint does not store (non-persistent buffers)."""

    def __init__(self, front: Checkpoint, back: MemoryTensors) -> None:
        self._front, self._back = front, back
        self.specs = {**back.specs, **front.specs}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        return (self._front if name in self._front.specs else self._back).read(name, start, stop)

    def fingerprint(self) -> str:
        return f"{self._front.fingerprint()}+{self._back.fingerprint()}"

    def close(self) -> None:
        self._front.close()
        self._back.close()
