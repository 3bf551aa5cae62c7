"""A run's directory: who holds it, what it was started with, what it has logged."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from critic_train.errors import ConfigError, MachineError
from critic_train.json_files import read_object
from critic_train.run.durable import write_json
from critic_train.run.lock import Lock
from critic_train.run.storage import File, link, make_directory, remove, remove_tree, rename, sync_directory
from critic_train.settings import flag_of

RESUMABLE = frozenset(
    {
        "log_every",
        "keep",
        "checkpoint_every",
        "out",
        "data",
        "val_data",
        "model",
        "log_to",
        "log_project",
        "patience",
        "no_report",
        "nproc",
    }
)
"""Settings that may differ when a run is resumed: they change nothing in its result. Paths are among them because
what they lead to is held by fingerprints."""

ROUNDING_ONLY = frozenset({"max_tokens", "device", "attention", "activation_checkpointing", "compile"})
"""Settings that may differ at the price of bit-identity: sums are taken in another order."""


class RunDirectory:
    """A run directory held by this process, from `with` to its end.

    Args:
        path: the directory; created where it is missing.

    Attributes:
        warnings: what could not be cleared away, in words; whoever tells of them takes them out.

    Raises:
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
        try:
            make_directory(self.checkpoints, exist_ok=True)
            self._lock.__enter__()
        except OSError as error:
            raise MachineError(
                f"the run directory {self.path} cannot be written: {error.strerror}",
                hint="give a place that can be written to with --out",
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
        """The process that held the run last, where it ended without letting go; empty where none did."""
        return self._lock.left_by

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON object of the run (`run.json`, `result.json`), None where it does not stand or cannot be read."""
        try:
            return read_object(self.path / name)
        except (OSError, ValueError):
            return None

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Put a JSON object under its name, whole or not at all."""
        write_json(self.path / name, value)

    def start_afresh(self) -> None:
        """Remove what an earlier start left that another one must not take for its own. Rollouts may stay cached."""
        for name in ("result.json", "best", "timings.jsonl", "evaluation.json", "report.html"):
            remove(self.path / name)
        for column in (*self.cache.glob("*/old_values-*"), *self.cache.glob("*/state-rows")):
            remove(column)

    def drop_cache(self) -> None:
        """Remove what can be made again from the shards; whatever cannot be removed stays."""
        self._clear(self.cache)

    def open_logs(self, metrics_bytes: int) -> None:
        """Open metrics.jsonl for appending, cut back to where the resumed checkpoint left it."""
        self._metrics = File(self.path / "metrics.jsonl", "append")
        # Never lengthen: a log that somebody has cut would be filled up with NUL bytes.
        self._metrics.truncate(min(metrics_bytes, self._metrics.size))
        self._timings = File(self.path / "timings.jsonl", "append")
        sync_directory(self.path)

    def log_metrics(self, record: dict[str, Any]) -> None:
        """Append one reproducible record."""
        _append(self._metrics, record)

    def log_timing(self, record: dict[str, Any]) -> None:
        """Append one record of what differs from run to run: seconds, speed, memory."""
        _append(self._timings, record)

    def synced_metrics_bytes(self) -> int:
        """Put metrics.jsonl on the disk and say how long it is."""
        assert self._metrics is not None
        self._metrics.sync()
        return self._metrics.size

    def point_best_at(self, checkpoint: Path) -> None:
        """Make `best` a link to a checkpoint, at once."""
        temporary = self.path / ".best.tmp"
        remove(temporary)
        link(temporary, Path("checkpoints") / checkpoint.name)
        rename(temporary, self.path / "best")
        sync_directory(self.path)

    @property
    def best(self) -> Path | None:
        """The checkpoint that `best` points at, None where it points at nothing."""
        link = self.path / "best"
        target = self.checkpoints / link.readlink().name if link.is_symlink() else None
        return target if target is not None and target.is_dir() else None


def refuse_changes(before: dict[str, Any], now: dict[str, Any], out: Path, flag: str = "--out") -> list[str]:
    """Compare what a run was started with and what it is asked to go on with.

    Args:
        before: run.json.
        now: the same of this command; what it does not name is not compared.
        out: the run directory, for the message.
        flag: how another one is given.

    Returns:
        Notices about changes that are allowed.

    Raises:
        ConfigError: something changed that the result depends on; every such thing is named.
    """
    refused: list[str] = []
    notices: list[str] = []
    old, new = before.get("settings", {}), now["settings"]
    for name in new:
        if name in RESUMABLE or old.get(name) == new[name]:
            continue
        line = f"{flag_of(name)} was {_shown(old.get(name))}, is now {_shown(new[name])}"
        if name in ROUNDING_ONLY:
            notices.append(f"{line}: the result may differ from the undisturbed run's by rounding")
        else:
            refused.append(line)
    for name, what in (("data", "rollouts"), ("val_data", "held-out rollouts"), ("model", "base model")):
        if name in now and before.get(name) != now[name]:
            refused.append(f"the {what} changed since the run began")
    for name, what in (
        ("versions", "library versions"),
        ("threads", "number of threads"),
        ("ranks", "number of ranks"),
    ):
        if name in now and before.get(name, now[name]) != now[name]:
            notices.append(f"the {what} changed since the run began: the result may differ by rounding")
    if refused:
        raise ConfigError(
            f"{out} holds a run that was started differently:\n" + "\n".join(f"  {line}" for line in refused),
            hint=f"run the same command to resume it, or give this one another {flag}",
        )
    return notices


def _shown(value: object) -> str:
    return "not set" if value is None else str(value)


def _append(file: File | None, record: dict[str, Any]) -> None:
    assert file is not None, "open_logs comes first"
    file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
