"""Named stages of a longer run: shown with a bar in the terminal while they last, timed for the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["Stages"]


class Stages:
    """A context manager around the run; `stage(name)` around each part of it.

    Attributes:
        seconds: (name, seconds) of every stage that ended, in order.
    """

    def __init__(self, console: Console) -> None:
        self.seconds: list[tuple[str, float]] = []
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=console,
        )

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Yields a function to tell how many of `total` steps are done; without a total the bar pulses."""
        task = self._progress.add_task(name, total=total)
        began = time.perf_counter()
        yield lambda done: self._progress.update(task, completed=done)
        self.seconds.append((name, time.perf_counter() - began))
        self._progress.update(task, total=total or 1, completed=total or 1)
