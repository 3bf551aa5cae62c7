"""Token columns set aside, in memory while they are small and in an unlinked temporary file beyond."""

import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from critic_train.errors import MachineError
from critic_train.judging.moments import Integers

MEMORY_BYTES = 2**24
BLOCK_TOKENS = 2**15

Column = NDArray[np.float32]


class Spool:
    """Float32 columns of equal length that are appended to and read back in blocks of whole rollouts.

    The files have no name on disk and vanish with the process, however it ends.
    """

    def __init__(self, names: Sequence[str], *, memory_bytes: int = MEMORY_BYTES) -> None:
        """Args:
        names: the columns.
        memory_bytes: size up to which a column stays in memory.
        """
        # Closed, and with that gone, when the spool is collected.
        self._files = {name: tempfile.SpooledTemporaryFile(memory_bytes) for name in names}  # noqa: SIM115

    def append(self, name: str, tokens: Column) -> None:
        """Add float32 [T] at the column's end. Raises MachineError where the disk has no room."""
        file = self._files[name]
        try:
            file.seek(0, 2)
            file.write(np.ascontiguousarray(tokens, dtype=np.float32).tobytes())
        except OSError as error:
            raise MachineError(
                f"cannot write to the temporary folder {tempfile.gettempdir()}: {error.strerror}",
                hint="set TMPDIR to a folder with room for 4 bytes a response token and critic",
            ) from error

    def blocks(self, name: str, lengths: Integers) -> Iterator[Column]:
        """Read a column from its start, block by block as `block_slices(lengths)` cuts it."""
        position = 0
        for part in block_slices(lengths):
            size = 4 * int(lengths[part].sum())
            file = self._files[name]
            file.seek(position)  # each time: several readers may take turns
            yield np.frombuffer(file.read(size), dtype=np.float32)
            position += size


def block_slices(lengths: Integers) -> Iterator[slice]:
    """Runs of rollouts of about BLOCK_TOKENS tokens each (one rollout at least).

    Args:
        lengths: int64 [m], tokens of each rollout.
    """
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + BLOCK_TOKENS, side="right"))
        stop = max(stop, start + 1)
        yield slice(start, stop)
        start = stop
