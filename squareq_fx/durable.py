"""Files and directory entries that are on disk before the next step relies on them."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

__all__ = ["sync", "write_whole"]


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the renames in a directory, are on disk. Raises OSError if they cannot be."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_whole(path: Path, data: bytes) -> None:
    """Put a file in place of what is there, whole or not at all; its directory is made if need be. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_bytes(data)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
