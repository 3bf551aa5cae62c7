"""The Parquet files of a data set, and its fingerprint."""

import glob
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from critic_train.data.bad_input import BadFile, BadFiles
from critic_train.data.parquet_footer import MAGIC, FooterError, read_footer
from critic_train.data.stores import is_remote, open_file, remote_files
from critic_train.errors import DataError, first_line

SUFFIXES = (".parquet", ".parq")
DUMPS = re.compile(r"(?i).*\.(jsonl|ndjson|json|csv|tsv|pt|pth|pkl|pickle|arrow)(\.(gz|zst|zstd|bz2|xz))?")
"""Names of files that `critic-train convert` reads."""
CONVERTED = "shards/"
BESIDE_MODELS = "config.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[\w-]")
SHOWN = 20
SAMPLES = 256
SAMPLE_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One Parquet file of rollouts, as its footer describes it.

    Attributes:
        path: absolute path, or the address in a store, as opened.
        name: the path as the user gave it, for messages.
        num_rows: rows in the file.
        num_row_groups: row groups in the file.
        size_bytes: size of the file.
        footer_digest: SHA-256 (hex) of the Parquet footer, which holds the schema, the counts, the offset and
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
        bad_files: collects the files whose footer cannot be read; without it they are an error.

    Raises:
        DataError: a source has no files, a file is unreadable or no Parquet, or there is not one row. Every such
            source and file is listed at once.
    """
    errors: list[str] = []
    dumps: list[str] = []
    names_by_path: dict[str, str] = {}
    for source in sources:
        local = "" if is_remote(source) else os.path.expanduser(source)
        names = list(_names(local, errors) if local else _remote_names(source, errors))
        if _is_dump(local, names):
            dumps.append(source)
            errors.append(f"{source}: no Parquet, but files that critic-train convert reads")
            continue
        for name in names:
            names_by_path.setdefault(name if is_remote(name) else os.path.realpath(name), name)
    shards: list[Shard] = []
    for name in sorted(names_by_path.values(), key=absolute_path):
        try:
            shards.append(_shard(name))
        except (FooterError, pa.ArrowException, UnicodeDecodeError, OSError) as error:
            bad = BadFile(file=name, fault=_reason(error))
            if bad_files is None:
                errors.append(f"{bad.file}: {bad.fault}")
            else:
                bad_files.add(bad)
    if errors:
        shown = errors[:SHOWN] + ([f"and {len(errors) - SHOWN:,} more"] if len(errors) > SHOWN else [])
        hint = "--data takes folders, Parquet files and globs; repair, replace or remove what is listed"
        if dumps:
            hint = f"{convert_command(dumps)} makes shards of them; read {CONVERTED} then"
        raise DataError("some of the data cannot be read:\n" + "\n".join(f"  {line}" for line in shown), hint=hint)
    if bad_files and not any(shard.num_rows for shard in shards):
        raise bad_files.error(all_of_them=True)
    if not any(shard.num_rows for shard in shards):
        listed = ", ".join(shard.name for shard in shards[:SHOWN])
        raise DataError(f"there is not one row in {listed}", hint="point --data at files that hold rollouts")
    return shards


def convert_command(sources: list[str]) -> str:
    """The command that makes shards of some files, as it can be typed; patterns stay patterns."""
    named = " ".join(source if glob.has_magic(source) else shlex.quote(source) for source in sources[:SHOWN])
    return f"critic-train convert {named} --to {CONVERTED}"


def _is_dump(source: str, names: list[str]) -> bool:
    """Whether a source on this machine has no Parquet, but files that `critic-train convert` reads.

    Args:
        source: a path or a glob; empty for an address.
        names: the files that were found behind it.
    """
    if any(name.endswith(SUFFIXES) for name in names):
        return False
    if os.path.isdir(source):
        inside = [name for _, _, files in os.walk(source, followlinks=True) for name in files]
        return BESIDE_MODELS not in inside and any(map(DUMPS.fullmatch, inside))
    return any(DUMPS.fullmatch(name) for name in names)


def fingerprint(shards: list[Shard]) -> dict[str, Any]:
    """Names, sizes and digests of all files, JSON-able; moving the folder does not change it.

    A changed number in a page may leave the footer as it was, so the content is read as well: all of it up to
    SAMPLES * SAMPLE_BYTES (16 MiB) a file, and that much in even steps of larger ones.

    Returns:
        {"files": [{"name", "bytes", "rows", "footer", "content"}, ...], "digest": SHA-256 hex over all of them}, names
        relative to the folder that all files share.
    """
    paths = [absolute_path(shard.path) for shard in shards]
    folder = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    files = [
        {
            "name": os.path.relpath(path, folder).replace(os.sep, "/"),
            "bytes": shard.size_bytes,
            "rows": shard.num_rows,
            "footer": shard.footer_digest,
            "content": _content(shard),
        }
        for shard, path in zip(shards, paths, strict=True)
    ]
    text = json.dumps(files, sort_keys=True, separators=(",", ":"))
    return {"files": files, "digest": hashlib.sha256(text.encode()).hexdigest()}


def _names(source: str, errors: list[str]) -> Iterator[str]:
    """Files behind one source; errors of the source itself are appended to `errors`."""
    if os.path.isdir(source):
        names = list(_walk(source))
        if not names and not _is_dump(source, []):
            errors.append(f"{source}: the folder holds no .parquet file")
        yield from names
    elif os.path.isfile(source):
        yield source
    elif os.path.exists(source):
        errors.append(f"{source}: neither a file nor a folder")
    elif glob.has_magic(source):
        yield from _matches(source, errors)
    else:
        errors.append(f"{source}: there is no such file or folder{_hub_advice(source)}")


def _hub_advice(source: str) -> str:
    """How to get a data set of the Hugging Face hub, where a missing path may be the id of one; else empty."""
    if not HUB_ID.fullmatch(source) or source.endswith(SUFFIXES) or os.path.exists(source.partition("/")[0]):
        return ""
    return (
        f"; if it is a data set of the Hugging Face hub: hf://datasets/{source} reads its Parquet files, and "
        f"hf download {source} --repo-type dataset --local-dir {source} gets a folder"
    )


def _remote_names(source: str, errors: list[str]) -> Iterator[str]:
    """Files behind an address of a store."""
    try:
        names = [file.address for file in remote_files(source, SUFFIXES)]
    except DataError as error:
        errors.append(f"{error.message} ({error.hint})" if error.hint else error.message)
        return
    if not names:
        errors.append(f"{source}: the store has no Parquet file there")
    yield from names


def absolute_path(path: str) -> str:
    """A path made absolute, or an address as one; shards are sorted and distinguished by it."""
    return "/" + path.replace("://", "/", 1) if is_remote(path) else os.path.abspath(path)


def _matches(pattern: str, errors: list[str]) -> Iterator[str]:
    matches = sorted(glob.glob(pattern, recursive=True))
    files = [match for match in matches if os.path.isfile(match)]
    # `data/*` is meant for the Parquet files, not for the README beside them.
    names = [name for name in files if name.endswith(SUFFIXES)]
    for match in matches:
        if os.path.isdir(match):
            names += _walk(match)
    names = names or files
    if not names:
        errors.append(f"{pattern}: no Parquet file matches")
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
            for position in range(0, shard.size_bytes, step):
                file.seek(position)
                digest.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise DataError(f"{shard.name} cannot be read: {_reason(error)}") from error
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)
