"""JSON Lines read a few megabytes at a time; a line that is no object is a bad record, not the end."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from critic_train.convert.records import BadRecord

CHUNK_BYTES = 8 * 2**20
LONGEST_LINE = 2**28
"""Bytes; no record of one rollout is as long."""
EXPECTED = "one JSON object a line"


def chunks(path: Path) -> Iterator[tuple[list[tuple[int, dict[str, Any]]], list[BadRecord], int]]:
    """Records of a file: (record number from 0, object), those that are none, and the bytes read so far.

    Empty lines count as records are counted, but are none.

    Raises:
        OSError: the file cannot be read.
    """
    good: list[tuple[int, dict[str, Any]]] = []
    bad: list[BadRecord] = []
    with path.open("rb") as file:
        row, done, waiting = -1, 0, 0
        while line := file.readline(LONGEST_LINE):
            row += 1
            done += len(line)
            waiting += len(line)
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                bad.append(BadRecord(row=row, column="", found=f"more than {LONGEST_LINE:,} bytes", expected=EXPECTED))
                done += _skip_line(file)
            elif line.strip():
                read = parsed(line)
                if isinstance(read, dict):
                    good.append((row, read))
                else:
                    bad.append(BadRecord(row=row, column="", found=read, expected=EXPECTED))
            if waiting >= CHUNK_BYTES:
                yield good, bad, done
                good, bad, waiting = [], [], 0
        yield good, bad, done


def parsed(line: bytes) -> dict[str, Any] | str:
    """A line's object, or what it is instead."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"no JSON ({str(error)[:80]})"
    return value if isinstance(value, dict) else f"a {type(value).__name__}"


def first_record(path: Path) -> dict[str, Any] | None:
    """The first object of a file, None where it begins with none."""
    with path.open("rb") as file:
        for _ in range(100):
            line = file.readline(LONGEST_LINE)
            if line.strip():
                read = parsed(line)
                return read if isinstance(read, dict) else None
    return None


def _skip_line(file: Any) -> int:
    skipped = 0
    while piece := file.readline(CHUNK_BYTES):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped
