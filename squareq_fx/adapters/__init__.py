"""Low-rank adapters as data: what they hold, and the file formats people keep them in."""

from __future__ import annotations

from squareq_fx.adapters.files import read_adapter, write_adapter
from squareq_fx.adapters.state import Adapter, LayerAdapter

__all__ = ["Adapter", "LayerAdapter", "read_adapter", "write_adapter"]
