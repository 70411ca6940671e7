"""A pool of threads that each compute on one core."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

__all__ = ["one_thread_workers"]

_MOST = 8  # more would wait for each other at Python's lock


@contextmanager
def one_thread_workers() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch may use, at most 8, with torch's own threading off in each.

    Work in pieces that fit a core's cache is too short for torch to split it again: the threads would spend
    their time waiting for each other. It also makes results independent of the number of threads. What has
    not begun when the block is left by an exception is dropped.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(min(threads, _MOST), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)  # setting it in a worker also set it for threads yet to be made
