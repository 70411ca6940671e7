"""What a build has finished so far, so that one that was killed goes on where it was."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from squareq_fx.errors import SlabError

__all__ = ["Done", "Journal"]


@dataclass(frozen=True)
class Done:
    """The outcome of one item of work: checksum of each tensor written, and the fidelity of a quantised
    layer.
    """

    checksums: dict[str, str]
    fidelity: tuple[float, float] | None = None


class Journal:
    """A text file of one JSON line an item, behind a line with the fingerprint of source and options.

    It is locked while open, so two builds of one slab cannot meet. Lines of another fingerprint, and a line
    torn by a crash, are dropped. A line is a claim, not a proof: the caller compares the data's checksums
    before believing it.

    Attributes:
        done: label -> what an earlier, interrupted build did.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path = path
        self._fd = _open_locked(path)
        self.done: dict[str, Done] = {}
        try:
            self._load(fingerprint)
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, label: str, done: Done) -> None:
        """Record a finished item."""
        self._write_line({"item": label, "checksums": done.checksums, "fidelity": done.fidelity})

    def remove(self) -> None:
        """Delete the file: the slab is complete, or can never be."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._fd)

    def _load(self, fingerprint: str) -> None:
        with open(os.dup(self._fd), "rb") as file:
            lines = file.read().splitlines(keepends=True)
        good = 0
        if lines and _parse(lines[0]) == {"fingerprint": fingerprint}:
            good = len(lines[0])
            for line in lines[1:]:
                entry = _parse_done(line)
                if entry is None:
                    break
                self.done[entry[0]] = entry[1]
                good += len(line)
        os.ftruncate(self._fd, good)
        os.lseek(self._fd, good, os.SEEK_SET)
        if not good:
            self._write_line({"fingerprint": fingerprint})

    def _write_line(self, value: object) -> None:
        line = json.dumps(value).encode() + b"\n"
        if os.write(self._fd, line) != len(line):
            raise SlabError(f"cannot write {self._path}: is the disk full?")


def _open_locked(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(fd)):
                return fd
        except BlockingIOError as error:
            os.close(fd)
            raise SlabError(f"another build is writing this slab: {path} is locked") from error
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # the build that held the lock finished and deleted the file in between


def _parse(line: bytes) -> object:
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _parse_done(line: bytes) -> tuple[str, Done] | None:
    value = _parse(line)
    if not isinstance(value, dict) or set(value) != {"item", "checksums", "fidelity"}:
        return None
    item, checksums, fidelity = value["item"], value["checksums"], value["fidelity"]
    if not isinstance(item, str) or not isinstance(checksums, dict) or not isinstance(fidelity, list | None):
        return None
    return item, Done(checksums, None if fidelity is None else (fidelity[0], fidelity[1]))
