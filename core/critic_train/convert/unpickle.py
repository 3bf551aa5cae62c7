"""Files of `torch.save` and of `pickle.dump`, read without running anything of theirs.

Python's own unpickler does the work, in C. What it could be made to do beyond plain data is taken from it:

- Names are looked up in the list of `dump_names`, never in a module; what is made by calling them is ours.
- Opcodes outside of plain data are refused, among them those for registered extensions, which `find_class` never sees.
- Nothing is allocated by a size that the file only claims: the bytes must be there.
- A tuple passes `persistent_load` when it is made, and cannot be a key unless it is a few texts. Hashing tuples of
  tuples can take 2^n steps, or overflow the C stack.
- Memory is bounded while it runs, by what files of this size can hold.
"""

import io
import mmap
import os
import pickle
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from critic_train.convert.dump_names import Name, UnhashableTuple, find_allowed, is_allowed, is_key, not_allowed
from critic_train.convert.dump_tensors import ITEM_BYTES, STORAGES, Memory, RefusedError, Storage
from critic_train.data.decoding import at_most
from critic_train.errors import DataError

ZIP_MAGIC = b"PK\x03\x04"
OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How torch.save began before the zip format (torch 1.6)."""
LOCAL_HEADER_BYTES = 30
FREE_BYTES, BYTES_A_BYTE = 2**28, 256
"""What any pickle may allocate, and what it may for each of its bytes; an empty set takes 232 for one."""
COPIED_BYTES = 2**12
"""Longer byte strings stay where they lie in the file."""
LONGEST_INTEGER = 16
"""Bytes of a whole number; an id or a hash has at most as many."""
DAMAGE = (
    pickle.UnpicklingError, EOFError, IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError,
    BufferError, RecursionError, struct.error,
)  # fmt: skip
"""What the unpickler raises where a pickle is not what a pickler writes."""

RUN = re.compile(
    rb"(?:(?:K.|M..|J.{4}){1,2000}+|(?:G.{8}){1,2000}+|[qh].|[()N\x88\x89\]}lades0-2uRbQ\x81\x8f\x90\x93\x94]"
    rb"|[rj].{4}|c[^\n]{1,4096}\n[^\n]{1,4096}\n|\x80[\0-\x05])*+",
    re.DOTALL,
)
"""Opcodes of a fixed length, and names. Possessive, so that the matcher's memory does not grow with a run's length."""
TUPLES = frozenset(b"t\x85\x86\x87\x91")
"""Opcodes that make a tuple or a frozenset."""
TEXTS = {0x8C: 1, ord("X"): 4, 0x8D: 8}
BYTES = {ord("C"): 1, ord("B"): 4, 0x8E: 8, 0x96: 8}
INTEGERS = {0x8A: 1, 0x8B: 4}
COUNTED = TEXTS | BYTES | INTEGERS
"""Opcode -> how many bytes say how many follow."""
FRAME, STOP = 0x95, ord(".")
CALL = b"Q"
"""The opcode that calls `persistent_load` with what is on the top of the stack."""
REFUSED_OPCODES = {
    ord("o"): "OBJ", ord("i"): "INST", 0x92: "NEWOBJ_EX", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", ord("P"): "PERSID",
    0x97: "NEXT_BUFFER", 0x98: "READONLY_BUFFER",
}  # fmt: skip
"""Opcodes that a dump of plain data never has, by name."""

PLAIN_REASONS = {
    "unhashable type: '": "a key is a {}",
    "' object is not callable": "it calls a {}",
    "' object has no attribute '__dict__'": "it gives a state to a {}",
    "' object has no attribute 'append'": "an item is added to a {}",
}
"""What the unpickler says of operations that no pickler writes -> the same without Python's terms."""


