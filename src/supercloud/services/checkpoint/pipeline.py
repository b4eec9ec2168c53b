"""Work on several threads, results in order, bounded in number: what bounds the memory used."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")


class Pipeline:
    """``workers`` threads; with 0 everything runs in the caller's."""

    def __init__(self, workers: int) -> None:
        self._ahead = 2 * workers
        self._pool = ThreadPoolExecutor(workers, "checkpoint") if workers else None

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def ordered(self, tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
        """The results in the order of the tasks, of which but a few are taken ahead.

        Nothing of it runs any more when this ends, however it ends.
        """
        if self._pool is None:
            for task in tasks:
                yield task()
            return
        running: deque[Future[T]] = deque()
        try:
            for task in tasks:
                running.append(self._pool.submit(task))
                if len(running) > self._ahead:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
            wait(running)
