"""The files that a conversion reads: found in the order of their steps, JSON Lines a few megabytes at a time."""

import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from critic_train.convert.raw_records import BadRecord, Line
from critic_train.data.stores import RemoteFile, is_remote, open_file, remote_files
from critic_train.errors import DataError

SUFFIXES = (".pt", ".pth", ".pkl", ".pickle", ".jsonl", ".ndjson", ".json", ".parquet", ".parq")
SHOWN_FAULTS = 20
CHUNK_BYTES = 8 * 2**20
LONGEST_LINE = 2**28
"""Bytes; no record of one rollout is as long."""
EXPECTED_LINE = "one JSON object a line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file of a dump.

    Attributes:
        path: its path; for a file of a store, its name alone until it is fetched.
        name: as the user gave it, or its address in a store.
        remote: the file in its store, None for a local one.
    """

    path: Path
    name: str
    remote: RemoteFile | None = None

    @property
    def stamp(self) -> dict[str, Any]:
        """Size and time of the last change, JSON-able; equal as long as the file does not change."""
        if self.remote is not None:
            return {"bytes": self.remote.size_bytes, "modified_ns": self.remote.modified_ns}
        state = self.path.stat()
        return {"bytes": state.st_size, "modified_ns": state.st_mtime_ns}

    @contextmanager
    def local(self) -> Iterator["Source"]:
        """The source as a local file; one of a store is fetched, and removed when the block ends.

        Raises:
            MachineError: the store does not answer.
            OSError: the disk is full.
        """
        if self.remote is None:
            yield self
            return
        with tempfile.TemporaryDirectory(prefix="critic-train-") as folder:
            path = Path(folder) / self.path.name
            with open_file(self.remote.address) as remote, path.open("wb") as copy:
                shutil.copyfileobj(remote, copy, 2**20)
            yield replace(self, path=path, remote=None)


def find_sources(names: list[str]) -> list[Source]:
    """The files behind folders, files and globs, each once, sorted with numbers as numbers: step 2 before 10.

    Folders are searched recursively for files with one of SUFFIXES; names that begin with "." or "_" are left out. A
    file that is named is taken whatever its suffix.

    Raises:
        DataError: names that match no file; all are listed.
    """
    missing: list[str] = []
    sources: dict[str, Source] = {}
    for name in names:
        if is_remote(name):
            sources |= {source.name: source for source in _of_store(name, missing) if source.name not in sources}
            continue
        expanded = os.path.expanduser(name)
        files = _files(expanded)
        if not files:
            missing.append(f"{name}: {_why_none(expanded)}")
        for path in files:
            sources.setdefault(os.path.realpath(path), Source(path=Path(path), name=path))
    if missing:
        shown = missing[:SHOWN_FAULTS]
        if len(missing) > SHOWN_FAULTS:
            shown.append(f"and {len(missing) - SHOWN_FAULTS:,} more")
        raise DataError(
            "some sources cannot be found:\n" + "\n".join(f"  {line}" for line in shown),
            hint=f"a source is a file, a glob, or a folder that holds {', '.join(SUFFIXES)} files",
        )
    return sorted(sources.values(), key=lambda source: _natural(source.name))


def _of_store(address: str, missing: list[str]) -> list[Source]:
    try:
        files = remote_files(address, SUFFIXES)
    except DataError as error:
        missing.append(f"{error.message} ({error.hint})" if error.hint else error.message)
        return []
    if not files:
        missing.append(f"{address}: the store has no such file")
    return [Source(path=Path(PurePosixPath(file.address).name), name=file.address, remote=file) for file in files]


def _files(name: str) -> list[str]:
    if os.path.isdir(name):
        return _walk(name)
    if os.path.exists(name):
        return [name] if os.path.isfile(name) else []
    if not glob.has_magic(name):
        return []
    matches = glob.glob(name, recursive=True)
    files = [match for match in matches if os.path.isfile(match) and not os.path.basename(match).startswith("_")]
    with_suffix = [file for file in files if file.endswith(SUFFIXES)]
    return (with_suffix or files) + [file for match in matches if os.path.isdir(match) for file in _walk(match)]


def _walk(folder: str) -> list[str]:
    files_below: list[str] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        files_below += [
            os.path.join(parent, name) for name in files if name.endswith(SUFFIXES) and not name.startswith((".", "_"))
        ]
    return files_below


def _why_none(name: str) -> str:
    if os.path.isdir(name):
        return "the folder holds no such file"
    if os.path.exists(name):
        return "neither a file nor a folder"
    return "no file matches" if glob.has_magic(name) else "there is no such file or folder"


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts step_2 before step_10."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdecimal() and len(part) < 20 else (0, 0, part) for part in parts]


def line_chunks(path: Path) -> Iterator[tuple[list[Line], list[BadRecord], int]]:
    """The records of a JSON Lines file, some at a time.

    Records are numbered from 0; an empty line has a number, but is no record.

    Yields:
        Records, lines that are no JSON objects, and the bytes read so far.

    Raises:
        OSError: the file cannot be read.
    """
    good: list[Line] = []
    bad: list[BadRecord] = []
    with path.open("rb") as file:
        row, done, chunk = -1, 0, 0
        while line := file.readline(LONGEST_LINE):
            row += 1
            done += len(line)
            chunk += len(line)
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                bad.append(
                    BadRecord(row=row, column="", actual=f"more than {LONGEST_LINE:,} bytes", expected=EXPECTED_LINE)
                )
                done += _skip_line(file)
            elif line.strip():
                value = _parsed(line)
                if isinstance(value, dict):
                    good.append((row, value))
                else:
                    bad.append(BadRecord(row=row, column="", actual=value, expected=EXPECTED_LINE))
            if chunk >= CHUNK_BYTES:
                yield good, bad, done
                good, bad, chunk = [], [], 0
        yield good, bad, done


def _parsed(line: bytes) -> dict[str, Any] | str:
    """A line's object, or what it is instead."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"no JSON ({str(error)[:80]})"
    return value if isinstance(value, dict) else f"a {type(value).__name__}"


def first_record(path: Path) -> dict[str, Any] | None:
    """The first object of a JSON Lines file; None where the first line is none."""
    with path.open("rb") as file:
        for _ in range(100):
            line = file.readline(LONGEST_LINE)
            if line.strip():
                value = _parsed(line)
                return value if isinstance(value, dict) else None
    return None


def _skip_line(file: Any) -> int:
    skipped = 0
    while piece := file.readline(CHUNK_BYTES):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped
