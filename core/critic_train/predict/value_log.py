"""A file's predicted values while the job goes: what a stopped job had computed is not computed again."""

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
        path: the log; what stands there is gone on with.

    Raises:
        OSError: the disk is full or not writable.
    """

    def __init__(self, path: Path) -> None:
        make_directory(path.parent, exist_ok=True)
        self._file = File(path, "append")
        self._known = self._file.size // WIDTH
        self._passed = 0

    def __enter__(self) -> "ValueLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def has(self, count: int) -> bool:
        """Whether the next `count` values are known; if so they are passed over, if not they are to be appended."""
        if self._passed + count <= self._known:
            self._passed += count
            return True
        if self._known > self._passed or self._file.size > WIDTH * self._known:
            # Part of a block: its bounds are known, so all of it is computed again.
            self._file.truncate(WIDTH * self._passed)
            self._known = self._passed
        return False

    def append(self, values: NDArray[np.float32]) -> None:
        """Add the values of a block."""
        self._file.write(bytes_of(np.ascontiguousarray(values, dtype=np.float32)))
        self._file.sync()
        self._passed += len(values)
        self._known = self._passed


class LoggedValues:
    """Reads a whole log from its start.

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
        spread = np.zeros(len(response_mask), dtype=np.float32)
        spread[response_mask] = values
        return spread
