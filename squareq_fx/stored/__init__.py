"""Graphs as bytes: what a pass pipeline returned, written to be read again in another process. No byte of it is executed."""

from squareq_fx.stored.errors import DamagedError, UnstorableError
from squareq_fx.stored.programs import StoredStage, read_program, write_program

__all__ = ["DamagedError", "StoredStage", "UnstorableError", "read_program", "write_program"]