def load_dump(path: Path, name: str, *, limit_bytes: int | None = None) -> Any:
    """Read a `.pt` file or a pickle without running anything of it.

    Args:
        path: the file.
        name: the file as the user knows it.
        limit_bytes: what it may come to in memory; by its size, and at most half of the machine's, where not given.

    Returns:
        Plain containers, numbers, texts, numpy arrays in place of tensors, and objects of `dump_names`.

    Raises:
        DataError: it holds something else, claims more than it may, or is damaged; names what.
        OSError: it cannot be read.
    """
    if not path.stat().st_size:
        raise DataError(f"{name}: the file is empty (0 bytes)")
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        loaded = load_bytes(memoryview(mapped), limit_bytes=limit_bytes)
    except RefusedError as refusal:
        raise DataError(f"{name}: {refusal.message}", hint=refusal.hint) from None
    if sys.platform == "linux":
        # The pages that were read would stay in this process's memory as long as an array lies on the file.
        mapped.madvise(mmap.MADV_DONTNEED)
    return loaded


def load_bytes(content: memoryview, *, limit_bytes: int | None = None) -> Any:
    """The same of bytes in memory.

    Raises:
        RefusedError: as `load_dump`.
    """
    if limit_bytes is None:
        limit_bytes = min(half_of_memory(), FREE_BYTES + BYTES_A_BYTE * len(content))
    memory = Memory(limit_bytes)
    try:
        with at_most(limit_bytes):
            return _unpickler(content, memory).load()
    except MemoryError:
        raise memory.error() from None
    except DAMAGE as error:
        reason = str(error)
        plain = next((text for part, text in PLAIN_REASONS.items() if part in reason), None)
        if plain is not None:
            raise RefusedError(plain.format(reason.split("'")[1])) from None
        raise RefusedError(f"the pickle is damaged ({type(error).__name__}: {reason})") from None


def _unpickler(content: memoryview, memory: Memory) -> "DumpUnpickler":
    head = bytes(content[: len(OLD_TORCH)])
    if head == OLD_TORCH:
        raise RefusedError("torch wrote it before version 1.6", hint="load it and save it again with a newer torch")
    if head.startswith(ZIP_MAGIC):
        archive = _Archive(content)
        return DumpUnpickler(archive.pickle(), memory, archive)
    return DumpUnpickler(content, memory)


class DumpUnpickler(pickle.Unpickler):
    """The unpickler of one dump.

    Args:
        content: a pickle.
        memory: what may be made besides.
        archive: holds the storages of its tensors, if it has any.
    """

    def __init__(self, content: memoryview, memory: Memory, archive: "_Archive | None" = None) -> None:
        self._opcodes = _Opcodes(content)
        super().__init__(self._opcodes)
        self._memory = memory
        self._archive = archive

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name; raises RefusedError where it is not on the list."""
        return find_allowed(self._memory, module, name)

    def persistent_load(self, key: Any) -> Any:
        """What stands for a new tuple or frozenset, for long bytes, or for torch's id of a storage."""
        kind = type(key)
        if kind is tuple:
            return key if is_key(key) else UnhashableTuple(key)
        if kind is frozenset:
            return set(key)
        if kind is int:
            return self._opcodes.long_bytes[key]
        if self._archive is None:
            raise RefusedError("it refers to something outside of it")
        return self._archive.storage(key)


class _Opcodes:
    """A pickle as the file that the unpickler reads, some opcodes at a time, none cut.

    Args:
        content: the pickle.

    Attributes:
        long_bytes: byte strings that are left in the file; the unpickler asks `persistent_load` for them.
    """

    def __init__(self, content: memoryview) -> None:
        self.long_bytes: list[memoryview] = []
        self._segments = _segments(content, self.long_bytes)

    def peek(self, _: int) -> bytes | memoryview:
        """What comes next."""
        return next(self._segments, b"")

    def read(self, _: int) -> bytes:
        """Go on behind what `peek` gave; there is nothing more where that was too little."""
        return b""

    def readline(self) -> bytes:
        """The same of a line."""
        return b""


