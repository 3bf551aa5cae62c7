"""Files of `torch.save` and of `pickle.dump`, opened for the restricted machine."""

import io
import mmap
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

from critic_train.convert.pickles.arrays import TORCH_TYPES, Storage
from critic_train.convert.pickles.budget import Budget, RefusedError
from critic_train.convert.pickles.machine import Machine, Name
from critic_train.convert.pickles.names import NAMES, STORAGES, instance_of
from critic_train.errors import DataError

ZIP_MAGIC = b"PK\x03\x04"
OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How torch.save began before the zip format (torch 1.6)."""
LOCAL_HEADER_BYTES = 30
ITEM_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}


def load_dump(path: Path, name: str, *, limit_bytes: int | None = None) -> Any:
    """Read a `.pt` file or a pickle without running anything of it.

    Args:
        path: the file.
        name: the file as the user knows it.
        limit_bytes: what it may come to in memory.

    Returns:
        Plain containers, numbers, texts, numpy arrays in place of tensors, and `DataProtoState`.

    Raises:
        DataError: it holds something else, claims more than it may, or is damaged; names what.
        OSError: it cannot be read.
    """
    if not path.stat().st_size:
        raise DataError(f"{name}: the file is empty (0 bytes)")
    with path.open("rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        return load_bytes(content, Budget(limit_bytes))
    except RefusedError as refusal:
        raise DataError(f"{name}: {refusal.message}", hint=refusal.hint) from None


def load_bytes(content: memoryview, budget: Budget) -> Any:
    """The same of bytes in memory.

    Raises:
        RefusedError: as `load_dump`.
    """
    head = bytes(content[: len(OLD_TORCH)])
    if head.startswith(ZIP_MAGIC):
        return _Archive(content, budget).load()
    if head == OLD_TORCH:
        raise RefusedError("torch wrote it before version 1.6", hint="load it and save it again with a newer torch")
    return Machine(content, names=NAMES, budget=budget, instance_of=instance_of).load()


class _Archive:
    """A zip file of torch: one pickle, and one stored file a storage."""

    def __init__(self, content: memoryview, budget: Budget) -> None:
        self._content = content
        self._budget = budget
        try:
            with zipfile.ZipFile(_View(content)) as listing:
                self._entries = {info.filename: info for info in listing.infolist()}
        except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError) as error:
            raise RefusedError(f"the archive is damaged ({error})") from None
        pickles = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise RefusedError("the archive is none of torch.save (no data.pkl)")
        self._folder = pickles[0].removesuffix("data.pkl")
        order = self._entries.get(f"{self._folder}byteorder")
        if order is not None and bytes(self._read(order.filename)) != b"little":
            raise RefusedError("its numbers are in big-endian order")
        self._storages: dict[str, memoryview] = {}

    def load(self) -> Any:
        """The object that was saved."""
        content = self._read(f"{self._folder}data.pkl")
        machine = Machine(content, names=NAMES, budget=self._budget, persistent=self._storage, instance_of=instance_of)
        return machine.load()

    def _storage(self, key: Any) -> Storage:
        """What the persistent id ("storage", class, key, device, elements) stands for."""
        if type(key) is not tuple or len(key) != 5 or key[0] != "storage" or not isinstance(key[1], Name):
            raise RefusedError("it refers to something that is no tensor's storage")
        _, kind, place, _, count = key
        name = kind.text.rpartition(".")[2]
        if name not in STORAGES or type(place) is not str or not place.isalnum() or type(count) is not int:
            raise RefusedError(f"it refers to a storage of {kind.text}")
        if place not in self._storages:
            self._storages[place] = self._read(f"{self._folder}data/{place}")
        content = self._storages[place]
        item = ITEM_BYTES.get(STORAGES[name] or "", 1)
        if count * item != len(content):
            raise RefusedError(f"storage {place} claims {count:,} elements and has {len(content):,} bytes")
        return Storage(content, STORAGES[name])

    def _read(self, name: str) -> memoryview:
        """A stored file's bytes, where they lie, checked against its checksum."""
        info = self._entries.get(name)
        if info is None:
            raise RefusedError(f"the archive lacks {name}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise RefusedError(f"{name} is compressed or encrypted, which torch.save never does")
        header = self._content[info.header_offset : info.header_offset + LOCAL_HEADER_BYTES]
        if len(header) < LOCAL_HEADER_BYTES or bytes(header[:4]) != ZIP_MAGIC:
            raise RefusedError(f"the archive is damaged (no header of {name})")
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        start = info.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        content = self._content[start : start + info.file_size]
        if len(content) != info.file_size:
            raise RefusedError(f"the archive ends in the middle of {name}")
        if zlib.crc32(content) != info.CRC:
            raise RefusedError(f"the archive is damaged (checksum of {name})")
        return content


class _View(io.RawIOBase):
    """Bytes in memory as a file, without a copy."""

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self._at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, len(self._content))[whence])
        return self._at

    def readinto(self, target: Any) -> int:
        piece = self._content[self._at : self._at + len(target)]
        target[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


assert set(ITEM_BYTES) <= set(TORCH_TYPES)
