"""Thrift's compact protocol, as much as Parquet's footers and page headers need, in plain Python.

Arrow reads footers too, but it ends the process on some damaged ones, and allocates what a footer claims. So sizes and
counts are read here first and held against the file: https://thrift.apache.org/docs/spec (compact protocol).
"""

from typing import Any

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
