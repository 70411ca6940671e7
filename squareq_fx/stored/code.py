"""What TorchInductor made of one function, as bytes: the text of the program that runs it, and its compiled Triton kernels.

They begin with a line that names the format and the SHA-256 of what follows, and hold the key they were kept under. Unlike a
stored graph they are there to be executed: whoever can write into the folder can run code, as in Inductor's own cache
(`TORCHINDUCTOR_CACHE_DIR`), which holds the same text and the same pickles.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from squareq_fx.stored.errors import DamagedError

__all__ = ["StoredCode", "read_code", "write_code"]

_MAGIC = "squareq_fx code 1"
_LENGTH = 8


@dataclass(frozen=True)
class StoredCode:
    """One program.

    Attributes:
        source: the text of the module whose `call` runs the program; it finds `extern_kernels` in its namespace.
        ours: of torch's functions that the text calls as `extern_kernels.NAME`, those that are `torch.NAME`.
        theirs: the names of the others.
        aligned: positions of inputs that are copied first where their address is no multiple of 16.
        fixed, condition: what the program assumes of its sizes (`Compilation`).
        kernels: its compiled Triton kernels, as Inductor pickles them (`TritonBundle`); empty where there are none.
    """

    source: str
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    aligned: tuple[int, ...]
    fixed: tuple[int, ...]
    condition: str
    kernels: bytes


def write_code(code: StoredCode, key: str) -> bytes:
    """The program as bytes."""
    told = {k: v for k, v in asdict(code).items() if k != "kernels"} | {"key": key}
    text = json.dumps(told).encode()
    body = len(text).to_bytes(_LENGTH, "little") + text + code.kernels
    return f"{_MAGIC} {hashlib.sha256(body).hexdigest()}\n".encode() + body


def read_code(data: bytes, key: str) -> StoredCode:
    """What `write_code` wrote under this key.

    Raises:
        DamagedError: it is not, byte by byte.
    """
    head, _, body = data.partition(b"\n")
    if head != f"{_MAGIC} {hashlib.sha256(body).hexdigest()}".encode():
        raise DamagedError("its checksum or its format is another")
    end = _LENGTH + int.from_bytes(body[:_LENGTH], "little")
    told: dict[str, Any] = json.loads(body[_LENGTH:end])
    if told.pop("key", None) != key:
        raise DamagedError("it was kept under another key")
    if told.keys() != {f.name for f in fields(StoredCode)} - {"kernels"}:
        raise DamagedError("it lacks something")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
    return StoredCode(**values, kernels=body[end:])
