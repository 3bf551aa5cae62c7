"""The file systems behind addresses: pyarrow's own, and fsspec's where pyarrow has none.

Credentials come from the environment, as each store's own tools take them.
"""

import os
import re
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from critic_train.errors import ConfigError, DataError

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
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    scheme = (SCHEME.match(address) or [""] * 2)[1].lower()
    needed = CREDENTIALS.get(scheme, "")
    hint = f"credentials come from the environment: {needed}" if needed else ""
    return DataError(f"{address} cannot be read: {said}", hint=hint)
