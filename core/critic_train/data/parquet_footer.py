"""The claims of a Parquet footer and of page headers, checked before Arrow acts on them.

Arrow reads the footer itself and refuses a damaged one. It has no limits on hostile sizes: it trusts the
rows, the row groups and the page sizes that a file claims, so that a file of a few hundred bytes could make it allocate
gigabytes. So footers and page headers are read here as well, by field number of
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift, in Thrift's compact protocol
(https://thrift.apache.org/docs/spec).

pyarrow shows no page headers, and its metadata of a column chunk is not safe to ask for: pyarrow 26 ends the process
where the histograms of a chunk's size statistics have another length than the schema says (4 of 3,000 fuzzed files).
"""

import os
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from critic_train.errors import DataError

MAGIC = b"PAR1"
TAIL_BYTES = 8
"""A footer ends in its length (4 bytes, little-endian) and the magic; a file begins with the magic too."""
MOST_FOOTER_BYTES = 2**25
MOST_COLUMNS = 10_000
DEEPEST_COLUMN = 64
"""Groups within groups of a schema; Arrow descends by recursion, and not every version has a limit."""
MOST_ROW_GROUPS = 100_000
MOST_PAGE_BYTES = 2**28
"""Decompressed bytes of a page; writers make pages of 1 MiB, some of a few tens."""
SHORT_HEADER_BYTES, LONG_HEADER_BYTES = 512, 2**16

COPY_AGAIN = "copy the file again, or take it out of --data"
NO_ROLLOUTS = "rollouts do not look like this; check the file, or take it out of --data"


