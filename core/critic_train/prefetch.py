"""Do the next thing in a background thread while this one is worked on. What comes out is the same, in its order."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
K = TypeVar("K")


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, made up to `depth` ahead of whoever takes them.

    An error comes out where its item would have. Whoever leaves off in the middle waits for what is being made.
    """
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        made: deque[Future[object]] = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := made.popleft().result()) is not end:
            made.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]
        made.clear()


class ReadAhead(Generic[K, T]):
    """Reads what is asked for, and meanwhile what will be asked for next.

    Args:
        read: a function of its argument alone; it is called by one thread at a time.
    """

    def __init__(self, read: Callable[[K], T]) -> None:
        self._read = read
        self._pool: ThreadPoolExecutor | None = None
        self._next: tuple[K, Future[T]] | None = None

    def get(self, wanted: K, following: K | None) -> T:
        """What `read` gives for `wanted`; then `following` is read in the background, if there is one.

        An error in the background is raised when its result is asked for, and forgotten when another one is.
        """
        if self._next is not None and self._next[0] == wanted:
            found = self._next[1].result()
        else:
            self._forget()
            found = self._read(wanted)
        self._next = None
        if following is not None:
            self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
            self._next = following, self._pool.submit(self._read, following)
        return found

    def close(self) -> None:
        """Wait for what is being read, and end the thread."""
        self._forget()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _forget(self) -> None:
        if self._next is not None and not self._next[1].cancel():
            self._next[1].exception()  # waits
        self._next = None