def _segments(content: memoryview, long_bytes: list[memoryview]) -> Iterator[bytes | memoryview]:
    """A pickle in pieces, none empty, with opcodes put in that call `persistent_load`.

    It is called with each tuple as it is made, and with an index of `long_bytes` in place of a long byte string. Frames
    are left out: their lengths would no longer be right, and they say nothing else.
    """
    start = at = 0
    while True:
        at = RUN.match(content, at).end()  # type: ignore[union-attr]
        if at >= len(content):
            raise RefusedError("the pickle ends 1 byte too early")
        code = content[at]
        if code in TUPLES:
            at += 1
            yield content[start:at]
            yield CALL
            start = at
        elif code in COUNTED:
            first, end = _counted(content, at)
            if code in BYTES and end - first > COPIED_BYTES:
                if start < at:
                    yield content[start:at]
                long_bytes.append(content[first:end])
                yield b"J" + struct.pack("<i", len(long_bytes) - 1) + CALL
                start = end
            at = end
        elif code == FRAME:
            if start < at:
                yield content[start:at]
            start = at = at + 9
        elif code == STOP:
            yield content[start : at + 1]
            return
        else:
            raise _refused_opcode(content, at)


def _counted(content: memoryview, at: int) -> tuple[int, int]:
    """Where the bytes behind a counted opcode begin and end."""
    code = content[at]
    first = at + 1 + COUNTED[code]
    length = int.from_bytes(content[at + 1 : first], "little")
    if code in INTEGERS and length > LONGEST_INTEGER:
        raise RefusedError(f"a whole number of {length:,} bytes")
    if first + length > len(content):
        raise RefusedError(
            f"the pickle ends at byte {len(content):,}, {first + length - len(content):,} bytes too early"
        )
    return first, first + length


def _refused_opcode(content: memoryview, at: int) -> RefusedError:
    code = content[at]
    if code == 0x80:
        return RefusedError("the pickle protocol is newer than 5")
    if code == ord("i"):
        module, name, *_ = [*bytes(content[at + 1 : at + 2**12]).decode("utf-8", "replace").split("\n"), ""]
        if not is_allowed(module, name):
            return not_allowed(module, name)
    if code in b"KMJGqhrjc":
        return RefusedError("the pickle ends in the middle of an opcode, or in a name without an end")
    return RefusedError(f"opcode {REFUSED_OPCODES.get(code, hex(code))} is no part of plain data")


class _Archive:
    """A zip file of torch: one pickle, and one stored file a storage."""

    def __init__(self, content: memoryview) -> None:
        self._content = content
        try:
            with zipfile.ZipFile(_View(content)) as listing:
                self._entries = {info.filename: info for info in listing.infolist()}
        except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError) as error:
            raise RefusedError(f"the archive is damaged ({error})") from None
        pickles = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise RefusedError("the archive was not written by torch.save (no data.pkl)")
        self._folder = pickles[0].removesuffix("data.pkl")
        order = self._entries.get(f"{self._folder}byteorder")
        if order is not None and bytes(self._read(order.filename)) != b"little":
            raise RefusedError("its numbers are in big-endian order")
        self._storages: dict[str, Storage] = {}

    def pickle(self) -> memoryview:
        """The pickle of the object that was saved."""
        return self._read(f"{self._folder}data.pkl")

    def storage(self, key: Any) -> Storage:
        """What the persistent id ("storage", class, key, device, elements) stands for."""
        if not isinstance(key, tuple) or len(key) != 5 or key[0] != "storage" or not isinstance(key[1], Name):
            raise RefusedError("it refers to something that is no tensor's storage")
        _, kind, number, _, count = key
        name = kind.text.rpartition(".")[2]
        if name not in STORAGES or type(number) is not str or not number.isalnum() or type(count) is not int:
            raise RefusedError(f"it refers to a storage of {kind.text}")
        dtype = STORAGES[name]
        if number not in self._storages or self._storages[number].kind != dtype:
            self._storages[number] = Storage(self._read(f"{self._folder}data/{number}"), dtype)
        storage = self._storages[number]
        if count * ITEM_BYTES.get(dtype or "", 1) != len(storage.content):
            raise RefusedError(f"storage {number} claims {count:,} elements and has {len(storage.content):,} bytes")
        return storage

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


def half_of_memory() -> int:
    """Half of this machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