class FooterError(ValueError):
    """A file claims something impossible, or something that no rollouts need.

    Args:
        message: what it claims, to be read after the file's name.
        hint: what to do about it.
    """

    def __init__(self, message: str, hint: str = COPY_AGAIN) -> None:
        super().__init__(message)
        self.hint = hint

    def of(self, name: str) -> DataError:
        """The same as an error that names the file."""
        between = " " if str(self).startswith("is ") else ": "
        return DataError(f"{name}{between}{self}", hint=self.hint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One leaf column of one row group, as the footer describes it.

    Attributes:
        column: the top-level column it belongs to.
        path: its full path, dots between.
        elements: number of values, nulls and empty lists included.
        start, end: byte range of its pages in the file.
        page_bytes: decompressed bytes of its pages, as claimed.
        is_nested: whether the column is a list or struct.
        is_integer, is_text: whether it holds integers, or texts or bytes.
        delta: whether delta encodings are among its encodings.
        nulls: their number by its statistics; None where those do not say.
    """

    column: str
    path: str
    elements: int
    start: int
    end: int
    page_bytes: int
    is_nested: bool
    is_integer: bool
    is_text: bool
    delta: bool
    nulls: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGroup:
    """Number of rows, and the chunk of every leaf column."""

    rows: int
    chunks: list[Chunk]


@dataclass(frozen=True, slots=True, kw_only=True)
class Footer:
    """The checked footer of a Parquet file.

    Attributes:
        file_bytes: size of the file.
        content: the footer's bytes, without length and magic.
        metadata: the same as pyarrow reads it.
    """

    file_bytes: int
    content: bytes
    metadata: pq.FileMetaData

    def row_groups(self) -> list[RowGroup]:
        """The row groups of the file, in order.

        Raises:
            FooterError: a count or an offset does not fit the file.
        """
        pages_end = self.file_bytes - len(self.content) - TAIL_BYTES
        try:
            groups = _read_struct(self.content, until=4)[0].get(4, [])
            return [_row_group(group, pages_end) for group in groups]
        except ThriftError as error:
            raise FooterError(f"the Parquet footer is damaged ({error})") from error
        except (AttributeError, KeyError, TypeError, UnicodeDecodeError, IndexError) as error:
            raise FooterError(f"the Parquet footer is damaged ({type(error).__name__} in a row group)") from error


def _row_group(group: "Struct", pages_end: int) -> RowGroup:
    rows = _checked_count(group[3], 2**62, "rows in a row group")
    return RowGroup(rows=rows, chunks=[_chunk(column, pages_end) for column in group[1]])


def _chunk(column: "Struct", pages_end: int) -> Chunk:
    if column.get(1):
        raise FooterError("found a column kept in another file, expected every column in this one")
    meta = column[3]
    parts = [part.decode() for part in meta[3]]
    path = ".".join(parts)
    start = _checked_count(min(meta[9], meta.get(11) or meta[9]), pages_end, f"bytes before {path}")
    nulls = meta.get(12, {}).get(3)
    return Chunk(
        column=parts[0],
        path=path,
        elements=_checked_count(meta[5], 2**62, f"elements in {path}"),
        start=start,
        end=start + _checked_count(meta[7], pages_end - start, f"bytes in {path}"),
        page_bytes=_checked_count(meta[6], 2**62, f"bytes in {path}"),
        is_nested=len(parts) > 1,
        is_integer=meta[1] in (1, 2),
        is_text=meta[1] == 6,
        delta=any(5 <= encoding <= 7 for encoding in meta[2]),
        nulls=nulls if isinstance(nulls, int) else None,
    )


def read_footer(file: BinaryIO) -> Footer:
    """Read the footer of an open Parquet file; quick however large the file is.

    Raises:
        FooterError: it is no Parquet file, a truncated one, or claims what no rollouts need.
        OSError: the file cannot be read.
        pa.ArrowException: Arrow cannot read the footer.
    """
    size, content = _footer_bytes(file)
    _check_claims(content, size)
    # The footer alone, so that Arrow sees the bytes that were checked.
    alone = pa.BufferReader(MAGIC + content + len(content).to_bytes(4, "little") + MAGIC)
    return Footer(file_bytes=size, content=content, metadata=pq.ParquetFile(alone).metadata)


def _footer_bytes(file: BinaryIO) -> tuple[int, bytes]:
    """The size of a file, and its footer without length and magic."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise FooterError("the file is empty (0 bytes)")
    file.seek(0)
    head = file.read(len(MAGIC))
    file.seek(max(size - TAIL_BYTES, 0))
    tail = file.read(TAIL_BYTES)
    if tail[-4:] != MAGIC:
        if head == b"PARE" or tail[-4:] == b"PARE":
            raise FooterError("the file is encrypted, which is not supported")
        if head == MAGIC:
            raise FooterError(f"the Parquet file is truncated ({size:,} bytes and no footer)")
        raise FooterError("this is no Parquet file")
    footer_bytes = int.from_bytes(tail[:4], "little")
    if head != MAGIC or footer_bytes + TAIL_BYTES + len(MAGIC) > size:
        raise FooterError(f"the Parquet footer is damaged (it claims {footer_bytes:,} bytes)")
    if footer_bytes > MOST_FOOTER_BYTES:
        raise FooterError(
            f"found a Parquet footer of {footer_bytes:,} bytes, expected at most {MOST_FOOTER_BYTES:,}", NO_ROLLOUTS
        )
    file.seek(size - footer_bytes - TAIL_BYTES)
    return size, file.read(footer_bytes)


def _check_claims(footer: bytes, file_bytes: int) -> None:
    """Check the schema and the counts of a footer against limits and the size of the file."""
    try:
        head, _ = _read_struct(footer, until=4, size_only=True)
    except ThriftError as error:
        raise FooterError(f"the Parquet footer is damaged ({error})") from error
    schema, rows, row_groups = head.get(2), head.get(3), head.get(4, 0)
    if not isinstance(schema, list) or not all(isinstance(element, dict) for element in schema):
        raise FooterError("the Parquet footer is damaged (it has no schema)")
    if not isinstance(rows, int) or not isinstance(row_groups, int):
        raise FooterError("the Parquet footer is damaged (it has no number of rows)")
    if len(schema) > MOST_COLUMNS:
        raise FooterError(
            f"found a schema of {len(schema):,} columns and groups, expected at most {MOST_COLUMNS:,}", NO_ROLLOUTS
        )
    depth = _depth(schema)
    if depth > DEEPEST_COLUMN:
        raise FooterError(f"found columns nested {depth:,} deep, expected at most {DEEPEST_COLUMN}", NO_ROLLOUTS)
    if not 0 <= rows <= file_bytes:
        raise FooterError(
            f"found a claim of {rows:,} rows in {file_bytes:,} bytes: no rollouts pack as tightly", NO_ROLLOUTS
        )
    if row_groups > MOST_ROW_GROUPS:
        raise FooterError(f"found {row_groups:,} row groups, expected at most {MOST_ROW_GROUPS:,}", NO_ROLLOUTS)
    if row_groups > len(footer):
        raise FooterError(f"the Parquet footer is damaged (it claims a list of {row_groups:,} elements)")


def _depth(schema: list["Struct"]) -> int:
    """Depth of the tree that a schema lists in preorder."""
    open_children: list[int] = []  # for each ancestor of the element, how many of its children are still to come
    deepest = 0
    for element in schema:
        while open_children and open_children[-1] == 0:
            open_children.pop()
        if open_children:
            open_children[-1] -= 1
        children = element.get(5, 0)
        open_children.append(children if isinstance(children, int) and children > 0 else 0)
        deepest = max(deepest, len(open_children))
    return deepest


def _checked_count(count: Any, most: int, what: str) -> int:
    if not isinstance(count, int) or not 0 <= count <= most:
        raise FooterError(f"the Parquet footer is damaged (it claims {count} {what})")
    return count


def check_pages(file: BinaryIO, chunk: Chunk) -> int:
    """Check the page headers of a chunk: their sizes and counts must fit the chunk and the footer.

    Returns:
        The decompressed bytes of its pages.

    Raises:
        FooterError: a page is larger than its chunk or than MOST_PAGE_BYTES, or the counts disagree.
    """
    position, elements, page_bytes = chunk.start, 0, 0
    while elements < chunk.elements:
        header, size = _page_header(file, chunk, position)
        unpacked, packed = header.get(2), header.get(3)
        room = chunk.end - position - size
        if not isinstance(unpacked, int) or not isinstance(packed, int) or not 0 <= packed <= room:
            raise FooterError(f"is damaged: a page of {chunk.path} does not fit into its column chunk")
        if not 0 <= unpacked <= MOST_PAGE_BYTES:
            raise FooterError(
                f"found a page of {chunk.path} that unpacks to {unpacked:,} bytes, "
                f"expected at most {MOST_PAGE_BYTES:,}",
                NO_ROLLOUTS,
            )
        data_page = header.get(5, header.get(8, {}))
        if not isinstance(data_page, dict):
            raise FooterError(f"is damaged: a page header of {chunk.path} cannot be read")
        elements += _checked_count(
            data_page.get(1, 0), chunk.elements - elements, f"elements in a page of {chunk.path}"
        )
        position, page_bytes = position + size + packed, page_bytes + unpacked
        if position >= chunk.end and elements < chunk.elements:
            raise FooterError(
                f"is damaged: {chunk.path} holds {elements:,} elements, its footer says {chunk.elements:,}"
            )
    return page_bytes


def _page_header(file: BinaryIO, chunk: Chunk, position: int) -> tuple["Struct", int]:
    """The page header at a position, and its size; a short read first, since nearly all are short."""
    for most in (SHORT_HEADER_BYTES, LONG_HEADER_BYTES):
        file.seek(position)
        try:
            return _read_struct(file.read(min(most, chunk.end - position)))
        except ThriftError as error:
            reason = error
    raise FooterError(f"is damaged: a page header of {chunk.path} cannot be read ({reason})") from reason


DEEPEST_STRUCT = 12
"""Structs within structs; Parquet's own go 6 deep."""
MOST_ELEMENTS = 2_000_000
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)

