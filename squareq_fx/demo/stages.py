"""Named stages of a longer run: shown with a bar in the terminal while they last, timed for the report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["Advance", "Stages"]


class Advance(Protocol):
    """Tells how many steps of a stage are done, and, if there is anything to tell, how it stands."""

    def __call__(self, done: int, note: str = "") -> None: ...


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
            TextColumn("[dim]{task.fields[note]}"),
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
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Yields a function to tell how many of `total` steps are done; without a total the bar pulses."""
        task = self._progress.add_task(name, total=total, note="")
        began = time.perf_counter()

        def advance(done: int, note: str = "") -> None:
            self._progress.update(task, completed=done, note=note)

        yield advance
        self.seconds.append((name, time.perf_counter() - began))
        self._progress.update(task, total=total or 1, completed=total or 1)
