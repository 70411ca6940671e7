"""Training checkpoints: a run that is killed and resumed ends as one that was not, bit for bit on the CPU.

    runs/cat/checkpoint-120/
        adapters.safetensors   every trainable parameter by name
        state.safetensors      the tensors of optimizer, scheduler, EMA, extras and random states
        state.json             everything else of them, the step, and size and checksum of the two files

Nothing is pickled. A checkpoint is written into `.checkpoint-120.partial`, flushed to disk and renamed, so a directory of that
name is whole; older ones are removed only then.
"""

from __future__ import annotations

from squareq_fx.checkpoint.directory import latest_checkpoint
from squareq_fx.checkpoint.loading import load_checkpoint
from squareq_fx.checkpoint.saving import save_checkpoint
from squareq_fx.checkpoint.states import Stateful

__all__ = ["Stateful", "latest_checkpoint", "load_checkpoint", "save_checkpoint"]
