"""The folder that `predict` writes to: who writes which part, with what it was begun, what is done."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from critic_train.data.shards import Shard
from critic_train.errors import ConfigError, MachineError
from critic_train.run.directory import refuse_changes
from critic_train.run.lock import Lock
from critic_train.run.storage import make_directory, remove, remove_tree, rename, sync_directory, write_file

RECORD = "predict.json"
WORK = ".predict"
"""Values of files that are not written yet, and locks; nothing is read from it when a folder is taken for rollouts."""


class OutputDirectory:
    """A part of an output folder held by this process, from `with` to its end.

    Args:
        path: the folder; created where it is missing.
        part: (K, N).
        places: shard name -> where it is written.

    Raises:
        MachineError: it cannot be written, or another process writes the same part.
    """

    def __init__(self, path: Path, part: tuple[int, int], places: dict[str, Path]) -> None:
        self.path = path
        self._places = places
        self._work = path / WORK
        self._name = f"part-{part[0]}-of-{part[1]}"
        self._lock = Lock(self._work / f"{self._name}.lock")

    def __enter__(self) -> "OutputDirectory":
        try:
            make_directory(self._work, exist_ok=True)
            self._lock.__enter__()
        except OSError as error:
            raise MachineError(f"{self.path} cannot be written: {error.strerror}", hint="give another --to") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.__exit__(kind, error, trace)
        if isinstance(error, OSError):
            told = f"{error.strerror or error}: {error.filename or self.path}"
            raise MachineError(told, hint="see to it and run the same command again") from error

    def compare(self, record: dict[str, Any]) -> list[str]:
        """Write what this is begun with, or hold it against what it was begun with.

        Returns:
            Notices about differences that are allowed.

        Raises:
            ConfigError: it was begun differently, or files stand there that are not of this job.
        """
        before = self._begun_with()
        if before is not None:
            return refuse_changes(before, record, self.path)
        strange = [place for place in self._places.values() if place.exists()]
        if strange:
            raise ConfigError(f"{strange[0]} stands there already", hint="give a folder of its own with --to")
        # Under a name of its own first: other parts may begin at the same moment, with the same record.
        temporary = self._work / f"{self._name}.json"
        write_file(temporary, json.dumps(record, indent=2, allow_nan=False).encode() + b"\n")
        rename(temporary, self.path / RECORD)
        sync_directory(self.path)
        return []

    def _begun_with(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.path / RECORD).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    def place(self, shard: Shard) -> Path:
        """Where a shard is written."""
        return self._places[shard.name]

    def is_written(self, shard: Shard) -> bool:
        """Whether it stands there: files stand whole or not at all."""
        return self.place(shard).is_file()

    def log(self, shard: Shard) -> Path:
        """Where a shard's values are kept meanwhile."""
        return self._work / self.place(shard).relative_to(self.path).with_suffix(".values")

    def forget(self, shard: Shard) -> None:
        """Remove what was kept of a shard."""
        remove(self.log(shard))

    def clear(self) -> None:
        """Remove what is no longer needed once all parts are done."""
        if all(place.is_file() for place in self._places.values()):
            remove_tree(self._work)
