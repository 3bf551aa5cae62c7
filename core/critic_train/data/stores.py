"""Files on this machine and in object stores (`s3://`, `gs://`, `hf://`, ...): listed, opened, read in cached blocks.

S3 and Google's store are read by pyarrow's own file systems, every other one by fsspec's. Credentials come from the
environment, as each store's own tools take them; settings refuse an address that carries some, since addresses are
written to records and logs.
"""

import io
import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from critic_train.errors import ConfigError, DataError, MachineError, first_line

SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+)://")
CONNECT_SECONDS, REQUEST_SECONDS = 10.0, 60.0
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role; AWS_ENDPOINT_URL for a store that is not Amazon's",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or gcloud auth application-default login",
    "hf": "HF_TOKEN, for what is not public",
}
EXTRA = "pip install s3fs gcsfs adlfs"


def store_of(address: str) -> tuple[pafs.FileSystem, str]:
    """The file system behind an address, and the path in it."""
    scheme = _scheme(address)
    path = address.partition("://")[2]
    return _file_system({"gcs": "gs", "s3a": "s3"}.get(scheme, scheme), path.partition("/")[0], os.getpid()), path


def _scheme(name: str) -> str:
    """The scheme of an address in lower case; an empty string for a path."""
    match = SCHEME.match(name)
    return match[1].lower() if match else ""


@lru_cache(maxsize=32)
def _file_system(scheme: str, bucket: str, process: int) -> pafs.FileSystem:
    """One a scheme, bucket and process (connections do not outlive a fork)."""
    native = {"s3": _s3, "gs": _gs}.get(scheme)
    if native is not None:
        try:
            return native(bucket)
        except ImportError:
            pass  # this pyarrow was built without it
    return _from_fsspec(scheme)


def _s3(bucket: str) -> pafs.FileSystem:
    from pyarrow.fs import S3FileSystem, resolve_s3_region

    options: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS, "request_timeout": REQUEST_SECONDS}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        parts = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
        region = region or "us-east-1"
    if not region:
        try:
            region = resolve_s3_region(bucket)
        except OSError as error:
            raise store_fault(f"s3://{bucket}", error) from None
    return S3FileSystem(region=region, **options)


def _gs(bucket: str) -> pafs.FileSystem:
    from pyarrow.fs import GcsFileSystem

    return GcsFileSystem()


def _from_fsspec(scheme: str) -> pafs.FileSystem:
    import fsspec  # 0.05 s, for addresses alone

    try:
        return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem(scheme)))
    except ImportError as error:
        raise ConfigError(f"{scheme}:// needs a package that is not installed: {error}", hint=EXTRA) from None
    except ValueError:
        named = ", ".join(f"{name}://" for name in CREDENTIALS)
        raise ConfigError(f"no store is known for {scheme}://", hint=f"{named} and what fsspec knows are") from None


def store_fault(address: str, error: Exception) -> DataError:
    """The error for a store that refuses or lacks an address, with where its credentials come from."""
    needed = CREDENTIALS.get(_scheme(address), "")
    hint = f"credentials come from the environment: {needed}" if needed else ""
    return DataError(f"{address} cannot be read: {first_line(error)}", hint=hint)


BLOCK_BYTES = 4 * 2**20
"""Bytes of one request to a store; smaller requests cost as much."""
CACHED_BLOCKS = 48
"""Blocks in memory, of all files together: the footer, the page headers and the pages of a shard are read by three
readers, and fetched once. (fsspec's caches are of one open file each.)"""
RETRY = "run the same command again"


@dataclass(frozen=True, slots=True)
class _Block:
    """One block of a file in a store. Blocks are the same whichever open file they are read through."""

    address: str
    file_bytes: int
    number: int
    block_bytes: int
    file: pa.NativeFile = field(compare=False)


