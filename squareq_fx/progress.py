"""A progress bar over things done one after the other, on a terminal only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["count_bar"]


@contextmanager
def count_bar(total: int, text: str, enabled: bool = True) -> Iterator[Callable[[str], None]]:
    """Yields a function to call after each of `total` things, with the name of what comes next or was done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[now]}", markup=True),
    )
    with Progress(*columns, console=console, disable=not (enabled and console.is_terminal), transient=True) as bar:
        task = bar.add_task(text, total=total, now="")
        yield lambda now: bar.update(task, advance=1, now=now)
