"""The files that a conversion reads, in the order of their steps."""

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from critic_train.errors import DataError

SUFFIXES = (".pt", ".pth", ".pkl", ".pickle", ".jsonl", ".ndjson", ".json", ".parquet", ".parq")
SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file of a dump, known by its name as the user gave it."""

    path: Path
    name: str

    @property
    def stamp(self) -> dict[str, Any]:
        """What tells this file from a changed one, JSON-able."""
        state = self.path.stat()
        return {"bytes": state.st_size, "modified_ns": state.st_mtime_ns}


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
