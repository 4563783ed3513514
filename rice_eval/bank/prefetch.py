"""An ordered map over worker threads that runs a bounded distance ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["ordered_map"]

A = TypeVar("A")
B = TypeVar("B")


def ordered_map(function: Callable[[A], B], items: Iterable[A], workers: int, ahead: int) -> Iterator[B]:
    """``function(item)`` for each item, in order, with at most ``ahead`` results in flight.

    Threads, not processes: Pillow decodes and scales outside the interpreter's lock, nothing has to be pickled, and nothing
    outlives a killed run. With no workers the calls happen in the caller.

    Args:
        function: called in a worker.
        items: pulled in the caller's thread, no further ahead than results are.
        workers: threads; 0 for none.
        ahead: results in flight, at least 1.
    """
    if workers < 1:
        yield from map(function, items)
        return
    source = iter(items)
    pending: deque[Future[B]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for item in source:
            pending.append(pool.submit(function, item))
            if len(pending) >= max(1, ahead):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
