"""The folder that a conversion writes: shards of finished sources, and a record of which source each is from."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from critic_train.data.writing import ROW_GROUP_BYTES, ShardWriter
from critic_train.errors import ConfigError
from critic_train.run.lock import Lock
from critic_train.run.storage import make_directory, remove, rename_durably, write_json

RECORD = "_convert.json"
"""Begins with an underscore, so that readers of shards skip it."""
MADE_BY = "critic-train convert"
VERSION = 1
STAGED = "part-x"
"""What shards of another process begin with until they are recorded; behind it, the source's place among all."""
ORDER = (pa.null(), pa.bool_(), pa.int64(), pa.float64(), pa.string())
"""Types of columns with one entry a rollout, from narrow to wide."""


class ConvertedFolder:
    """A folder of shards made from sources, locked by this process for the `with` block.

    Every source has shards of its own, recorded once all of them are written. What a stopped conversion left unrecorded
    is removed; what is recorded is not converted again.

    Args:
        path: the folder; created where it is missing.
        settings: those that change the shards.

    Raises:
        ConfigError: the folder holds something else, or was made with other settings.
        MachineError: another process writes to it.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.sources: list[dict[str, Any]] = []
        self._settings = settings

    def __enter__(self) -> "ConvertedFolder":
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--to {self.path} is a file", hint="give a folder, new or empty")
        recorded = _read_record(self.path / RECORD)
        if recorded is None and self.path.is_dir() and any(entry.name != ".lock" for entry in self.path.iterdir()):
            raise ConfigError(
                f"--to {self.path} holds something that critic-train convert did not make",
                hint="give a folder that is new or empty",
            )
        if recorded is not None:
            self._resume(recorded)
        make_directory(self.path, exist_ok=True)
        self._lock = Lock(self.path / ".lock").__enter__()
        self._write_record()
        self._remove_leftovers()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.__exit__(kind, error, trace)

    def recorded(self, name: str, stamp: dict[str, Any]) -> dict[str, Any] | None:
        """The entry of a source; None where it is new, has changed or lacks a shard. Outdated shards are removed."""
        for number, source in enumerate(self.sources):
            if source["name"] == name:
                is_complete = all((self.path / shard).is_file() for shard in source["shards"])
                if source["stamp"] == stamp and is_complete:
                    return source
                for shard in source["shards"]:
                    remove(self.path / shard)
                self.sources[number] = {**source, "shards": [], "stamp": None}
                return None
        return None

    def number_of(self, name: str) -> int:
        """The number in the names of a source's shards."""
        names = [source["name"] for source in self.sources]
        return names.index(name) if name in names else len(names)

    def prefix_of(self, name: str) -> str:
        """What the names of a source's shards begin with."""
        return f"part-{self.number_of(name):05d}"

    def record(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Record a source whose shards are written (`name`, `stamp`, `shards`, counts); the entry as it is recorded.

        Shards that another process wrote under a name of its own are renamed.
        """
        number, prefix = self.number_of(entry["name"]), self.prefix_of(entry["name"])
        shards = [f"{prefix}-{shard.rpartition('-')[2]}" for shard in entry["shards"]]
        for shard, name in zip(entry["shards"], shards, strict=True):
            if shard != name:
                rename_durably(self.path / shard, self.path / name)
        self.sources[number : number + 1] = [{**entry, "shards": shards}]
        self._write_record()
        return self.sources[number]

    def _resume(self, recorded: dict[str, Any]) -> None:
        if recorded.get("made_by") != MADE_BY or recorded.get("version") != VERSION:
            raise ConfigError(f"{self.path / RECORD} is of another version of critic-train", hint="give a new folder")
        before = recorded["settings"]
        # What an earlier version did not know had its default.
        changed = [name for name in self._settings if (before.get(name) or None) != (self._settings[name] or None)]
        if changed and recorded["sources"]:
            lines = [f"  {name} was {before.get(name)}, is now {self._settings[name]}" for name in changed]
            raise ConfigError(
                f"--to {self.path} holds a conversion with other settings:\n" + "\n".join(lines),
                hint="run the same command to go on with it, or give another folder",
            )
        self.sources = recorded["sources"]

    def _remove_leftovers(self) -> None:
        recorded = {shard for source in self.sources for shard in source["shards"]}
        for path in self.path.iterdir():
            is_shard = path.suffix == ".parquet" and path.name.startswith("part-") and path.name not in recorded
            if is_shard or (path.name.startswith(".part-") and ".tmp-" in path.name):
                remove(path)

    def _write_record(self) -> None:
        record = {"made_by": MADE_BY, "version": VERSION, "settings": self._settings, "sources": self.sources}
        write_json(self.path / RECORD, record)


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


@dataclass(slots=True)
class SourceShards:
    """The shards of one source while they are written. Where columns or their types change, a new one begins.

    Args:
        folder: of the conversion.
        prefix: what the shards' names begin with.
        row_group_bytes: Arrow bytes of a row group.

    Attributes:
        rollouts, tokens, response_tokens: written so far.
        columns: names of all columns.
        files: the shards that are finished.
    """

    folder: Path
    prefix: str
    row_group_bytes: int = ROW_GROUP_BYTES
    rollouts: int = 0
    tokens: int = 0
    response_tokens: int = 0
    files: list[Path] = field(default_factory=list)
    _schema: pa.Schema | None = None
    _writer: ShardWriter | None = None

    @property
    def columns(self) -> list[str]:
        """Names of all columns, in order."""
        return [] if self._schema is None else list(self._schema.names)

    def write(self, table: pa.Table) -> None:
        """Add rollouts."""
        schema = table.schema if self._schema is None else _unified(self._schema, table.schema)
        if self._writer is None or schema != self._schema:
            self._close()
            self._schema = schema
            self._writer = ShardWriter(
                self.folder,
                schema,
                keep_together="uid" if "uid" in schema.names else None,
                prefix=self.prefix,
                first=len(self.files),
                row_group_bytes=self.row_group_bytes,
            ).__enter__()
        self._writer.write(_cast(schema, table))
        self.rollouts += table.num_rows
        self.tokens += _count_items(table, "input_ids")
        self.response_tokens += _count_ones(table)

    def __enter__(self) -> "SourceShards":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._close()
        elif self._writer is not None:
            self._writer.__exit__(kind, error, trace)

    def drop(self) -> None:
        """Remove all shards of the source."""
        if self._writer is not None:
            self._writer.abandon()
        self._close()
        for path in self.files:
            remove(path)
        self.files = []

    def _close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.__exit__(None, None, None)
            self.files += writer.files


def _unified(before: pa.Schema, more: pa.Schema) -> pa.Schema:
    """The columns of `more`, and those of `before` with one entry a rollout; of the wider type where they differ.

    Token columns of `before` alone are left out: null lists would make rows that cannot be used.
    """
    fields = {one.name: one.type for one in before if one.name in more.names or not pa.types.is_nested(one.type)}
    for one in more:
        have = fields.get(one.name, one.type)
        fields[one.name] = have if have == one.type else _wider(have, one.type)
    return pa.schema(fields)


def _wider(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    if one in ORDER and other in ORDER:
        kinds = ORDER.index(one), ORDER.index(other)
        # A boolean beside another type becomes text.
        return pa.string() if 1 in kinds and min(kinds) else ORDER[max(kinds)]
    return pa.string()


def _cast(schema: pa.Schema, table: pa.Table) -> pa.Table:
    arrays = [
        table.column(one.name).cast(one.type) if one.name in table.column_names else pa.nulls(len(table), one.type)
        for one in schema
    ]
    return pa.table(arrays, schema=schema)


def _count_items(table: pa.Table, name: str) -> int:
    return sum(len(chunk.flatten()) for chunk in table.column(name).chunks)


def _count_ones(table: pa.Table) -> int:
    return sum(chunk.flatten().true_count for chunk in table.column("response_mask").chunks)
