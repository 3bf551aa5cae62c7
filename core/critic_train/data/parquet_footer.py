"""Thrift's compact protocol, as much as Parquet's footers and page headers need, in plain Python.

Arrow reads footers too, and refused or read every damaged one that was tried (120,000 reads by pyarrow 21 and 26, no
crash). But it believes the sizes and counts that a footer claims. They are read here first and compared with the size
of the file, so that a hostile file of a few hundred bytes allocates no gigabytes. The format is described at
https://thrift.apache.org/docs/spec (compact protocol).

What a Parquet file claims of itself, held against its size before anything is allocated for it.

Field numbers are those of https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift.
"""

import os
from dataclasses import dataclass
from typing import Any, BinaryIO

from critic_train.data.stores import open_file
from critic_train.errors import DataError

DEEPEST = 12
"""Structs within structs; Parquet's own go 6 deep."""
MOST_ELEMENTS = 2_000_000
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)

Struct = dict[int, Any]
"""Field number -> value: int, bool, bytes, list or Struct. Doubles and maps are passed over."""


class ThriftError(ValueError):
    """The bytes are no Thrift of the kind."""


def read_struct(data: bytes, place: int = 0, wanted: int | None = None) -> tuple[Struct, int]:
    """Read one struct.

    Args:
        data: the bytes.
        place: where it begins.
        wanted: the last field that is of interest: reading ends before any beyond it.

    Returns:
        The struct, and the place after what was read of it.

    Raises:
        ThriftError: it is cut off, nested too deeply, or no struct.
    """
    reader = _Reader(data, place)
    try:
        return reader.struct(0, wanted), reader.place
    except IndexError:
        raise ThriftError("it ends in the middle") from None


def size_of_list(data: bytes, place: int) -> int:
    """How many elements the list claims whose field begins at a place; 0 where no list begins there."""
    try:
        if data[place] & 15 != LIST:
            return 0
        size = data[place + 1] >> 4
        return _Reader(data, place + 2).varint() if size == 15 else size
    except IndexError:
        return 0


class _Reader:
    """A place in some bytes that moves on."""

    def __init__(self, data: bytes, place: int) -> None:
        self.data = data
        self.place = place

    def struct(self, depth: int, wanted: int | None = None) -> Struct:
        if depth > DEEPEST:
            raise ThriftError("it is nested too deeply")
        found: Struct = {}
        number = 0
        while True:
            begin = self.place
            head = self.data[begin]
            self.place = begin + 1
            kind = head & 15
            if kind == 0:
                return found
            number = number + (head >> 4) if head >> 4 else self.zigzag()
            if wanted is not None and number > wanted:
                self.place = begin
                return found
            found[number] = kind == TRUE if kind in (TRUE, FALSE) else self.value(kind, depth)

    def value(self, kind: int, depth: int) -> Any:
        if kind in (I16, I32, I64):
            return self.zigzag()
        if kind == BINARY:
            return self.take(self.varint())
        if kind == STRUCT:
            return self.struct(depth + 1)
        if kind in (LIST, SET):
            return self.list(depth)
        if kind == BYTE:
            return self.take(1)[0]
        if kind == DOUBLE:
            return self.take(8)
        raise ThriftError(f"it holds type {kind}, which Parquet does not use")

    def list(self, depth: int) -> "list[Any]":
        head = self.data[self.place]
        self.place += 1
        size, kind = head >> 4, head & 15
        size = self.varint() if size == 15 else size
        # Every element takes a byte at least.
        if size > min(MOST_ELEMENTS, len(self.data) - self.place):
            raise ThriftError(f"it claims a list of {size:,} elements")
        if kind in (TRUE, FALSE):
            return [self.take(1)[0] == TRUE for _ in range(size)]
        if depth >= DEEPEST:
            raise ThriftError("it is nested too deeply")
        return [self.value(kind, depth + 1) for _ in range(size)]

    def zigzag(self) -> int:
        number = self.varint()
        return (number >> 1) ^ -(number & 1)

    def varint(self) -> int:
        data, place = self.data, self.place
        byte = data[place]
        place += 1
        number, shift = byte & 127, 7
        while byte > 127:
            if shift > 63:
                raise ThriftError("a number has too many bytes")
            byte = data[place]
            place += 1
            number |= (byte & 127) << shift
            shift += 7
        self.place = place
        return number

    def take(self, size: int) -> bytes:
        begin = self.place
        if size > len(self.data) - begin:
            raise ThriftError("it ends in the middle")
        self.place = begin + size
        return self.data[begin : begin + size]


MAGIC = b"PAR1"
TAIL_BYTES = 8
"""A footer ends in its length (4 bytes, little-endian) and the magic; a file begins with the magic too."""
MOST_FOOTER_BYTES = 2**25
"""Reading a footer takes some twenty times its size."""
MOST_COLUMNS = 10_000
DEEPEST_COLUMN = 64
"""Groups within groups of a schema; Arrow goes down them by recursion."""
MOST_ROW_GROUPS = 100_000
MOST_PAGE_BYTES = 2**28
"""A page decompressed; writers make them 1 MiB, some a few tens."""
SHORT_HEADER_BYTES, LONG_HEADER_BYTES = 512, 2**16


COPY_AGAIN = "copy the file again, or take it out of --data"
NO_ROLLOUTS = "no rollouts look so; check the file, or take it out of --data"


