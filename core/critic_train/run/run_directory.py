"""A run's directory: its lock, its records and its logs. Rank 0 holds it; the other ranks read it."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from critic_train.errors import ConfigError, MachineError
from critic_train.jsonio import read_json_object_or_none
from critic_train.run.checkpoint import checkpoint_name, hidden
from critic_train.run.lock import Lock
from critic_train.run.storage import (
    File,
    first_data_file,
    link,
    make_directory,
    remove,
    remove_tree,
    rename,
    rename_durably,
    sync_directory,
    write_json,
)

LONGEST_LINE = 2**20
"""No line of a log is longer, in bytes."""


class RunDirectory:
    """A run directory, locked by this process inside the `with` block.

    Args:
        path: the directory; created where it is missing.

    Attributes:
        warnings: what could not be removed, as text; the reader clears the list.

    Raises:
        ConfigError: it holds data or weights, and no run.
        MachineError: it cannot be written, or another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.cache = path / "cache"
        self._metrics: File | None = None
        self._timings: File | None = None
        self._lock = Lock(path / ".lock")
        self.warnings: list[str] = []

    def __enter__(self) -> "RunDirectory":
        begun = [name for name in ("run.json", "metrics.jsonl", "checkpoints", "cache") if (self.path / name).exists()]
        strange = None if begun else first_data_file(self.path)
        if strange is not None:
            raise ConfigError(
                f"--out {self.path} holds other data: {strange.relative_to(self.path)}",
                hint=f"give the run a folder of its own, as in --out {self.path / 'run'}",
            )
        try:
            make_directory(self.checkpoints, exist_ok=True)
            self._lock.__enter__()
        except OSError as error:
            raise MachineError(
                f"the run directory {self.path} cannot be written: {error.strerror}",
                hint="give a directory that can be written to with --out",
            ) from error
        try:
            for leftover in (*self.checkpoints.glob(".*.tmp-*"), *self.cache.glob(".*.tmp-*")):
                self._clear(leftover)
        except BaseException as error:
            self._lock.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._metrics, self._timings):
            if file is not None:
                file.close()
        self._lock.__exit__(kind, error, trace)
        if isinstance(error, OSError):
            raise MachineError(self._refused(error), hint="see to it and run the same command again") from error

    def _refused(self, error: OSError) -> str:
        if not self.path.is_dir():
            return f"the run directory {self.path} vanished while the run was going"
        return f"{error.strerror or error}: {error.filename or self.path}"

    def _clear(self, folder: Path) -> None:
        error = remove_tree(folder)
        if error is not None:
            self.warnings.append(f"{folder} cannot be removed: {error.strerror or error}; it is no longer needed")

    @property
    def left_by(self) -> str:
        """The process that held the run last, if it was killed or crashed; else empty."""
        return self._lock.left_by

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON object of the run (`run.json`, `result.json`), None where it is missing or cannot be read."""
        return read_json_object_or_none(self.path / name)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON object atomically."""
        write_json(self.path / name, value)

    def start_afresh(self) -> None:
        """Remove the results of an earlier start and its checkpoint of step 0; its cached rollouts stay."""
        first = self.checkpoints / checkpoint_name(0)
        if first.is_dir():  # renamed before it is removed: half removed it must not look like a damaged one
            rename(first, hidden(first))
            self._clear(hidden(first))
        for name in ("result.json", "best", "timings.jsonl", "evaluation.json", "report.html"):
            remove(self.path / name)
        for column in (*self.cache.glob("*/old_values-*"), *self.cache.glob("*/state-rows")):
            remove(column)

    def reopen(self) -> None:
        """Remove the result of a finished run that is made longer."""
        remove(self.path / "result.json")
        sync_directory(self.path)

    def drop_cache(self) -> None:
        """Remove the cache, which can be made again from the shards; files that cannot be removed are warned of."""
        self._clear(self.cache)

    def open_logs(self, metrics_bytes: int) -> None:
        """Open the logs for appending, metrics.jsonl truncated to its size at the resumed checkpoint."""
        self._metrics = File(self.path / "metrics.jsonl", "append")
        # Never lengthen: a log that was shortened by hand would be filled up with NUL bytes.
        self._metrics.truncate(min(metrics_bytes, self._metrics.size))
        self._timings = File(self.path / "timings.jsonl", "append")
        end = _end_of_last_line(self.path / "timings.jsonl")
        if end < self._timings.size:  # a kill in the middle of a line
            self._timings.truncate(end)
        sync_directory(self.path)

    def log_metrics(self, record: dict[str, Any]) -> None:
        """Append one reproducible record."""
        _append(self._metrics, record)

    def log_timing(self, record: dict[str, Any]) -> None:
        """Append one record of seconds, speed and memory, which differ from run to run."""
        _append(self._timings, record)

    def synced_metrics_bytes(self) -> int:
        """Sync metrics.jsonl and return its size."""
        assert self._metrics is not None
        self._metrics.sync()
        return self._metrics.size

    def point_best_at(self, checkpoint: Path) -> None:
        """Make `best` a link to a checkpoint, atomically."""
        temporary = self.path / ".best.tmp"
        remove(temporary)
        link(temporary, Path("checkpoints") / checkpoint.name)
        rename_durably(temporary, self.path / "best")

    @property
    def best(self) -> Path | None:
        """The checkpoint that `best` links to, None where there is none."""
        link = self.path / "best"
        target = self.checkpoints / link.readlink().name if link.is_symlink() else None
        return target if target is not None and target.is_dir() else None


def _end_of_last_line(path: Path) -> int:
    """Bytes up to the end of the last complete line."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - LONGEST_LINE))
        tail = file.read()
    return size - len(tail) + tail.rfind(b"\n") + 1


def _append(file: File | None, record: dict[str, Any]) -> None:
    assert file is not None, "open_logs comes first"
    file.write(json.dumps(record, allow_nan=False).encode() + b"\n")


class ReadOnlyRun(RunDirectory):
    """The run directory on the other ranks, which write nothing. Its file system is shared by all ranks."""

    def __enter__(self) -> "ReadOnlyRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """There is no lock to release."""

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Rank 0 does."""

    def start_afresh(self) -> None:
        """Rank 0 does."""

    def drop_cache(self) -> None:
        """Rank 0 does."""

    def open_logs(self, metrics_bytes: int) -> None:
        """Rank 0 does."""

    def log_metrics(self, record: dict[str, Any]) -> None:
        """Rank 0 does."""

    def log_timing(self, record: dict[str, Any]) -> None:
        """Rank 0 does."""

    def point_best_at(self, checkpoint: Path) -> None:
        """Rank 0 does."""
