"""Processes that prepare at the same time and measure one at a time, each with the card to itself.

A job runs in a spawned process. While it prepares (imports, compiles), other jobs prepare too; when it wants to measure it asks
for its turn, and all other processes are stopped (SIGSTOP) until it is done. A job that crashes, hangs or lacks a package loses
its own rows and no others.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

__all__ = ["HERE", "Job", "Line", "Row", "bring", "run_jobs"]

HERE = str(Path(__file__).resolve().parent)
Row = dict[str, Any]


def bring(module: str) -> Any:
    """A module of this folder. The folder is on the path only meanwhile: its `kernels.py` would be taken for the package of
    that name, which transformers looks for.
    """
    sys.path.insert(0, HERE)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(HERE)


@dataclass(frozen=True)
class Job:
    """What one process does.

    Args:
        part: "layers", "models" or "train".
        work: "module.function" of this folder; called with a `Line`, the tasks and `options`.
        tasks: arms, in their order. If the process dies in one of them, the later ones get a process of their own.
        options: passed on.
        weight: of `capacity`, how much it takes while it runs.
        prepare, measure: seconds until it is ended, for each task; the time it was stopped does not count.
        environment: variables of the process.
    """

    part: str
    work: str
    tasks: tuple[str, ...]
    options: Mapping[str, Any]
    weight: float = 1.0
    prepare: float = 120.0
    measure: float = 60.0
    environment: Mapping[str, str] = field(default_factory=dict)


class Line:
    """A job's end of the connection."""

    def __init__(self, part: str, connection: Connection) -> None:
        self._part, self._connection = part, connection

    def task(self, name: str) -> None:
        """From now on the job is busy with this task."""
        self._connection.send(("task", name))

    def say(self, **row: Any) -> None:
        """A row of the log, on disk at once."""
        self._connection.send(("row", {"part": self._part, **row}))

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Waits for the turn; inside, no other job runs."""
        self._connection.send(("ready", None))
        self._connection.recv()
        try:
            yield
        finally:
            self._connection.send(("done", None))

    @contextlib.contextmanager
    def attempt(self, **row: Any) -> Iterator[None]:
        """What is raised inside becomes the row's `error`, or its `missing` if a package is not there."""
        try:
            yield
        except ModuleNotFoundError as error:
            self.say(**row, missing=str(error.name))
        except Exception as error:
            self.fail(error, **row)

    def fail(self, error: Exception, **row: Any) -> None:
        """The row with what went wrong in it; the arms after this one go on."""
        trace = "".join(traceback.format_exception(error, limit=-6))
        self.say(**row, error=_short(error), trace=trace[-4000:])


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def _enter(job: Job, connection: Connection) -> None:
    """The spawned process."""
    module, _, function = job.work.rpartition(".")
    line = Line(job.part, connection)
    with line.attempt(arm=job.tasks[0]):
        work: Callable[..., None] = getattr(bring(module), function)
        work(line, job.tasks, job.options)
    connection.send(("over", None))
    connection.close()


class _Worker:
    def __init__(self, job: Job, caches: Path) -> None:
        self.job = job
        self.left = list(job.tasks)  # the first is the one it is busy with
        self.ready = self.stopped = False
        self.spent, self.since = 0.0, time.monotonic()
        context = multiprocessing.get_context("spawn")
        self.line, there = context.Pipe()
        self.process = context.Process(target=_enter, args=(job, there), daemon=False)
        own = {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")}
        before = dict(os.environ)
        os.environ.update(own | dict(job.environment))  # a stopped process must not hold a lock of another one's cache
        try:
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        there.close()

    def stop(self) -> None:
        if not self.stopped and self.process.is_alive():
            os.kill(self.process.pid or 0, signal.SIGSTOP)
            self.spent += time.monotonic() - self.since
            self.stopped = True

    def go_on(self) -> None:
        if self.stopped:
            os.kill(self.process.pid or 0, signal.SIGCONT)
            self.since, self.stopped = time.monotonic(), False

    def restart_clock(self) -> None:
        self.spent, self.since = 0.0, time.monotonic()

    def seconds(self) -> float:
        return self.spent + (0.0 if self.stopped else time.monotonic() - self.since)

    def end(self) -> None:
        self.process.kill()  # reaches a stopped process as well
        self.process.join()
        self.line.close()


def run_jobs(jobs: Iterable[Job], log: Callable[[Row], None], seconds: float, capacity: float) -> None:
    """Runs all jobs, at most `capacity` of their weights at a time, and ends those that are left after `seconds`."""
    waiting = deque(jobs)
    running: list[_Worker] = []
    turns: deque[_Worker] = deque()
    active: _Worker | None = None
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="peers_", ignore_cleanup_errors=True) as caches:
        made = 0
        try:
            while (waiting or running) and time.monotonic() < end:
                while waiting and active is None:
                    taken = sum(worker.job.weight for worker in running)
                    if running and taken + waiting[0].weight > capacity:
                        break
                    made += 1
                    running.append(_Worker(waiting.popleft(), Path(caches) / str(made)))
                if active is None and turns:
                    active = turns.popleft()
                    for worker in running:
                        if worker is not active:
                            worker.stop()
                    time.sleep(0.02)  # what they had queued on the card runs out
                    active.restart_clock()
                    active.line.send("go")
                for worker in list(running):
                    for kind, value in _messages(worker):
                        if kind == "row":
                            log(value)
                        elif kind == "task":
                            worker.left = worker.left[worker.left.index(value) :]
                            worker.restart_clock()
                        elif kind == "ready":
                            worker.ready = True
                            turns.append(worker)
                        else:  # "done" with its turn, "over" with everything, or "died"
                            worker.ready = False
                            worker.restart_clock()
                            if kind != "done":
                                running.remove(worker)
                                if kind == "over":
                                    worker.end()
                                else:
                                    _finish(worker, waiting, log, None)
                                turns = deque(other for other in turns if other is not worker)
                            if worker is active:
                                active = None
                                for other in running:
                                    other.go_on()
                for worker in list(running):
                    limit = worker.job.measure if worker is active else worker.job.prepare
                    if worker.seconds() > limit and (worker is active or not worker.ready):
                        running.remove(worker)
                        _finish(worker, waiting, log, f"took more than {limit:.0f} s")
                        if worker is active:
                            active = None
                            for other in running:
                                other.go_on()
                wait([worker.line for worker in running if not worker.stopped], timeout=0.05)
        finally:
            for worker in running:
                worker.end()
                for task in worker.left:
                    log({"part": worker.job.part, "arm": task, "error": "not measured: the time was up"})
            for job in waiting:
                for task in job.tasks:
                    log({"part": job.part, "arm": task, "error": "not measured: the time was up"})


def _messages(worker: _Worker) -> Iterator[tuple[str, Any]]:
    kind = ""
    try:
        while kind != "over" and worker.line.poll():
            kind, value = worker.line.recv()
            yield kind, value
    except (EOFError, OSError):
        yield "died", None


def _finish(worker: _Worker, waiting: deque[Job], log: Callable[[Row], None], why: str | None) -> None:
    """Ends a process that died or hangs, says so, and gives what it had not begun to a new one."""
    if why is None:
        worker.process.join(5.0)  # it closed its end of the line: what did it die of
    worker.end()
    current, *later = worker.left
    log({"part": worker.job.part, "arm": current, "error": why or f"the process ended with {worker.process.exitcode}"})
    if later:
        waiting.append(replace(worker.job, tasks=tuple(later)))
