"""The file systems behind addresses: pyarrow's own, and fsspec's where pyarrow has none.

Credentials come from the environment, as each store's own tools take them.

A file of an object store as a Python file, fetched in blocks that are kept for a while.

Where files are: paths on this machine, and addresses of object stores (`s3://`, `gs://`, `hf://`, ...).

Reading goes through pyarrow's file systems, and through fsspec where pyarrow has none. Credentials come from the
environment, as each store's own tools take them; settings refuse an address that carries some, since addresses are
kept in records and logs.
"""

import io
import os
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
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
EXTRA = "pip install 'critic-train[remote]'"


def store_of(address: str) -> tuple[pafs.FileSystem, str]:
    """A store's file system, and the path in it."""
    found = SCHEME.match(address)
    assert found is not None, "is_remote sees to it"
    scheme, path = found[1].lower(), address[found.end() :]
    return _file_system({"gcs": "gs", "s3a": "s3"}.get(scheme, scheme), path.partition("/")[0], os.getpid()), path


@lru_cache(maxsize=32)
def _file_system(scheme: str, bucket: str, process: int) -> pafs.FileSystem:
    """One a scheme, bucket and process (connections do not outlive a fork)."""
    native = {"s3": _s3, "gs": _gs}.get(scheme)
    try:
        if native is not None:
            return native(bucket)
    except ImportError:
        pass  # a pyarrow that was built without it; fsspec may have it
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
    try:
        import fsspec  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigError(f"{scheme}:// needs the package fsspec", hint=EXTRA) from None
    try:
        return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem(scheme)))
    except ImportError as error:
        raise ConfigError(f"{scheme}:// needs a package that is not installed: {error}", hint=EXTRA) from None
    except ValueError:
        known = ", ".join(f"{name}://" for name in CREDENTIALS)
        raise ConfigError(f"no store is known for {scheme}://", hint=f"{known} and what fsspec knows are") from None


def store_fault(address: str, error: Exception) -> DataError:
    said = first_line(error)
    scheme = (SCHEME.match(address) or [""] * 2)[1].lower()
    needed = CREDENTIALS.get(scheme, "")
    hint = f"credentials come from the environment: {needed}" if needed else ""
    return DataError(f"{address} cannot be read: {said}", hint=hint)


BLOCK_BYTES = 4 * 2**20
"""What is asked of a store at once; smaller requests cost as much."""
CACHED_BLOCKS = 48
"""Blocks kept in memory, of all remote files together: a shard is listed, looked over and decoded, and fetched once."""
AGAIN = "run the same command again"


class Blocks:
    """Blocks of remote files, those used last kept in memory."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, int, int]) -> bytes | None:
        with self._lock:
            block = self._kept.get(key)
            if block is not None:
                self._kept.move_to_end(key)
            return block

    def put(self, key: tuple[str, int, int], block: bytes) -> None:
        with self._lock:
            self._kept[key] = block
            while len(self._kept) > CACHED_BLOCKS:
                self._kept.popitem(last=False)


BLOCKS = Blocks()


class RemoteReader(io.RawIOBase):
    """A file of a store, fetched block by block as it is read."""

    def __init__(self, address: str) -> None:
        super().__init__()
        store, path = store_of(address)
        self._address = address
        try:
            self._file = store.open_input_file(path)
            self._size = self._file.size()
        except pa.ArrowException as error:
            raise OSError(str(error)) from None
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, target: Any) -> int:
        if self._at >= self._size:
            return 0
        number, inside = divmod(self._at, BLOCK_BYTES)
        piece = self._block(number)[inside : inside + len(target)]
        target[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _block(self, number: int) -> bytes:
        key = (self._address, self._size, number)
        block = BLOCKS.get(key)
        if block is None:
            wanted = min(BLOCK_BYTES, self._size - number * BLOCK_BYTES)
            try:
                block = self._file.read_at(wanted, number * BLOCK_BYTES)
            except (OSError, pa.ArrowException) as error:
                raise MachineError(f"{self._address} cannot be read: {error}", hint=AGAIN) from None
            if len(block) != wanted:
                raise MachineError(f"{self._address} has changed while it was read", hint=AGAIN)
            BLOCKS.put(key, block)
        return block


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
