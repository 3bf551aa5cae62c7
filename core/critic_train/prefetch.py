"""Iteration and reading with a background thread that prepares the next item; results and their order are the same."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
K = TypeVar("K")


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, computed up to `depth` ahead of their use.

    An error is raised in place of its item. Closing the iterator waits for the item that is being computed.
    """
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        made: deque[Future[object]] = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := made.popleft().result()) is not end:
            made.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]
        made.clear()


class ReadAhead(Generic[K, T]):
    """Reads by key, and meanwhile reads the next key.

    Args:
        read: a function of its argument alone; it is called by one thread at a time.
    """

    def __init__(self, read: Callable[[K], T]) -> None:
        self._read = read
        self._pool: ThreadPoolExecutor | None = None
        self._next: tuple[K, Future[T]] | None = None

    def get(self, key: K, following: K | None) -> T:
        """`read(key)`; then `following` is read in the background, unless it is None.

        An error in the background is raised when its result is asked for, and dropped when another one is.
        """
        if self._next is not None and self._next[0] == key:
            result = self._next[1].result()
        else:
            self._discard()
            result = self._read(key)
        self._next = None
        if following is not None:
            self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
            self._next = following, self._pool.submit(self._read, following)
        return result

    def close(self) -> None:
        """Wait for the read in the background, and end the thread."""
        self._discard()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _discard(self) -> None:
        if self._next is not None and not self._next[1].cancel():
            self._next[1].exception()  # waits
        self._next = None
