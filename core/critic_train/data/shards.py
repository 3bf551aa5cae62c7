"""Find Parquet shards, and say all that is wrong with them at once."""

import glob
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from critic_train.errors import DataError

SUFFIXES = (".parquet", ".parq")
TAIL_BYTES = 8
"""A Parquet file ends with the length of its footer (4 bytes) and `PAR1`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One Parquet file, one row a rollout.

    Attributes:
        path: where it is.
        name: how it is named to people.
        num_rows: rows, by its footer.
        num_row_groups: row groups, by its footer.
        size_bytes: its size on disk.
        footer_digest: SHA-256 of the footer, which holds sizes, offsets and statistics of every page run.
    """

    path: str
    name: str
    num_rows: int
    num_row_groups: int
    size_bytes: int
    footer_digest: str


def find_shards(sources: list[str]) -> list[Shard]:
    """Find and open every shard.

    Args:
        sources: folders (searched to any depth), files or globs. Names that start with . or _ are passed over in
            folders. A file that is named twice counts once.

    Returns:
        The shards, sorted by path.

    Raises:
        DataError: a source is missing or empty, a file is no whole Parquet file, or there are no rows at all. All
            such files are named in one message.
    """
    wrong: list[str] = []
    paths: dict[str, str] = {}
    for source in sources:
        found = _paths_of(source)
        if not found:
            missing = not os.path.lexists(source) and not glob.has_magic(source)
            wrong.append(f"{source}: " + ("there is no such file or folder" if missing else "no .parquet files there"))
        for path in found:
            paths.setdefault(os.path.realpath(path), path)
    shards: list[Shard] = []
    for path in sorted(paths.values()):
        try:
            shards.append(_open(path))
        except (OSError, pa.ArrowException, ValueError) as error:
            wrong.append(f"{path}: {_why(path, error)}")
    if wrong:
        many = f"{len(wrong)} sources of rollouts cannot be read:\n" if len(wrong) > 1 else ""
        raise DataError(
            many + "\n".join(f"  {line}" if many else line for line in wrong),
            hint="--data takes folders, Parquet files and globs; a half-copied file must be copied again",
        )
    if not any(shard.num_rows for shard in shards):
        raise DataError(f"{', '.join(s.name for s in shards[:5])}: no rows in any file", hint="check the dump")
    return shards


def fingerprint(shards: list[Shard]) -> dict[str, Any]:
    """What identifies the content of some shards, wherever they lie; JSON-able.

    Returns:
        {"digest": over all, "files": [{"name", "bytes", "rows", "footer_sha256"}]}; names are relative to the
        folder that all shards have in common.
    """
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(s.path)) for s in shards])
    files = [
        {
            "name": os.path.relpath(os.path.abspath(s.path), folder),
            "bytes": s.size_bytes,
            "rows": s.num_rows,
            "footer_sha256": s.footer_digest,
        }
        for s in shards
    ]
    return {"digest": hashlib.sha256(json.dumps(files).encode()).hexdigest(), "files": files}


def _paths_of(source: str) -> list[str]:
    if os.path.isdir(source):
        return sorted(
            str(path)
            for path in Path(source).rglob("*")
            if path.suffix in SUFFIXES
            and path.is_file()
            and not any(part[0] in "._" for part in path.relative_to(source).parts)
        )
    if os.path.lexists(source):
        return [source]
    return sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))


def _open(path: str) -> Shard:
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - TAIL_BYTES))
        tail = file.read(TAIL_BYTES)
        footer_bytes = int.from_bytes(tail[:4], "little")
        if size < TAIL_BYTES + 4 or tail[4:] != b"PAR1" or footer_bytes > size - TAIL_BYTES:
            raise ValueError("no Parquet footer")
        file.seek(size - TAIL_BYTES - footer_bytes)
        digest = hashlib.sha256(file.read(footer_bytes)).hexdigest()
    with pq.ParquetFile(path) as parquet:
        meta = parquet.metadata
        return Shard(
            path=path,
            name=path,
            num_rows=meta.num_rows,
            num_row_groups=meta.num_row_groups,
            size_bytes=size,
            footer_digest=digest,
        )


def _why(path: str, error: BaseException) -> str:
    if isinstance(error, PermissionError):
        return "permission denied"
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return "the file is empty"
    if isinstance(error, ValueError) and not isinstance(error, pa.ArrowException):
        return "no Parquet file, or one that was cut off (its end is missing)"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
