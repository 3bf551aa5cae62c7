"""Where files are: paths on this machine, and addresses of object stores (`s3://`, `gs://`, `hf://`, ...).

Reading goes through pyarrow's file systems, and through fsspec where pyarrow has none. Credentials come from the
environment, as each store's own tools take them; settings refuse an address that carries some, since addresses are
kept in records and logs.
"""

import io
import os
import re
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from critic_train.data.remote_reading import RemoteReader
from critic_train.data.stores import SCHEME, store_fault, store_of


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a store: its whole address, its size and when it was changed (ns since 1970, None where not told)."""

    address: str
    size_bytes: int
    modified_ns: int | None


def is_remote(name: str) -> bool:
    """Whether a name is an address of a store."""
    found = SCHEME.match(name)
    return found is not None and found[1].lower() != "file"


def open_file(path: str) -> BinaryIO:
    """Open a file for reading, here or in a store.

    Raises:
        OSError: it cannot be opened.
        MachineError: from reading: the store does not answer.
    """
    return cast(BinaryIO, io.BufferedReader(RemoteReader(path), 2**18)) if is_remote(path) else open(path, "rb")


def parquet_file(path: str, **options: Any) -> pq.ParquetFile:
    """pyarrow's ParquetFile of a file here or in a store."""
    return pq.ParquetFile(open_file(path) if is_remote(path) else _local(path), **options)


def _local(path: str) -> str | pa.NativeFile:
    """A path, or the file open where Arrow cannot take its name: one with bytes that the locale (LC_ALL=C) has not."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return pa.OSFile(os.fsencode(path), "rb")
    return path


def remote_files(address: str, suffixes: tuple[str, ...]) -> list[RemoteFile]:
    """The files behind an address: itself, those below a folder, or those that match a pattern; sorted.

    Args:
        address: as in `s3://bucket/folder`, with `*`, `?`, `[...]` or `**` where several are meant.
        suffixes: what names below folders and of patterns must end in; of these, names beginning with "." or "_" are
            left out, with the folders so named.

    Raises:
        DataError: the store does not have it, or does not let it be read.
        ConfigError: the store's package is not installed, or no such store is known.
    """
    store, path = store_of(address)
    scheme = address[: -len(path)] if path else address
    try:
        if re.search(r"[*?\[]", path):
            # Up to the folder above the first wildcard, all has one name.
            root = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]
            pattern = re.compile(_translated(path))
            listed = [info for info in _below(store, root) if pattern.fullmatch(info.path)]
        else:
            info = store.get_file_info(path)
            if info.type == pafs.FileType.File:
                return [_file(scheme, info)]
            root = path.rstrip("/")
            listed = _below(store, root) if info.type == pafs.FileType.Directory else []
    except (OSError, pa.ArrowException) as error:
        raise store_fault(address, error) from None
    kept = [info for info in listed if info.path.endswith(suffixes) and not _is_hidden(info.path[len(root) :])]
    return sorted((_file(scheme, info) for info in kept), key=lambda file: file.address)


def _below(store: pafs.FileSystem, root: str) -> list[pafs.FileInfo]:
    selector = pafs.FileSelector(root, recursive=True, allow_not_found=True)
    return [info for info in store.get_file_info(selector) if info.type == pafs.FileType.File]


def _file(scheme: str, info: pafs.FileInfo) -> RemoteFile:
    return RemoteFile(address=scheme + info.path, size_bytes=info.size or 0, modified_ns=info.mtime_ns)


def _is_hidden(below: str) -> bool:
    return any(part.startswith((".", "_")) for part in below.strip("/").split("/"))


def _translated(pattern: str) -> str:
    """A glob over paths as a regular expression; `*` stays within a folder, `**` does not."""
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])", pattern)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        known.get(piece) or (piece.replace("[!", "[^") if piece.startswith("[") else re.escape(piece))
        for piece in pieces
    )