@lru_cache(maxsize=CACHED_BLOCKS)
def _fetch(block: _Block) -> bytes:
    start = block.number * block.block_bytes
    size = min(block.block_bytes, block.file_bytes - start)
    try:
        content: bytes = block.file.read_at(size, start)
    except (OSError, pa.ArrowException) as error:
        raise MachineError(f"{block.address} cannot be read: {error}", hint=RETRY) from None
    if len(content) != size:
        raise MachineError(f"{block.address} has changed while it was read", hint=RETRY)
    return content


class RemoteReader(io.RawIOBase):
    """A file in a store as a seekable Python file that is read block by block."""

    def __init__(self, address: str) -> None:
        super().__init__()
        store, path = store_of(address)
        self._address = address
        try:
            self._file = store.open_input_file(path)
            self._size = self._file.size()
        except pa.ArrowException as error:
            raise OSError(str(error)) from None
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = max(0, offset + (0, self._position, self._size)[whence])
        return self._position

    def readinto(self, target: Any) -> int:
        if self._position >= self._size:
            return 0
        number, start = divmod(self._position, BLOCK_BYTES)
        block = _fetch(_Block(self._address, self._size, number, BLOCK_BYTES, self._file))
        part = block[start : start + len(target)]
        target[: len(part)] = part
        self._position += len(part)
        return len(part)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file in a store: its address, size and time of last change (ns since 1970; None where the store has none)."""

    address: str
    size_bytes: int
    modified_ns: int | None


def is_remote(name: str) -> bool:
    """Whether a name is an address of a store."""
    return _scheme(name) not in ("", "file")


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
    """The files behind an address: the file itself, those below a folder, or those that match a glob; sorted.

    Args:
        address: as in `s3://bucket/folder`, with or without `*`, `?`, `[...]` or `**`.
        suffixes: endings of the names wanted below folders and of globs. Names beginning with "." or "_" are left out,
            and so are the folders so named.

    Raises:
        DataError: the store does not have it, or does not let it be read.
        ConfigError: the store's package is not installed, or no such store is known.
    """
    store, path = store_of(address)
    scheme = address[: -len(path)] if path else address
    try:
        if re.search(r"[*?\[]", path):
            # The folder above the first wildcard is the same for all matches.
            root = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]
            pattern = _glob_pattern(path)
            files = [info for info in _files_below(store, root) if pattern.fullmatch(info.path)]
        else:
            info = store.get_file_info(path)
            if info.type == pafs.FileType.File:
                return [_remote_file(scheme, info)]
            root = path.rstrip("/")
            files = _files_below(store, root) if info.type == pafs.FileType.Directory else []
    except (OSError, pa.ArrowException) as error:
        raise store_fault(address, error) from None
    wanted = [info for info in files if info.path.endswith(suffixes) and not _is_hidden(info.path[len(root) :])]
    return sorted((_remote_file(scheme, info) for info in wanted), key=lambda file: file.address)


def _files_below(store: pafs.FileSystem, root: str) -> list[pafs.FileInfo]:
    """All files below a folder, in one listing; fsspec's `find` would list every folder by itself."""
    selector = pafs.FileSelector(root, recursive=True, allow_not_found=True)
    return [info for info in store.get_file_info(selector) if info.type == pafs.FileType.File]


def _remote_file(scheme: str, info: pafs.FileInfo) -> RemoteFile:
    return RemoteFile(address=scheme + info.path, size_bytes=info.size or 0, modified_ns=info.mtime_ns)


def _is_hidden(below: str) -> bool:
    return any(part.startswith((".", "_")) for part in below.strip("/").split("/"))


def _glob_pattern(glob: str) -> "re.Pattern[str]":
    """A glob as a regular expression; `*` stays within a folder, `**` does not (fsspec refuses `a**b`)."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])", glob)
    wildcards = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile(
        "".join(
            wildcards.get(part) or (part.replace("[!", "[^") if part.startswith("[") else re.escape(part))
            for part in parts
        )
    )
