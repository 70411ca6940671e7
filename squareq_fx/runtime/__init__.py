"""The streaming runtime: host store, device arena, copy stream, telemetry. What `squareq.load` runs on."""

from __future__ import annotations

from squareq_fx.runtime.runtime import Runtime
from squareq_fx.runtime.segments import Piece, Segment
from squareq_fx.runtime.store import WeightStore
from squareq_fx.runtime.telemetry import MemoryEvent, StepReport, StepTiming

__all__ = ["MemoryEvent", "Piece", "Runtime", "Segment", "StepReport", "StepTiming", "WeightStore"]
