"""All writes of a run: single operations that tests can make fail, and atomic replacement made of them.

Watchers are called before each operation, so that a test can fail the n-th one or end the process at it and look at the
result, as SQLite tests its file layer (https://www.sqlite.org/testing.html#crash_testing). Nothing is retried and no
error is hidden here.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
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
    """An operation on the disk that is about to happen.

    Attributes:
        kind: what is done.
        path: the file or directory.
        data: the bytes of a write.
        offset: the position of a write in the file; None for its end.
        target: the new name of a rename, the destination of a link.
    """

    kind: Kind
    path: Path
    data: Data | None = None
    offset: int | None = None
    target: Path | None = None


Watcher = Callable[[Operation], None]
_watchers: list[Watcher] = []


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Call `watcher` before every operation inside the `with` block. What it raises, the operation raises."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def _announce(
    kind: Kind, path: Path, data: Data | None = None, offset: int | None = None, target: Path | None = None
) -> None:
    if _watchers:
        operation = Operation(kind, path, data, offset, target)
        for watcher in _watchers:
            watcher(operation)


class File:
    """A file being written, without a buffer: when `write` returns, the operating system has the data.

    Args:
        path: the file.
        kind: "create" empties what stands there, "append" goes on after it.

    Raises:
        OSError: it cannot be opened; every method likewise, when its operation fails.
    """

    def __init__(self, path: Path, kind: Literal["create", "append"]) -> None:
        _announce(kind, path)
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
        _announce("write", self.path, data)
        left = memoryview(data)
        while left:
            left = left[os.write(self._descriptor, left) :]

    def write_at(self, data: Data, offset: int) -> None:
        """Write all of `data` from byte `offset` on."""
        _announce("write", self.path, data, offset)
        left = memoryview(data)
        while left:
            done = os.pwrite(self._descriptor, left, offset)
            left, offset = left[done:], offset + done

    def truncate(self, size: int) -> None:
        """Cut the file to `size` bytes, or lengthen it with zeros."""
        _announce("truncate", self.path)
        os.ftruncate(self._descriptor, size)

    def sync(self) -> None:
        """Have the operating system put the file's content on the disk."""
        _announce("sync", self.path)
        os.fsync(self._descriptor)

    def fileno(self) -> int:
        """The descriptor, for a lock."""
        return self._descriptor

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


def write_file(path: Path, data: Data) -> None:
    """Write a file and sync it. It is incomplete until this returns: use a name that no reader looks for."""
    with File(path, "create") as file:
        file.write(data)
        file.sync()


def copy_file(source: Path, target: Path) -> None:
    """Write a file with another's content."""
    with source.open("rb") as given, File(target, "create") as file:
        while piece := given.read(2**20):
            file.write(piece)


def make_directory(path: Path, *, parents: bool = True, exist_ok: bool = False) -> None:
    """Make a directory; with `parents` also those above it."""
    if not (exist_ok and path.is_dir()):
        _announce("mkdir", path)
        path.mkdir(parents=parents, exist_ok=exist_ok)


def rename(source: Path, target: Path) -> None:
    """Give a file or directory another name, at once. A file that stands there is replaced."""
    _announce("rename", source, target=target)
    source.replace(target)


def rename_durably(source: Path, target: Path) -> None:
    """Rename a file or directory, and sync the directory of its new name."""
    rename(source, target)
    sync_directory(target.parent)


def link(path: Path, target: Path) -> None:
    """Make `path` a symbolic link to `target`."""
    _announce("link", path, target=target)
    path.symlink_to(target)


def remove(path: Path) -> None:
    """Remove a file or link, if it stands."""
    if path.is_symlink() or path.exists():
        _announce("remove", path)
        path.unlink(missing_ok=True)


def remove_tree(path: Path) -> OSError | None:
    """Remove a directory and all in it, file by file. Links are removed, never their targets.

    Returns:
        None, or the error that left a part of it there: cleaning up never ends a run.
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
        _announce("remove", path)
        path.rmdir()


def sync_file(path: Path) -> None:
    """Have the operating system put a written file on the disk."""
    _announce("sync", path)
    _sync(path)


def sync_directory(path: Path) -> None:
    """Have the operating system put a directory's entries on the disk, where the file system knows how."""
    _announce("sync", path)
    try:
        _sync(path)
    except OSError as error:
        # Some network file systems cannot sync directories and answer with these; their servers persist names.
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

    Afterwards the files have the mode that the umask says: safetensors 0.8 makes them readable by their owner alone,
    and the job that loads a checkpoint may run under another account.

    Raises:
        OSError: the library could not write. safetensors gives the error's number in its message alone.
    """
    _announce("library", path)
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    for file in path.iterdir() if path.is_dir() else (path,):
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~UMASK)
    _announce("library done", path)


class StagedFile(File):
    """A file written under a temporary name beside its target.

    When the `with` block ends without an error, the file is synced and renamed to its target; otherwise it is removed.

    Args:
        target: the file's final name; a file that stands there is replaced.
    """

    def __init__(self, target: Path) -> None:
        super().__init__(target.with_name(f".{target.name}.tmp"), "create")
        self._target = target

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with closing(self):
                if error is None:
                    self.sync()
            if error is None:
                rename_durably(self.path, self._target)
        finally:
            remove(self.path)


def replace_file(path: Path, data: Data) -> None:
    """Replace a file atomically.

    Raises:
        OSError: the disk is full or not writable; the old file stands unchanged.
    """
    with StagedFile(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by JSON atomically, secrets hidden. NaN is refused, since JSON has none.

    Raises:
        OSError: the disk is full or not writable; the old file stands unchanged.
    """
    replace_file(path, without_secrets(json.dumps(value, indent=2, allow_nan=False)).encode() + b"\n")


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


UMASK = os.umask(0o077)
"""Read once, while there is one thread: it can only be read by setting it."""
os.umask(UMASK)

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""No space, no quota, no larger files: errors that removing files may help against."""


def free_bytes(path: Path) -> int:
    """Bytes this user may still write at `path` or its nearest existing parent; quotas are not seen."""
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


DATA_SUFFIXES = frozenset({
    ".parquet", ".parq", ".arrow", ".jsonl", ".ndjson", ".csv", ".tsv", ".pt", ".pth", ".pkl", ".pickle", ".npz",
    ".npy", ".safetensors", ".bin", ".gguf",
})  # fmt: skip


def first_data_file(folder: Path) -> Path | None:
    """A file of data or weights in a folder or below it, None where there is none; logs and notes are neither.

    Names that begin with "." or "_" are passed over, as readers of shards pass over them.
    """
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        for name in sorted(names):
            if not name.startswith((".", "_")) and not DATA_SUFFIXES.isdisjoint(Path(name.lower()).suffixes):
                return Path(parent, name)
    return None
