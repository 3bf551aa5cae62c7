"""Decode a shard's columns piece by piece, in bounded memory, page checksums verified.

A file of a few hundred bytes can decode to gigabytes. The claims of the footer and the page headers are therefore
checked against limits before Arrow acts on them. One oversized row among many shows in none of them: it is decoded
under a limit on memory (`at_most`), and made null before anything else is done with it.
"""

import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from critic_train.data.column_types import list_item_type
from critic_train.data.parquet_footer import (
    COPY_AGAIN,
    NO_ROLLOUTS,
    Footer,
    FooterError,
    RowGroup,
    check_pages,
    read_footer,
)
from critic_train.data.shards import Shard
from critic_train.data.stores import open_file, parquet_file
from critic_train.errors import DataError, first_line


@contextmanager
def at_most(extra_bytes: int) -> Iterator[None]:
    """Let the process's address space grow by so many bytes inside the `with` block, and no further.

    An allocation beyond fails where it is asked for, before it is touched: Python and Arrow raise MemoryError. Keep the
    block short, for it binds all threads. Only Linux tells a process its size; elsewhere nothing is held back.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    ceiling = _address_space_bytes() + extra_bytes
    if soft == resource.RLIM_INFINITY or ceiling < soft:
        resource.setrlimit(resource.RLIMIT_AS, (ceiling, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


FIRST_ROWS = 64
"""Rows decoded at once, at most; the size of a batch is known only after."""
MOST_ROWS = 8192
BATCH_BYTES = 16 * 2**20
"""Arrow bytes at which a batch of rows is full."""
BUFFER_BYTES = 2**18
"""Bytes of a column's pages that are read ahead; without it Arrow reads a row group's entire column."""
ELEMENT_BYTES = 8
MOST_TOKENS = 2**21
"""Elements of one list above which a row is oversized: no context is as long."""
FEW_ELEMENTS = 2**22
"""Up to so many elements a column of a row group may hold at any density."""
ELEMENTS_A_BYTE = 64
"""Most token ids a byte of decompressed pages; real rollouts take a bit an id at the least."""
DECODED_BYTES = 24
"""Memory Arrow needs for an element while it decodes: the number, its levels, and a copy as buffers grow."""
MOST_BYTES = 2**29
"""Memory that decoding a piece may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some rows of a row group.

    Attributes:
        row_group: its number.
        first_row: the first row's number within it.
        rows: the rows; oversized ones are null in every column.
        oversized: row of the piece -> (column, elements) of those.
    """

    row_group: int
    first_row: int
    rows: pa.RecordBatch
    oversized: dict[int, tuple[str, int]]


def pieces(shard: Shard, names: list[str], ids: list[str] | None = None, texts: Sequence[str] = ()) -> Iterator[Piece]:
    """A shard from its first row to its last.

    Args:
        shard: the file.
        names: columns to decode.
        ids: those of them that hold token ids; None where that is unknown, and their number is not checked.
        texts: those that hold one text a row. They are read as dictionaries where Arrow can: a text that repeats is in
            memory once, however long it is.

    Raises:
        DataError: pages are damaged, or the file claims what no rollouts are.
    """
    try:
        with open_file(shard.path) as file:
            footer = read_footer(file)
            groups = _checked_row_groups(file, footer, names, ids)
        as_dictionary = [
            name for name in texts if not any(c.delta for group in groups for c in group.chunks if c.path == name)
        ]
        with parquet_file(
            shard.path,
            metadata=footer.metadata,
            page_checksum_verification=True,
            pre_buffer=False,
            buffer_size=BUFFER_BYTES,
            read_dictionary=as_dictionary,
        ) as parquet:
            for number, group in enumerate(groups):
                yield from _row_group(parquet, number, group, names, heavy=_is_heavy(group, as_dictionary))
    except FooterError as error:
        raise error.of(shard.name) from error
    except MemoryError as error:
        raise DataError(
            f"{shard.name} holds a row that takes more than {MOST_BYTES // 2**20} MiB to decode", hint=NO_ROLLOUTS
        ) from error
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise damaged(shard, error) from error


def _checked_row_groups(file: BinaryIO, footer: Footer, names: list[str], ids: list[str] | None) -> list[RowGroup]:
    """The row groups by the footer, of the columns that are read, all page headers checked."""
    groups = []
    for number, group in enumerate(footer.row_groups()):
        read = RowGroup(rows=group.rows, chunks=[chunk for chunk in group.chunks if chunk.column in names])
        page_bytes = {chunk.path: check_pages(file, chunk) for chunk in read.chunks}
        if ids is not None:
            _check_density(number, read, ids, page_bytes)
        groups.append(read)
    return groups


def _check_density(number: int, group: RowGroup, ids: list[str], page_bytes: dict[str, int]) -> None:
    """Raise where there are more token ids than bytes to hold them, or more of anything than of them."""
    tokens = sum(chunk.elements for chunk in group.chunks if chunk.column in ids)
    packed = sum(page_bytes[chunk.path] for chunk in group.chunks if chunk.column in ids)
    if tokens > max(FEW_ELEMENTS, ELEMENTS_A_BYTE * packed):
        raise FooterError(f"found {tokens:,} token ids in {packed:,} bytes of row group {number}", NO_ROLLOUTS)
    # A column has an element for each token at most; response-aligned columns and prompts have fewer.
    most = max((chunk.elements for chunk in group.chunks), default=0)
    if most > max(FEW_ELEMENTS, 2 * (tokens + group.rows)):
        raise FooterError(f"found {most:,} elements beside {tokens:,} token ids in row group {number}", NO_ROLLOUTS)


def _is_heavy(group: RowGroup, dictionaries: list[str]) -> bool:
    """Whether decoding a piece of a row group could take more than MOST_BYTES."""
    # A text that repeats is stored once in a page, and once for each of its rows after decoding.
    texts = [c for c in group.chunks if not c.is_nested and c.is_text and c.path not in dictionaries]
    rows = min(FIRST_ROWS, group.rows)
    decoded = sum(DECODED_BYTES * chunk.elements + 2 * chunk.page_bytes for chunk in group.chunks)
    return decoded + sum(rows * chunk.page_bytes for chunk in texts) > MOST_BYTES


def _row_group(file: pq.ParquetFile, number: int, group: RowGroup, names: list[str], *, heavy: bool) -> Iterator[Piece]:
    """The rows of one row group; from a piece on that is too heavy, row by row."""
    rows_at_once, done = _rows_at_once(group), 0
    while True:
        # After a MemoryError the row group is decoded again from its start, a row at a time; `_after` drops the rows
        # that were yielded. Under the limit no thread may be started: without room for its stack the process ends.
        decoded = file.iter_batches(batch_size=rows_at_once, row_groups=[number], columns=names, use_threads=not heavy)
        try:
            for piece in _filled(_after(decoded, done, heavy), number, done):
                yield piece
                done += piece.rows.num_rows
            break
        except MemoryError:
            if rows_at_once == 1:
                raise
            rows_at_once = 1
    if done != group.rows:
        raise FooterError(f"is damaged: row group {number} holds {done:,} rows, its footer says {group.rows:,}")


def _after(decoded: Iterator[pa.RecordBatch], skip: int, heavy: bool) -> Iterator[pa.RecordBatch]:
    """Decoded batches without the first `skip` rows, decoded under the limit on memory where they are heavy."""
    while True:
        with at_most(MOST_BYTES) if heavy else nullcontext():
            batch = next(decoded, None)
        if batch is None:
            return
        batch.validate(full=True)  # Arrow trusts offsets and texts otherwise
        if skip < batch.num_rows:
            yield batch.slice(skip)
        skip = max(0, skip - batch.num_rows)


def _rows_at_once(group: RowGroup) -> int:
    """How many rows of a row group are decoded at once, by its size in the footer."""
    weight = max(1, sum(chunk.elements for chunk in group.chunks) * ELEMENT_BYTES // max(1, group.rows))
    return int(min(FIRST_ROWS, max(1, BATCH_BYTES // weight)))


def _filled(decoded: Iterator[pa.RecordBatch], row_group: int, first_row: int) -> Iterator[Piece]:
    """Decoded batches concatenated until they weigh BATCH_BYTES or have MOST_ROWS rows, oversized rows made null."""
    pending: list[pa.RecordBatch] = []
    oversized: dict[int, tuple[str, int]] = {}
    weight = rows = 0

    def piece() -> Piece:
        return Piece(row_group=row_group, first_row=first_row, rows=pa.concat_batches(pending), oversized=oversized)

    for batch in decoded:
        batch, its_oversized = _without_oversized_rows(batch)
        oversized |= {rows + row: what for row, what in its_oversized.items()}
        pending.append(batch)
        weight += batch.nbytes
        rows += batch.num_rows
        if weight >= BATCH_BYTES or rows >= MOST_ROWS:
            yield piece()
            first_row += rows
            pending, oversized, weight, rows = [], {}, 0, 0
    if pending:
        yield piece()


def _without_oversized_rows(batch: pa.RecordBatch) -> tuple[pa.RecordBatch, dict[int, tuple[str, int]]]:
    """The rows, oversized ones null; and row -> (column, elements) of those."""
    oversized: dict[int, tuple[str, int]] = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if list_item_type(field.type) is not None and batch.num_rows:
            lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
            for row in np.flatnonzero(lengths > MOST_TOKENS).tolist():
                oversized.setdefault(row, (field.name, int(lengths[row])))
    if oversized:
        index = pa.array([None if row in oversized else row for row in range(batch.num_rows)], type=pa.int64())
        batch = batch.take(index)
    return batch, oversized


def refuse_oversized_rows(shard: Shard, piece: Piece) -> None:
    """Raise DataError where a piece has oversized rows, for work that must not lose any."""
    for row, (column, elements) in piece.oversized.items():
        raise DataError(
            f"{shard.name}, row group {piece.row_group}, row {piece.first_row + row}, column {column}: "
            f"found {elements:,} elements, expected at most {MOST_TOKENS:,}",
            hint=NO_ROLLOUTS,
        )


def damaged(shard: Shard, error: BaseException) -> DataError:
    """The error for a file that Arrow cannot read."""
    return DataError(f"{shard.name} is damaged: {first_line(error)}", hint=COPY_AGAIN)
