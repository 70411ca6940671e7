"""Where everything that is kept lies, and what goes when it is full."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["LIMIT_BYTES", "folder_of", "prune"]

LIMIT_BYTES = 1 << 30
"""All entries together; those not used for longest go first."""
_SUFFIXES = (".graph", ".stages", ".code")


def folder_of(cache: bool | str | os.PathLike[str]) -> Path | None:
    """True is `programs` below `$SQUAREQ_CACHE_DIR`, by default `~/.cache/squareq_fx`, unless `$SQUAREQ_CACHE` is 0; a path is
    that folder; False is none.
    """
    if not isinstance(cache, bool):
        return Path(cache)
    if not cache or os.environ.get("SQUAREQ_CACHE") == "0":
        return None
    folder = os.environ.get("SQUAREQ_CACHE_DIR") or Path.home() / ".cache" / "squareq_fx"
    return Path(folder) / "programs"


def prune(folder: Path, limit: int, keep: str) -> None:
    """Remove the entries not used for longest until the rest fits. Raises OSError.

    Args:
        limit: most bytes that may stay.
        keep: the entry that stays in any case; the files of one entry have one stem.
    """
    entries: dict[str, list[tuple[Path, os.stat_result]]] = {}
    for path in folder.iterdir():
        if path.suffix not in _SUFFIXES:
            continue
        try:
            entries.setdefault(path.stem, []).append((path, path.stat()))
        except FileNotFoundError:
            continue  # another process removed it
    total = sum(stat.st_size for files in entries.values() for _, stat in files)
    for name, files in sorted(entries.items(), key=lambda entry: max(stat.st_mtime for _, stat in entry[1])):
        if total <= limit:
            return
        if name != keep:
            total -= sum(stat.st_size for _, stat in files)
            for path, _ in files:
                path.unlink(missing_ok=True)