Struct = dict[int, Any]
"""Field number -> value: int, bool, bytes, list or Struct."""


class ThriftError(ValueError):
    """The bytes are not a Thrift struct."""


def _read_struct(data: bytes, until: int | None = None, *, size_only: bool = False) -> tuple[Struct, int]:
    """Read one Thrift struct.

    Args:
        data: begins with the struct.
        until: the last field to read.
        size_only: of that field, a list, read the number of elements it claims and none of them.

    Returns:
        The struct, and how many bytes were read.

    Raises:
        ThriftError: it is cut off, nested too deeply, or not a struct.
    """
    stream = BytesIO(data)
    try:
        return _struct(stream, 0, until, size_only), stream.tell()
    except IndexError:
        raise ThriftError("it ends in the middle") from None


def _struct(stream: BytesIO, depth: int, until: int | None = None, size_only: bool = False) -> Struct:
    if depth > DEEPEST_STRUCT:
        raise ThriftError("it is nested too deeply")
    fields: Struct = {}
    number = 0
    while (head := stream.read(1)[0]) & 15:
        # The upper half of the byte is the distance from the field before; 0 where the number follows by itself.
        number = number + (head >> 4) if head >> 4 else _zigzag(stream)
        kind = head & 15
        if size_only and number == until and kind == LIST:
            fields[number] = _list_head(stream)[0]
        else:
            fields[number] = kind == TRUE if kind in (TRUE, FALSE) else _value(stream, kind, depth)
        if number == until:
            break
    return fields


def _value(stream: BytesIO, kind: int, depth: int) -> Any:
    if kind in (I16, I32, I64):
        return _zigzag(stream)
    if kind == BINARY:
        return _take(stream, _varint(stream))
    if kind == STRUCT:
        return _struct(stream, depth + 1)
    if kind in (LIST, SET):
        size, item = _list_head(stream)
        # Every element takes a byte at least.
        if size > min(MOST_ELEMENTS, len(stream.getbuffer()) - stream.tell()):
            raise ThriftError(f"it claims a list of {size:,} elements")
        if depth >= DEEPEST_STRUCT:
            raise ThriftError("it is nested too deeply")
        return [_value(stream, item, depth + 1) for _ in range(size)]
    if kind in (TRUE, FALSE, BYTE):  # a boolean in a list takes a byte
        return _take(stream, 1)[0]
    if kind == DOUBLE:
        return _take(stream, 8)
    raise ThriftError(f"it holds type {kind}, which Parquet does not use")


def _list_head(stream: BytesIO) -> tuple[int, int]:
    """Number and type of a list's elements."""
    head = stream.read(1)[0]
    return _varint(stream) if head >> 4 == 15 else head >> 4, head & 15


def _zigzag(stream: BytesIO) -> int:
    """A signed number: 0, -1, 1, -2, ... are written as 0, 1, 2, 3, ..."""
    number = _varint(stream)
    return (number >> 1) ^ -(number & 1)


def _varint(stream: BytesIO) -> int:
    """An unsigned number, 7 bits a byte, the lowest first; the high bit says that another byte follows."""
    number = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)[0]
        number |= (byte & 127) << shift
        if byte < 128:
            return number
    raise ThriftError("a number has too many bytes")


def _take(stream: BytesIO, size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise ThriftError("it ends in the middle")
    return content
