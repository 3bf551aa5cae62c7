"""Finding the Parquet files of a data set and telling one data set from another."""

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from critic_train.data.bad_input import BadFile, BadFiles
from critic_train.data.parquet_footer import MAGIC, FooterError, read_footer
from critic_train.data.stores import is_remote, open_file, remote_files
from critic_train.errors import DataError, first_line

SUFFIXES = (".parquet", ".parq")
SHOWN = 20
SAMPLES = 256
SAMPLE_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One Parquet file of rollouts, known by its footer alone.

    Attributes:
        path: absolute path, or the address in a store, as opened.
        name: the path as the user gave it, for messages.
        num_rows: rows in the file.
        num_row_groups: row groups in the file.
        size_bytes: size of the file.
        footer_digest: SHA-256 (hex) of the Parquet footer, which holds the schema, the counts, the place and
            size of every column chunk and usually each column's extremes.
    """

    path: str
    name: str
    num_rows: int
    num_row_groups: int
    size_bytes: int
    footer_digest: str


def find_shards(sources: list[str], bad_files: BadFiles | None = None) -> list[Shard]:
    """The Parquet files behind folders, files and globs, sorted by path, each once.

    Folders are searched all the way down for *.parquet and *.parq; names that start with "." or "_" are
    left out. Only footers are read, so this is quick however large the files are.

    Args:
        sources: paths or globs; `~` is expanded.
        bad_files: takes the files whose footer cannot be read, for a reader that goes on without them or finds
            the others first; without it they are an error.

    Raises:
        DataError: a source leads nowhere, a file is unreadable or no Parquet, or there is not one row. Every such
            source and file is listed at once.
    """
    faults: list[str] = []
    found: dict[str, str] = {}
    for source in sources:
        names = list(_remote_names(source, faults) if is_remote(source) else _names(os.path.expanduser(source), faults))
        for name in names:
            found.setdefault(name if is_remote(name) else os.path.realpath(name), name)
    shards: list[Shard] = []
    for name in sorted(found.values(), key=place_of):
        try:
            shards.append(_shard(name))
        except (FooterError, pa.ArrowException, UnicodeDecodeError, OSError) as fault:
            bad = BadFile(file=name, fault=_reason(fault))
            if bad_files is None:
                faults.append(f"{bad.file}: {bad.fault}")
            else:
                bad_files.add(bad)
    if faults:
        shown = faults[:SHOWN] + ([f"and {len(faults) - SHOWN:,} more"] if len(faults) > SHOWN else [])
        raise DataError(
            "some of the data cannot be read:\n" + "\n".join(f"  {line}" for line in shown),
            hint="--data takes folders, Parquet files and globs; mend, replace or remove what is listed",
        )
    if bad_files and not any(shard.num_rows for shard in shards):
        raise bad_files.error(all_of_them=True)
    if not any(shard.num_rows for shard in shards):
        listed = ", ".join(shard.name for shard in shards[:SHOWN])
        raise DataError(f"there is not one row in {listed}", hint="point --data at files that hold rollouts")
    return shards


def fingerprint(shards: list[Shard]) -> dict[str, Any]:
    """What tells one data set from another, JSON-able; moving the whole folder does not change it.

    A footer does not change where a number in the middle does, so the content is read as well: all of it up to
    SAMPLES * SAMPLE_BYTES (16 MiB) a file, and that much in even steps of larger ones.

    Returns:
        {"files": [{"name", "bytes", "rows", "footer", "content"}, ...], "digest": SHA-256 hex over all of them}, names
        relative to the folder that all files share.
    """
    places = [place_of(shard.path) for shard in shards]
    folder = os.path.commonpath([os.path.dirname(place) for place in places]) if places else ""
    files = [
        {
            "name": os.path.relpath(place, folder).replace(os.sep, "/"),
            "bytes": shard.size_bytes,
            "rows": shard.num_rows,
            "footer": shard.footer_digest,
            "content": _content(shard),
        }
        for shard, place in zip(shards, places, strict=True)
    ]
    text = json.dumps(files, sort_keys=True, separators=(",", ":"))
    return {"files": files, "digest": hashlib.sha256(text.encode()).hexdigest()}


def _names(source: str, faults: list[str]) -> Iterator[str]:
    """Files behind one source; what is wrong with the source itself goes to `faults`."""
    if os.path.isdir(source):
        names = list(_walk(source))
        if not names:
            faults.append(f"{source}: the folder holds no .parquet file")
        yield from names
    elif os.path.isfile(source):
        yield source
    elif os.path.exists(source):
        faults.append(f"{source}: neither a file nor a folder")
    elif glob.has_magic(source):
        yield from _matches(source, faults)
    else:
        faults.append(f"{source}: there is no such file or folder")


def _remote_names(source: str, faults: list[str]) -> Iterator[str]:
    """Files behind an address of a store."""
    try:
        names = [file.address for file in remote_files(source, SUFFIXES)]
    except DataError as error:
        faults.append(f"{error.message} ({error.hint})" if error.hint else error.message)
        return
    if not names:
        faults.append(f"{source}: the store has no Parquet file there")
    yield from names


def place_of(path: str) -> str:
    """An absolute path, also of an address: what shards are sorted and told apart by."""
    return "/" + path.replace("://", "/", 1) if is_remote(path) else os.path.abspath(path)


def _matches(pattern: str, faults: list[str]) -> Iterator[str]:
    matches = sorted(glob.glob(pattern, recursive=True))
    files = [match for match in matches if os.path.isfile(match)]
    # `data/*` is meant for the Parquet files, not for the README beside them.
    names = [name for name in files if name.endswith(SUFFIXES)]
    for match in matches:
        if os.path.isdir(match):
            names += _walk(match)
    names = names or files
    if not names:
        faults.append(f"{pattern}: no Parquet file matches")
    yield from names


def _walk(folder: str) -> Iterator[str]:
    """Parquet files below a folder; linked folders are followed, each real folder once."""
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        for name in sorted(files):
            if name.endswith(SUFFIXES) and not name.startswith((".", "_")):
                yield os.path.join(parent, name)


def _shard(name: str) -> Shard:
    with open_file(name) as file:
        footer = read_footer(file)
    content = footer.content
    return Shard(
        path=name if is_remote(name) else os.path.abspath(name),
        name=name,
        num_rows=footer.metadata.num_rows,
        num_row_groups=footer.metadata.num_row_groups,
        size_bytes=footer.file_bytes,
        footer_digest=hashlib.sha256(content + len(content).to_bytes(4, "little") + MAGIC).hexdigest(),
    )


def _content(shard: Shard) -> str:
    """SHA-256 (hex) of evenly spread parts of a file; of all of it where it is small."""
    digest = hashlib.sha256()
    step = max(SAMPLE_BYTES, shard.size_bytes // SAMPLES)
    try:
        with open_file(shard.path) as file:
            for place in range(0, shard.size_bytes, step):
                file.seek(place)
                digest.update(file.read(SAMPLE_BYTES))
    except OSError as fault:
        raise DataError(f"{shard.name} cannot be read: {_reason(fault)}") from fault
    return digest.hexdigest()


def _reason(fault: Exception) -> str:
    if isinstance(fault, OSError) and fault.strerror:
        return fault.strerror
    return first_line(fault)
