"""The files that a conversion reads, in the order of their steps."""

import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from critic_train.data.stores import RemoteFile, is_remote, open_file, remote_files
from critic_train.errors import DataError

SUFFIXES = (".pt", ".pth", ".pkl", ".pickle", ".jsonl", ".ndjson", ".json", ".parquet", ".parq")
SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file of a dump, known by its name as the user gave it.

    Attributes:
        path: where it is; for a file of a store, its name alone until it is fetched.
        name: as the user gave it, or its address in a store.
        remote: the file in its store, None where it is here.
    """

    path: Path
    name: str
    remote: RemoteFile | None = None

    @property
    def stamp(self) -> dict[str, Any]:
        """What tells this file from a changed one, JSON-able."""
        if self.remote is not None:
            return {"bytes": self.remote.size_bytes, "modified_ns": self.remote.modified_ns}
        state = self.path.stat()
        return {"bytes": state.st_size, "modified_ns": state.st_mtime_ns}

    @contextmanager
    def here(self) -> Iterator["Source"]:
        """The source as a file of this machine; one of a store is fetched, and removed when the block ends.

        Raises:
            MachineError: the store does not answer.
            OSError: the disk is full.
        """
        if self.remote is None:
            yield self
            return
        with tempfile.TemporaryDirectory(prefix="critic-train-") as folder:
            path = Path(folder) / self.path.name
            with open_file(self.remote.address) as given, path.open("wb") as kept:
                shutil.copyfileobj(given, kept, 2**20)
            yield replace(self, path=path, remote=None)


def find_sources(names: list[str]) -> list[Source]:
    """The files behind folders, files and globs, each once; numbers in names count as numbers: step 2 before 10.

    Folders are searched all the way down for files with one of SUFFIXES; names that begin with "." or "_" are left
    out. A file that is named is taken whatever its name.

    Raises:
        DataError: something is missing, or there is no file at all; all of it is listed.
    """
    faults: list[str] = []
    found: dict[str, Source] = {}
    for name in names:
        if is_remote(name):
            found |= {source.name: source for source in _of_store(name, faults) if source.name not in found}
            continue
        expanded = os.path.expanduser(name)
        files = _files(expanded)
        if not files:
            faults.append(f"{name}: {_why_none(expanded)}")
        for path in files:
            found.setdefault(os.path.realpath(path), Source(path=Path(path), name=path))
    if faults:
        shown = faults[:SHOWN] + ([f"and {len(faults) - SHOWN:,} more"] if len(faults) > SHOWN else [])
        raise DataError(
            "some sources cannot be found:\n" + "\n".join(f"  {line}" for line in shown),
            hint=f"a source is a file, a glob, or a folder that holds {', '.join(SUFFIXES)} files",
        )
    return sorted(found.values(), key=lambda source: _natural(source.name))


def _of_store(address: str, faults: list[str]) -> list[Source]:
    try:
        files = remote_files(address, SUFFIXES)
    except DataError as error:
        faults.append(f"{error.message} ({error.hint})" if error.hint else error.message)
        return []
    if not files:
        faults.append(f"{address}: the store has no such file")
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
    known = [file for file in files if file.endswith(SUFFIXES)]
    return (known or files) + [file for match in matches if os.path.isdir(match) for file in _walk(match)]


def _walk(folder: str) -> list[str]:
    found: list[str] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        found += [
            os.path.join(parent, name) for name in files if name.endswith(SUFFIXES) and not name.startswith((".", "_"))
        ]
    return found


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
