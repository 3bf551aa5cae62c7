"""Predicted values on the disk, as they are computed: a resumed job computes none of them twice."""

from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from critic_train.data.rollout_cache import bytes_of
from critic_train.run.storage import File, make_directory

WIDTH = 4


class ValueLog:
    """Float32 values of response tokens, appended block by block, each block on the disk before the next begins.

    Args:
        path: the log; an existing one is continued.

    Raises:
        OSError: the disk is full or not writable.
    """

    def __init__(self, path: Path) -> None:
        make_directory(path.parent, exist_ok=True)
        self._file = File(path, "append")
        self._logged = self._file.size // WIDTH
        self._passed = 0

    def __enter__(self) -> "ValueLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def has(self, count: int) -> bool:
        """Whether the next `count` values are in the log; if so they are skipped, if not they must be appended."""
        if self._passed + count <= self._logged:
            self._passed += count
            return True
        if self._logged > self._passed or self._file.size > WIDTH * self._logged:
            # A part of a block was written: the block is computed again.
            self._file.truncate(WIDTH * self._passed)
            self._logged = self._passed
        return False

    def append(self, values: NDArray[np.float32]) -> None:
        """Add the values of a block."""
        self._file.write(bytes_of(np.ascontiguousarray(values, dtype=np.float32)))
        self._file.sync()
        self._passed += len(values)
        self._logged = self._passed


class LoggedValues:
    """Reads a log from its start.

    Args:
        path: the log.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")

    def __enter__(self) -> "LoggedValues":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def over(self, response_mask: NDArray[np.bool_]) -> NDArray[np.float32]:
        """The next values, one for each true entry, spread over the mask: float32, 0 where it is false."""
        count = int(response_mask.sum())
        values = np.frombuffer(self._file.read(WIDTH * count), dtype=np.float32)
        assert len(values) == count, "every block of the file was logged"
        aligned = np.zeros(len(response_mask), dtype=np.float32)
        aligned[response_mask] = values
        return aligned