class FooterError(ValueError):
    """The file claims what cannot be, or what no rollouts are; says what, to be read after the file's name.

    Args:
        message: see there.
        hint: what to do about it.
    """

    def __init__(self, message: str, hint: str = COPY_AGAIN) -> None:
        super().__init__(message)
        self.hint = hint

    def of(self, name: str) -> DataError:
        """The fault of a file with this name."""
        between = " " if str(self).startswith("is ") else ": "
        return DataError(f"{name}{between}{self}", hint=self.hint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One column of one row group.

    Attributes:
        column: the top-level column it belongs to.
        path: its full path, dots between.
        elements: values, nulls and empty lists among them.
        start, end: the bytes of its pages in the file.
        page_bytes: the same decompressed, as claimed.
        is_nested: whether the column is a list or struct.
        is_integer, is_text: whether it holds whole numbers, or texts or bytes.
        delta: whether delta encodings are among its encodings.
        nulls: by its statistics; None where they do not say.
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
    """Some rows of a file."""

    rows: int
    chunks: list[Chunk]


def read_footer(file: BinaryIO) -> tuple[int, bytes]:
    """The size of a file, and its footer without length and magic.

    Raises:
        FooterError: it is no Parquet file, or no whole one.
    """
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


def check_head(footer: bytes, file_bytes: int) -> None:
    """Hold the schema and the counts of a footer against limits; quick, and before Arrow sees it.

    Args:
        footer: its bytes, without length and magic.
        file_bytes: size of the file.

    Raises:
        FooterError: see there.
    """
    head, place = _struct(footer, wanted=3)
    schema, rows = head.get(2), head.get(3)
    if not isinstance(schema, list) or not isinstance(rows, int) or not all(isinstance(e, dict) for e in schema):
        raise FooterError("the Parquet footer is damaged (it has no schema or no number of rows)")
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
    groups = size_of_list(footer, place)
    if groups > MOST_ROW_GROUPS:
        raise FooterError(f"found {groups:,} row groups, expected at most {MOST_ROW_GROUPS:,}", NO_ROLLOUTS)


def row_groups_of(path: str) -> list[RowGroup]:
    """The row groups of the file at a path. Raises FooterError and OSError."""
    with open_file(path) as file:
        size, footer = read_footer(file)
    return read_row_groups(footer, size)


def read_row_groups(footer: bytes, file_bytes: int) -> list[RowGroup]:
    """The row groups of a file, in order.

    Args:
        footer: its bytes, without length and magic.
        file_bytes: size of the file.

    Raises:
        FooterError: see there.
    """
    groups = _struct(footer, wanted=4)[0].get(4, [])
    end = file_bytes - len(footer) - 8
    try:
        return [_row_group(group, end) for group in groups]
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, IndexError) as error:
        raise FooterError(f"the Parquet footer is damaged ({type(error).__name__} in a row group)") from error


def check_pages(file: BinaryIO, chunk: Chunk) -> int:
    """Go through the headers of a chunk's pages: what each claims must fit the chunk, the footer and sense.

    Returns:
        The bytes of its pages, decompressed.

    Raises:
        FooterError: see there.
    """
    place, elements, page_bytes = chunk.start, 0, 0
    while elements < chunk.elements:
        header, size = _page_header(file, chunk, place)
        unpacked, packed = header.get(2), header.get(3)
        if not isinstance(unpacked, int) or not isinstance(packed, int) or not 0 <= packed <= chunk.end - place - size:
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
        elements += _count(data_page.get(1, 0), chunk.elements - elements, f"elements in a page of {chunk.path}")
        place, page_bytes = place + size + packed, page_bytes + unpacked
        if place >= chunk.end and elements < chunk.elements:
            raise FooterError(
                f"is damaged: {chunk.path} holds {elements:,} elements, its footer says {chunk.elements:,}"
            )
    return page_bytes


def _row_group(group: Struct, end: int) -> RowGroup:
    rows = _count(group[3], 2**62, "rows in a row group")
    return RowGroup(rows=rows, chunks=[_chunk(column, end) for column in group[1]])


def _chunk(column: Struct, end: int) -> Chunk:
    if column.get(1):
        raise FooterError("found a column kept in another file, expected every column in this one")
    meta = column[3]
    parts = [part.decode() for part in meta[3]]
    path = ".".join(parts)
    start = min(meta[9], meta.get(11) or meta[9])
    start = _count(start, end, f"bytes before {path}")
    packed = _count(meta[7], end - start, f"bytes in {path}")
    nulls = meta.get(12, {}).get(3)
    return Chunk(
        column=parts[0],
        path=path,
        elements=_count(meta[5], 2**62, f"elements in {path}"),
        start=start,
        end=start + packed,
        page_bytes=_count(meta[6], 2**62, f"bytes in {path}"),
        is_nested=len(parts) > 1,
        is_integer=meta[1] in (1, 2),
        is_text=meta[1] == 6,
        delta=any(5 <= encoding <= 7 for encoding in meta[2]),
        nulls=nulls if isinstance(nulls, int) else None,
    )


def _count(found: Any, most: int, what: str) -> int:
    if not isinstance(found, int) or not 0 <= found <= most:
        raise FooterError(f"the Parquet footer is damaged (it claims {found} {what})")
    return found


def _depth(schema: list[Struct]) -> int:
    """How deep the flattened tree of a schema is."""
    open_children: list[int] = []
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


def _struct(data: bytes, wanted: int | None = None) -> tuple[Struct, int]:
    try:
        return read_struct(data, wanted=wanted)
    except ThriftError as error:
        raise FooterError(f"the Parquet footer is damaged ({error})") from error


def _page_header(file: BinaryIO, chunk: Chunk, place: int) -> tuple[Struct, int]:
    """The header at a place, and its size; a short read first, for nearly all are short."""
    for most in (SHORT_HEADER_BYTES, LONG_HEADER_BYTES):
        file.seek(place)
        try:
            return read_struct(file.read(min(most, chunk.end - place)))
        except ThriftError as error:
            fault = error
    raise FooterError(f"is damaged: a page header of {chunk.path} cannot be read ({fault})") from fault
