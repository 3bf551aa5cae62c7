"""A file of an object store as a Python file, fetched in blocks that are kept for a while."""

import io
import threading
from collections import OrderedDict
from typing import Any

import pyarrow as pa

from critic_train.data.stores import store_of
from critic_train.errors import MachineError

BLOCK_BYTES = 4 * 2**20
"""What is asked of a store at once; smaller requests cost as much."""
CACHED_BLOCKS = 48
"""Blocks kept in memory, of all remote files together: a shard is listed, looked over and decoded, and fetched once."""
AGAIN = "run the same command again"


class Blocks:
    """Blocks of remote files, those used last kept in memory."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, int, int]) -> bytes | None:
        with self._lock:
            block = self._kept.get(key)
            if block is not None:
                self._kept.move_to_end(key)
            return block

    def put(self, key: tuple[str, int, int], block: bytes) -> None:
        with self._lock:
            self._kept[key] = block
            while len(self._kept) > CACHED_BLOCKS:
                self._kept.popitem(last=False)


BLOCKS = Blocks()


class RemoteReader(io.RawIOBase):
    """A file of a store, fetched block by block as it is read."""

    def __init__(self, address: str) -> None:
        super().__init__()
        store, path = store_of(address)
        self._address = address
        try:
            self._file = store.open_input_file(path)
            self._size = self._file.size()
        except pa.ArrowException as error:
            raise OSError(str(error)) from None
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, target: Any) -> int:
        if self._at >= self._size:
            return 0
        number, inside = divmod(self._at, BLOCK_BYTES)
        piece = self._block(number)[inside : inside + len(target)]
        target[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _block(self, number: int) -> bytes:
        key = (self._address, self._size, number)
        block = BLOCKS.get(key)
        if block is None:
            wanted = min(BLOCK_BYTES, self._size - number * BLOCK_BYTES)
            try:
                block = self._file.read_at(wanted, number * BLOCK_BYTES)
            except (OSError, pa.ArrowException) as error:
                raise MachineError(f"{self._address} cannot be read: {error}", hint=AGAIN) from None
            if len(block) != wanted:
                raise MachineError(f"{self._address} has changed while it was read", hint=AGAIN)
            BLOCKS.put(key, block)
        return block
