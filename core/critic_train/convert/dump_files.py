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

TEXTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
COMPRESSIONS = (".gz", ".zst", ".zstd", ".bz2", ".xz")
BINARIES = (".pt", ".pth", ".pkl", ".pickle", ".parquet", ".parq", ".arrow")
SUFFIXES = (*BINARIES, *TEXTS, *(text + compression for text in TEXTS for compression in COMPRESSIONS))
METADATA = frozenset({
    "dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json", "meta.json", "metadata.json",
    "config.json", "generation_config.json", "trainer_state.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "result.json", "run.json",
})  # fmt: skip
"""Files that lie beside rollouts, as datasets' `save_to_disk` and trainers write them; a folder's are not read."""
SHOWN_FAULTS = 20


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
            hint=f"a source is a file, a glob, or a folder that holds {', '.join((*BINARIES, *TEXTS))} files; "
            f"texts may be compressed ({', '.join(COMPRESSIONS)})",
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
        files_below += [os.path.join(parent, name) for name in files if _is_wanted(name)]
    return files_below


def metadata_files(names: list[str]) -> list[str]:
    """The files of local folders that are not read because of their names (METADATA)."""
    folders = [os.path.expanduser(name) for name in names if not is_remote(name)]
    walked = [(parent, files) for folder in folders for parent, _, files in os.walk(folder)]
    return sorted(os.path.join(parent, name) for parent, files in walked for name in files if name in METADATA)


def _is_wanted(name: str) -> bool:
    return name.endswith(SUFFIXES) and not name.startswith((".", "_")) and name not in METADATA


def _why_none(name: str) -> str:
    if os.path.isdir(name):
        beside = metadata_files([name])
        return f"the folder holds no rollouts{f', only {os.path.basename(beside[0])}' if beside else ''}"
    if os.path.exists(name):
        return "neither a file nor a folder"
    return "no file matches" if glob.has_magic(name) else "there is no such file or folder"


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts step_2 before step_10."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdecimal() and len(part) < 20 else (0, 0, part) for part in parts]
