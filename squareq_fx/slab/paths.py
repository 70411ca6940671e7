"""The two files of a slab, and the temporary ones next to them while it is built."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SlabPaths"]

_SUFFIXES = (".safetensors", ".manifest.json")


@dataclass(frozen=True)
class SlabPaths:
    """Files of the slab called `stem` (a path without suffix)."""

    stem: Path

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> SlabPaths:
        """From the path without suffix, or that of either file."""
        path = Path(path)
        for suffix in _SUFFIXES:
            if path.name.endswith(suffix) and path.name != suffix:
                return cls(path.with_name(path.name.removesuffix(suffix)))
        return cls(path)

    @property
    def data(self) -> Path:
        return self._with(".safetensors")

    @property
    def manifest(self) -> Path:
        return self._with(".manifest.json")

    @property
    def partial_data(self) -> Path:
        return self._with(".safetensors.partial")

    @property
    def partial_manifest(self) -> Path:
        return self._with(".manifest.json.partial")

    @property
    def journal(self) -> Path:
        return self._with(".journal.partial")

    def _with(self, suffix: str) -> Path:
        return self.stem.with_name(self.stem.name + suffix)
