"""Records of text files: JSON Lines, JSON arrays, indented or joined JSON objects, CSV; plain or compressed."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa

from critic_train.convert.raw_records import BadRecord, Line
from critic_train.errors import DataError

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""What a compressed file begins with -> its kind."""
OPENERS: dict[str, Callable[[Any], Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
CHUNK_BYTES = 8 * 2**20
LONGEST_LINE = 2**28
"""Bytes; no record of one rollout is as long."""
EXPECTED_LINE = "one JSON object a line"
DAMAGED = (zlib.error, lzma.LZMAError, EOFError, gzip.BadGzipFile, pa.ArrowException, UnicodeDecodeError)
FIRST_RECORDS = 64
"""From so many records it is concluded which field is which."""
Chunk = tuple[list[Line], list[BadRecord], int]
"""Records, lines that are none, and bytes of the file read so far."""


def compression_of(head: bytes) -> str | None:
    """The kind of a compressed file by its first bytes; None where it is not compressed."""
    return next((kind for magic, kind in COMPRESSED.items() if head.startswith(magic)), None)


@contextmanager
def text_file(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """A file's bytes without their compression, and the file itself, whose position tells how much is read."""
    with path.open("rb") as raw:
        kind = compression_of(raw.read(8))
        raw.seek(0)
        try:
            if kind in OPENERS:
                with OPENERS[kind](raw) as text:
                    yield text, raw
            elif kind == "zstd":
                stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
                yield cast(IO[bytes], io.BufferedReader(stream, 2**20)), raw
            else:
                yield raw, raw
        except DAMAGED as error:
            raise DataError(f"{path.name}: the file is damaged ({str(error)[:120] or type(error).__name__})") from error


def record_chunks(path: Path) -> Iterator[Chunk]:
    """The records of a text file, some at a time.

    Records are numbered from 0; an empty line has a number, but is no record.

    Raises:
        DataError: its compression is damaged.
        OSError: the file cannot be read.
    """
    with text_file(path) as (text, raw):
        is_table = any(part in (".csv", ".tsv") for part in path.suffixes[-2:])
        first = b"" if is_table else _first_line(text)
        if is_table:
            values: Iterator[Any] = _table_rows(text, "\t" if ".tsv" in path.suffixes else ",")
        elif first.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[" or _is_cut_object(first):
            values = _json_values(first, text)
        else:
            values = _lines(first, text)
        good: list[Line] = []
        bad: list[BadRecord] = []
        at = 0
        for row, value, size in values:
            if isinstance(value, dict):
                good.append((row, value))
            elif value is not None:
                bad.append(BadRecord(row=row, column="", actual=value, expected=EXPECTED_LINE))
            at += size
            if at >= CHUNK_BYTES:
                yield good, bad, raw.tell()
                good, bad, at = [], [], 0
        yield good, bad, raw.tell()


Value = tuple[int, dict[str, Any] | str | None, int]
"""A record's number; its fields, what it is instead, or None for an empty line; and its bytes."""


def _first_line(text: IO[bytes]) -> bytes:
    """The first line that is not empty, with the empty ones before it."""
    lines = b""
    while line := text.readline(LONGEST_LINE):
        lines += line
        if line.strip(b"\xef\xbb\xbf \t\r\n"):
            break
    return lines


def _is_cut_object(line: bytes) -> bool:
    """Whether a line is the beginning of an object that goes on behind it."""
    return line.strip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and isinstance(parsed(line), str)


def _lines(first: bytes, text: IO[bytes]) -> Iterator[Value]:
    row = -1
    for line in first.splitlines(keepends=True)[:-1]:
        row += 1
        yield row, None, len(line)
    line = first.splitlines(keepends=True)[-1] if first else b""
    while line:
        row += 1
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            yield row, f"more than {LONGEST_LINE:,} bytes", len(line) + _skip_line(text)
        else:
            yield row, parsed(line) if line.strip() else None, len(line)
        line = text.readline(LONGEST_LINE)


def _skip_line(text: IO[bytes]) -> int:
    skipped = 0
    while piece := text.readline(CHUNK_BYTES):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def parsed(line: bytes) -> dict[str, Any] | str:
    """A line's object, or what it is instead."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"no JSON ({str(error)[:80]})"
    return value if isinstance(value, dict) else f"a {type(value).__name__}"


def _json_values(first: bytes, text: IO[bytes]) -> Iterator[Value]:
    """The elements of a JSON array, or JSON values one after the other; only one of them is in memory."""
    decoder, parser = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder()
    buffer, at, row, is_over = decoder.decode(first), 0, -1, False
    step = CHUNK_BYTES
    while True:
        at = _behind_separators(buffer, at)
        try:
            if at >= len(buffer):
                raise ValueError
            value, end = parser.raw_decode(buffer, at)
            if end == len(buffer) and not is_over:
                raise ValueError  # a number may go on
        except (ValueError, RecursionError) as error:
            if is_over:
                if at < len(buffer):
                    yield row + 1, f"no JSON ({str(error)[:80]})", len(buffer) - at
                return
            piece = text.read(step)
            is_over = not piece
            buffer, at = buffer[at:] + decoder.decode(piece, final=is_over), 0
            # What is begun is read again from its start: pieces grow, so that all readings together stay linear.
            step = max(CHUNK_BYTES, len(buffer))
            if len(buffer) > LONGEST_LINE:
                yield row + 1, f"more than {LONGEST_LINE:,} characters", len(buffer)
                return
            continue
        row += 1
        yield row, value if isinstance(value, dict) else f"a {type(value).__name__}", end - at
        at = end


def _behind_separators(buffer: str, at: int) -> int:
    while at < len(buffer) and buffer[at] in " \t\r\n,[]":
        at += 1
    return at


def _table_rows(text: IO[bytes], delimiter: str) -> Iterator[Value]:
    """The rows of a CSV file, all fields text."""
    csv.field_size_limit(min(sys.maxsize, LONGEST_LINE))
    wrapper = io.TextIOWrapper(text, "utf-8-sig", newline="")
    reader = csv.DictReader(wrapper, delimiter=delimiter)
    try:
        for row, fields in enumerate(reader):
            if None in fields or None in fields.values():
                yield row, "a row of another number of fields than the first line", 0
            else:
                yield row, dict(fields), sum(map(len, fields.values()))
    except csv.Error as error:
        yield 0, f"no CSV ({error})", 0
    finally:
        wrapper.detach()  # or its end would close the file
