"""What a run shows: a table before, a progress bar while it trains, and TensorBoard's files."""

from __future__ import annotations

import collections
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lora_trainer.cache import Entry

__all__ = ["Reporter", "bucket_table"]

_SMOOTHING = 0.05


def bucket_table(samples: Sequence[Entry], batch_size: int) -> Table:
    """Buckets, pictures and batches of an epoch."""
    table = Table("bucket", "pictures", "batches an epoch", title=f"{len(samples)} pictures")
    counts = collections.Counter(entry.bucket for entry in samples if entry.bucket is not None)
    for (width, height), count in sorted(counts.items()):
        table.add_row(f"{width}x{height}", str(count), str(-(-count // batch_size)))
    return table


class Reporter:
    """A progress bar with the smoothed loss, and TensorBoard's files if a directory for them is given.

    Args:
        first: steps done before; what an earlier, killed run logged beyond them is hidden by TensorBoard.
    """

    def __init__(self, console: Console, *, steps: int, first: int, logs: Path | None) -> None:
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[pace]:.2f} s a step"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("", total=steps, completed=first, loss=float("nan"), pace=float("nan"))
        self._smoothed: float | None = None
        self._last = time.perf_counter()
        self._writer: Any = None
        if logs is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(logs), purge_step=first + 1)

    def __enter__(self) -> Reporter:
        self._progress.start()
        self._last = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()
        if self._writer is not None:
            self._writer.close()

    def step(self, step: int, loss: float, scalars: Mapping[str, float]) -> None:
        """One optimizer step is done."""
        now = time.perf_counter()
        pace, self._last = now - self._last, now
        self._smoothed = loss if self._smoothed is None else self._smoothed + _SMOOTHING * (loss - self._smoothed)
        self._progress.update(self._task, completed=step, loss=self._smoothed, pace=pace)
        if self._writer is not None:
            for name, value in {"loss": loss, "seconds_a_step": pace, **scalars}.items():
                self._writer.add_scalar(f"train/{name}", value, step)

    def pictures(self, step: int, pictures: Sequence[Image.Image], folder: Path) -> None:
        """Sample pictures, as PNG files and in TensorBoard. The time they took counts for no step."""
        folder.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(pictures):
            picture.save(folder / f"step-{step:06}-{index:02}.png")
            if self._writer is not None:
                self._writer.add_image(f"samples/{index:02}", np.asarray(picture), step, dataformats="HWC")
        self._last = time.perf_counter()
