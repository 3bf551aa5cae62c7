"""A ceiling on what one piece of work may allocate, for work that others write and files steer."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most(extra_bytes: int) -> Iterator[None]:
    """Let the process's address space grow by so many bytes inside the `with` block, and no further.

    An allocation beyond fails where it is asked for, before it is touched: Python and Arrow raise MemoryError. Keep the
    block short, for it binds all threads. Only Linux tells a process its size; elsewhere nothing is held back.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    ceiling = _address_space_bytes() + extra_bytes
    if soft == resource.RLIM_INFINITY or ceiling < soft:
        resource.setrlimit(resource.RLIMIT_AS, (ceiling, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
