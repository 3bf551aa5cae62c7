"""Writes that survive: a file appears under its name whole, or not at all."""

import hashlib
import json
from pathlib import Path
from typing import Any

from critic_train.redaction import without_secrets
from critic_train.run.storage import Data, remove, rename, sync_directory, write_file


def replace_file(path: Path, data: Data) -> None:
    """Write a file beside its place, sync it and rename it there.

    Raises:
        OSError: the disk is full or not writable; the old file stands unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_file(temporary, data)
        rename(temporary, path)
    except OSError:
        remove(temporary)
        raise
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Put JSON under a name, whole or not at all, secrets hidden. NaN is refused, since it is no JSON.

    Raises:
        OSError: the disk is full or not writable; the old file stands unchanged.
    """
    replace_file(path, without_secrets(json.dumps(value, indent=2, allow_nan=False)).encode() + b"\n")


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
