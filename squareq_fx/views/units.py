"""Bytes and seconds for people."""

from __future__ import annotations

__all__ = ["format_bytes", "format_seconds"]


def format_bytes(nbytes: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def format_seconds(seconds: float) -> str:
    """0.0123 -> '12 ms', 3.21 -> '3.2 s'."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
