"""JSON objects of files that others may have written: of bounded size, or an error that says what is there."""

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 2**26


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is too large, no JSON, nested too deeply, or no object; says which.
    """
    with path.open("rb") as file:
        return parse_json_object(file.read(MOST_BYTES + 1))


def read_json_object_or_none(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is none that can be read."""
    try:
        return read_json_object(path)
    except (OSError, ValueError):
        return None


def parse_json_object(content: bytes) -> dict[str, Any]:
    """The JSON object that some bytes are.

    Raises:
        ValueError: they are too many, no JSON, nested too deeply, or no object; says which.
    """
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value
