"""What a pickle may cost, and the one fault that all of this package raises."""

import os

from critic_train.errors import DataError

PYTHON_OBJECT = 64
"""Bytes an object is counted with."""


class RefusedError(DataError):
    """The file holds something that is not built, or claims what it does not hold."""


class Budget:
    """Bytes that may still be built; spent before anything is allocated.

    Args:
        limit_bytes: what one file may come to in memory; half of this machine's memory where it is not said.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes = half_of_memory() if limit_bytes is None else limit_bytes
        self.left = self.limit_bytes

    def spend(self, count: int) -> None:
        """Take `count` bytes.

        Raises:
            RefusedError: they are not left.
        """
        self.left -= count
        if self.left < 0:
            raise RefusedError(
                f"what it describes takes more than {self.limit_bytes / 2**30:,.2g} GiB in memory",
                hint="no rollout dump of its size holds as much; write smaller dumps, or check where it comes from",
            )


def half_of_memory() -> int:
    """Half of the machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
