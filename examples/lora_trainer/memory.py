"""What a run will hold on the card, before its first step."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import torch

import squareq_fx
from lora_trainer.cache import Entry
from lora_trainer.preparing import Plan
from lora_trainer.settings import Settings
from squareq_fx.errors import SquareQError

__all__ = ["check_memory", "forecast_run"]

_STATE_BYTES = {"adamw": 8, "adamw8bit": 2}
"""Of an optimizer, for each number it trains."""


def forecast_run(gm: Any, settings: Settings, plan: Plan) -> squareq_fx.Forecast:
    """Of the largest batch."""
    sizes = Counter(entry.bucket for entry in plan.cache.samples)
    batches = [(min(settings.batch_size, sizes[entry.bucket]), entry) for entry in plan.cache.samples]
    count, entry = max(batches, key=lambda one: one[0] * _pixels(one[1]))
    batch = {name: torch.empty(count, *shape, dtype=gm.dtype, device="meta") for name, shape in entry.shapes.items()}
    asked = _Call(gm.config)
    with contextlib.suppress(_Asked):
        plan.family.predict(asked, batch.pop("latents"), torch.zeros(count), batch, settings.guidance)
    return squareq_fx.forecast(gm, (asked.args, asked.kwargs), training=True)


def check_memory(found: squareq_fx.Forecast, trained: int, settings: Settings, free: int | None) -> str:
    """What to tell the user.

    Args:
        trained: numbers that train.
        free: bytes of the device, or None if nobody knows.

    Raises:
        SquareQError: the run does not fit.
    """
    needed = found.peak + trained * (4 + _STATE_BYTES[settings.optimizer] + (4 if settings.ema is not None else 0))
    text = f"the largest batch will hold {needed / 2**30:.2f} GiB, the optimizer's states and gradients included: {found}"
    if "cudagraph" in settings.backend:
        text += "; while it is recorded more, for Flux at 1024x1024 a third more"
    if free is None or needed <= free:
        return text
    advice = "a smaller --batch-size with --accumulate, --save recompute or offload, a lower --resolution in the cache"
    if settings.backend != "inductor":
        raise SquareQError(f"{text}. The card has {free / 2**30:.2f} GiB free. Try {advice}.")
    return f"{text}. The card has {free / 2**30:.2f} GiB free; fused code holds less, but if it runs out try {advice}"


def _pixels(entry: Entry) -> int:
    assert entry.bucket is not None, "samples have a bucket"
    return entry.bucket[0] * entry.bucket[1]


class _Asked(Exception):
    """The model was called."""


class _Call:
    """Stands for the model: keeps what it is called with."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.args, self.kwargs = args, kwargs
        raise _Asked
