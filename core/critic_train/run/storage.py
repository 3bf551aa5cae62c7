"""The one door to the disk: every write of a run passes here, one operation at a time.

A watcher is told of each operation before it happens. So a test can fail the n-th one, or end the process at it, and
see what is left (SQLite tests its own file layer so: https://www.sqlite.org/testing.html#crash_testing). Nothing is
retried and nothing is hidden here; what makes several operations one, durably, is in `durable`.

Writes that survive: a file appears under its name whole, or not at all.

How much room there is on the disk, and whether it will do.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from safetensors import SafetensorError

from critic_train.errors import MachineError
from critic_train.text import format_bytes, without_secrets

Kind = Literal[
    "create", "append", "write", "truncate", "sync", "mkdir", "rename", "link", "remove", "library", "library done"
]
Data = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Operation:
    """Something that is about to be done to the disk.

    Attributes:
        kind: what.
        path: to which file or directory.
        data: the bytes of a write.
        place: where in the file they go; None for its end.
        target: the new name of a rename, the destination of a link.
    """

    kind: Kind
    path: Path
    data: Data | None = None
    place: int | None = None
    target: Path | None = None


Watcher = Callable[[Operation], None]
_watchers: list[Watcher] = []


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Have a watcher told of every operation, before it happens. What the watcher raises, the operation raises."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def _tell(
    kind: Kind, path: Path, data: Data | None = None, place: int | None = None, target: Path | None = None
) -> None:
    if _watchers:
        operation = Operation(kind, path, data, place, target)
        for watcher in _watchers:
            watcher(operation)


class File:
    """A file being written, without a buffer: what `write` was given is with the operating system when it returns.

    Args:
        path: the file.
        kind: "create" empties what stands there, "append" goes on after it.

    Raises:
        OSError: it cannot be opened; every method likewise, when its operation fails.
    """

    def __init__(self, path: Path, kind: Literal["create", "append"]) -> None:
        _tell(kind, path)
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(path, flags | (os.O_TRUNC if kind == "create" else os.O_APPEND), 0o666)

    def __enter__(self) -> "File":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._descriptor).st_size

    def write(self, data: Data) -> None:
        """Write all of `data` at the file's end."""
        _tell("write", self.path, data)
        left = memoryview(data)
        while left:
            left = left[os.write(self._descriptor, left) :]

    def write_at(self, data: Data, place: int) -> None:
        """Write all of `data` from byte `place` on."""
        _tell("write", self.path, data, place)
        left = memoryview(data)
        while left:
            done = os.pwrite(self._descriptor, left, place)
            left, place = left[done:], place + done

    def truncate(self, size: int) -> None:
        """Cut the file to `size` bytes, or lengthen it with zeros."""
        _tell("truncate", self.path)
        os.ftruncate(self._descriptor, size)

    def sync(self) -> None:
        """Have the operating system put the file's content on the disk."""
        _tell("sync", self.path)
        os.fsync(self._descriptor)

    def fileno(self) -> int:
        """The descriptor, for a lock."""
        return self._descriptor

    def close(self) -> None:
        """Close the file; twice is once."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


def write_file(path: Path, data: Data) -> None:
    """Write a file and sync it. It is not whole before this returns: give it a name nobody looks for."""
    with File(path, "create") as file:
        file.write(data)
        file.sync()


def copy_file(source: Path, target: Path) -> None:
    """Write a file with another's content."""
    with source.open("rb") as given, File(target, "create") as file:
        while piece := given.read(2**20):
            file.write(piece)


def make_directory(path: Path, *, parents: bool = True, exist_ok: bool = False) -> None:
    """Make a directory, and those above it unless told otherwise."""
    if not (exist_ok and path.is_dir()):
        _tell("mkdir", path)
        path.mkdir(parents=parents, exist_ok=exist_ok)


def rename(source: Path, target: Path) -> None:
    """Give a file or directory another name, at once. A file that stands there is replaced."""
    _tell("rename", source, target=target)
    source.replace(target)


def link(path: Path, target: Path) -> None:
    """Make `path` a symbolic link to `target`."""
    _tell("link", path, target=target)
    path.symlink_to(target)


def remove(path: Path) -> None:
    """Remove a file or link, if it stands."""
    if path.is_symlink() or path.exists():
        _tell("remove", path)
        path.unlink(missing_ok=True)


def remove_tree(path: Path) -> OSError | None:
    """Remove a directory and all in it, file by file. A link goes, never what it leads to.

    Returns:
        None, or why something of it is still there: cleaning up never ends a run.
    """
    try:
        if path.is_symlink():  # os.walk would follow it
            remove(path)
            return None
        for folder, folders, files in os.walk(path, topdown=False):
            for name in files:
                remove(Path(folder, name))
            for name in folders:
                inner = Path(folder, name)
                (remove if inner.is_symlink() else _remove_folder)(inner)
        _remove_folder(path)
    except OSError as error:
        return error
    return None


def _remove_folder(path: Path) -> None:
    if path.is_symlink():
        remove(path)
    elif path.is_dir():
        _tell("remove", path)
        path.rmdir()


def sync_file(path: Path) -> None:
    """Have the operating system put a written file on the disk."""
    _tell("sync", path)
    _sync(path)


def sync_directory(path: Path) -> None:
    """Have the operating system put a directory's entries on the disk, where the file system knows how."""
    _tell("sync", path)
    try:
        _sync(path)
    except OSError as error:
        # Some network file systems do not sync directories and say so with these; they keep names by themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def library_writes(path: Path) -> Iterator[None]:
    """Around a call of a library that writes a file or fills a directory by itself: one operation, with an end.

    Raises:
        OSError: the library could not write. safetensors hides the error's number in its words.
    """
    _tell("library", path)
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    _tell("library done", path)


def replace_file(path: Path, data: Data) -> None:
    """Write a file beside its place, sync it and rename it there.

    Raises:
        OSError: the disk is full or not writable; the old file stands unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_file(temporary, data)
        rename(temporary, path)
    except OSError:
        remove(temporary)
        raise
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Put JSON under a name, whole or not at all, secrets hidden. NaN is refused, since it is no JSON.

    Raises:
        OSError: the disk is full or not writable; the old file stands unchanged.
    """
    replace_file(path, without_secrets(json.dumps(value, indent=2, allow_nan=False)).encode() + b"\n")


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""No space, no quota, no larger files: what removing something may help against."""


def free_bytes(path: Path) -> int:
    """What this user may still write at `path`, or where its nearest standing parent is. A quota is not seen."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def require_room(path: Path, needed: int, what: str, *, hint: str) -> None:
    """Raise where the disk has less room than will be needed.

    Args:
        path: where it will be written.
        needed: bytes.
        what: what needs them, as in "3 checkpoints of 1.6 GB".
        hint: what to do.

    Raises:
        MachineError: there is not enough.
    """
    free = free_bytes(path)
    if needed > free:
        raise MachineError(
            f"not enough room at {path} for {what}: {format_bytes(needed)} needed, {format_bytes(free)} free",
            hint=hint,
        )
