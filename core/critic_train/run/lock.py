"""One process a run: a kernel lock on a file that also names its holder.

The kernel releases the lock when the process ends, however it ends; the file's text is for people. Over NFS the server
holds the lock and drops it when the client's lease expires, about a minute and a half after its machine is gone. On a
file system without locks the text decides: a holder on this machine that is no longer alive has released the lock, one
on another machine has it until the file is removed.
"""

import errno
import fcntl
import os
import re
import socket
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from critic_train.errors import MachineError
from critic_train.run.storage import File

NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP})


class Lock:
    """Held inside the `with` block.

    Args:
        path: the lock's file; its directory exists.
        flag: the flag that names the directory, for messages.

    Attributes:
        left_by: the last holder, if it was killed or crashed; else empty.

    Raises:
        MachineError: another process holds it.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, flag: str = "--out") -> None:
        self._path = path
        self._flag = flag
        self._file: File | None = None
        self.left_by = ""

    def __enter__(self) -> "Lock":
        file = File(self._path, "append")
        try:
            self._take(file)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except BaseException:
            file.close()
            raise
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with self._file, suppress(OSError):
                self._file.truncate(0)

    def _take(self, file: File) -> None:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal(f"wait for it, or give another {self._flag}") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            if self._seems_held():
                raise self._refusal(f"if that process is gone, remove {self._path}") from None
        self.left_by = self._holder()

    def _refusal(self, hint: str) -> MachineError:
        return MachineError(f"{self._path.parent} is in use by {self._holder() or 'another process'}", hint=hint)

    def _holder(self) -> str:
        with suppress(OSError):
            return self._path.read_text(encoding="utf-8", errors="replace").strip()[:300]
        return ""

    def _seems_held(self) -> bool:
        """Whether the file names a process that may still be alive."""
        named = re.fullmatch(r"process (\d+) on (.+)", self._holder())
        if named is None:
            return False
        return named[2] != socket.gethostname() or _is_alive(int(named[1]))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
