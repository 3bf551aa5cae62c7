"""Faults at the n-th operation of a run's storage: the process dies, the disk is full, the power goes."""

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

from critic_train.run.storage import Operation, watched
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit

GIVES_ROOM = ("remove", "truncate", "rename", "library done")
"""What a full disk still does."""


class Dead(BaseException):
    """This process has been killed: nothing may be done any more, not even clearing up."""


@dataclass(slots=True)
class Dies:
    """A watcher that ends the process at operation `at`; with `torn`, that operation is half done.

    `really` sends SIGKILL; otherwise `Dead` is raised, then and at every later operation.
    """

    at: int
    torn: bool = True
    really: bool = False
    count: int = 0

    def __call__(self, operation: Operation) -> None:
        self.count += 1
        if self.count < self.at:
            return
        if self.count == self.at and self.torn:
            tear(operation)
        if self.really:
            os.kill(os.getpid(), signal.SIGKILL)
        raise Dead


def tear(operation: Operation) -> None:
    """Do half of a write, as a kill in the middle of it would."""
    if operation.kind == "write" and operation.data is not None:
        half = memoryview(operation.data)[: len(operation.data) // 2]
        with operation.path.open("r+b") as file:
            file.seek(operation.offset or 0, os.SEEK_END if operation.offset is None else os.SEEK_SET)
            file.write(half)
    elif operation.kind == "library done":
        for file_path in files_of(operation.path)[:1]:
            os.truncate(file_path, file_path.stat().st_size // 2)


def files_of(path: Path) -> list[Path]:
    """What a library has written: a file, or the files of a directory."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


@dataclass(slots=True)
class Fails:
    """A watcher that refuses operation `at` and the `times - 1` after it with an error number."""

    at: int
    number: int
    times: int = 1
    count: int = 0

    def __call__(self, operation: Operation) -> None:
        self.count += 1
        if self.at <= self.count < self.at + self.times and operation.kind not in GIVES_ROOM:
            raise OSError(self.number, os.strerror(self.number), str(operation.path))


@dataclass(slots=True)
class PowerCut:
    """A watcher that at operation `at` loses all content that was never synced: names stand, their data are zeros.

    Renames and removals count as done at once: the worst that a file system may make of the order.
    `safe` says for each file written how many of its first bytes are known to be on the disk.
    """

    at: int
    count: int = 0
    safe: dict[Path, int] = field(default_factory=dict)

    def __call__(self, operation: Operation) -> None:
        self.count += 1
        if self.count >= self.at:
            if self.count == self.at:
                self.cut()
            raise Dead
        kind, path = operation.kind, operation.path
        if kind == "append":
            self.safe.setdefault(path, path.stat().st_size if path.exists() else 0)
        elif kind == "create" or (kind in ("write", "truncate") and path not in self.safe) or operation.offset:
            self.safe[path] = 0
        elif kind == "sync" and path.is_file():
            self.safe[path] = path.stat().st_size
        elif kind == "library done":
            self.safe |= dict.fromkeys(files_of(path), 0)
        elif kind == "rename" and operation.target is not None:
            for old in [p for p in self.safe if p == path or path in p.parents]:
                self.safe[operation.target / old.relative_to(path)] = self.safe.pop(old)

    def cut(self) -> None:
        """Lose what was not synced."""
        for path, safe in self.safe.items():
            if path.is_file():
                size = path.stat().st_size
                os.truncate(path, min(safe, size))
                os.truncate(path, size)


def die(settings: FitSettings, at: int) -> None:
    """Run until the kernel kills this process at an operation; for a process of its own."""
    with watched(Dies(at=at, really=True)):
        list(fit(settings, StopRequest()))


def die_of_two_signals(settings: FitSettings, name: str) -> None:
    """Run under the program's signal handlers; SIGTERM comes twice while something of that name is synced."""
    from critic_train_cli.job import run_job
    from critic_train_cli.output import Output
    from critic_train_cli.plain_view import View

    def watch(operation: Operation) -> None:
        if operation.kind == "sync" and name in str(operation.path):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    output = Output(quiet=True)
    with watched(watch):
        run_job(lambda stop: fit(settings, stop), View(output, stopping="stopping"), output)
