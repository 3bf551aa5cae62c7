"""A folder that shards are written to: who writes which part, with what it was begun, what is done."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from critic_train.errors import ConfigError, MachineError
from critic_train.run.changes import refuse_changes
from critic_train.run.lock import Lock
from critic_train.run.storage import make_directory, remove_tree, rename, sync_directory, write_file


class OutputDirectory:
    """A part of an output folder held by this process, from `with` to its end.

    Args:
        path: the folder; created where it is missing.
        command: the command that writes it, as in "predict": PATH/_predict.json says how it was begun, and
            PATH/.predict holds locks and whatever is kept until the files stand. Names that begin so are passed over
            by whoever reads the folder as Parquet: Arrow, Spark and critic-train.
        places: key -> a file that will be written, of all parts.
        part: (K, N), of which this process is the K-th.

    Attributes:
        path: the folder.
        work: where to keep what is needed until the files stand.

    Raises:
        MachineError: it cannot be written, or another process writes the same part.
    """

    def __init__(self, path: Path, command: str, places: dict[str, Path], part: tuple[int, int] = (1, 1)) -> None:
        self.path = path
        self._places = places
        self._alone = part[1] == 1
        self._record = path / f"_{command}.json"
        self.work = path / f".{command}"
        self._name = f"part-{part[0]}-of-{part[1]}"
        self._lock = Lock(self.work / f"{self._name}.lock", "--to")

    def __enter__(self) -> "OutputDirectory":
        try:
            make_directory(self.work, exist_ok=True)
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
            return refuse_changes(before, record, self.path, "--to")
        strange = [place for place in self._places.values() if place.exists()]
        if strange:
            raise ConfigError(f"{strange[0]} stands there already", hint="give a folder of its own with --to")
        # Under a name of its own first: other parts may begin at the same moment, with the same record.
        temporary = self.work / f"{self._name}.json"
        write_file(temporary, json.dumps(record, indent=2, allow_nan=False).encode() + b"\n")
        rename(temporary, self._record)
        sync_directory(self.path)
        return []

    def _begun_with(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self._record).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    def is_written(self, key: str) -> bool:
        """Whether a file stands: files stand whole or not at all."""
        return self._places[key].is_file()

    def clear(self) -> None:
        """Remove what this process no longer needs; with several parts, once the files of all of them stand."""
        if self._alone or all(place.is_file() for place in self._places.values()):
            remove_tree(self.work)
