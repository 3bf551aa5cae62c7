"""Decode a shard's columns piece by piece, in bounded memory, page checksums verified."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from critic_train.data.shards import Shard
from critic_train.errors import DataError

COPY_AGAIN = "copy the file again, or take it out of --data"
FIRST_ROWS = 64
"""Rows decoded at once, at most: one look at a batch's weight comes after so many."""
MOST_ROWS = 8192
BATCH_BYTES = 16 * 2**20
"""Arrow bytes at which a batch of rows is full."""
BUFFER_BYTES = 2**18
"""What is read of a column's pages ahead of decoding; without it a whole column of a row group is."""
ELEMENT_BYTES = 8
MOST_ELEMENTS = 2**26
"""Elements of one list on average above which a row group is refused: no context is as long, and a file of a few
hundred bytes can claim it."""


def batches(shard: Shard, names: list[str], dictionaries: list[str]) -> Iterator[tuple[int, int, pa.RecordBatch]]:
    """(row group, first row within it, rows) of a shard, from its first row to its last.

    Args:
        shard: the file.
        names: columns to decode.
        dictionaries: text columns to keep as dictionaries: what repeats is held once, however long it is.

    Raises:
        DataError: pages are damaged, or the file claims what no rollouts are.
    """
    try:
        with pq.ParquetFile(shard.path) as file:
            kept = [name for name in dictionaries if _is_read_as_dictionary(file.metadata, name)]
        with pq.ParquetFile(
            shard.path,
            page_checksum_verification=True,
            pre_buffer=False,
            buffer_size=BUFFER_BYTES,
            read_dictionary=kept,
        ) as file:
            for row_group in range(file.metadata.num_row_groups):
                first_row = 0
                footer = file.metadata.row_group(row_group)
                rows = _rows_at_once(footer, row_group, names, shard)
                for batch in _filled(file.iter_batches(batch_size=rows, row_groups=[row_group], columns=names)):
                    yield row_group, first_row, batch
                    first_row += batch.num_rows
                if first_row != footer.num_rows:
                    raise DataError(
                        f"{shard.name} is damaged: row group {row_group} holds {first_row:,} rows, its footer says "
                        f"{footer.num_rows:,}",
                        hint=COPY_AGAIN,
                    )
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise damaged(shard, error) from error


def _is_read_as_dictionary(footer: pq.FileMetaData, name: str) -> bool:
    """Whether Arrow can read a flat column so: it cannot where delta encodings were used."""
    at = footer.schema.names.index(name)
    chunks = (footer.row_group(i).column(at) for i in range(footer.num_row_groups))
    return not any(encoding.startswith("DELTA") for chunk in chunks for encoding in chunk.encodings)


def _rows_at_once(footer: pq.RowGroupMetaData, row_group: int, names: list[str], shard: Shard) -> int:
    """How many rows of a row group are decoded at once, by what its footer says of its size."""
    columns = [footer.column(i) for i in range(footer.num_columns)]
    read = [column for column in columns if column.path_in_schema.split(".", 1)[0] in names]
    rows = max(1, footer.num_rows)
    longest = max((column.num_values // rows for column in read), default=0)
    if longest > MOST_ELEMENTS:
        raise DataError(
            f"{shard.name}, row group {row_group}: found lists of {longest:,} elements on average, "
            f"expected at most {MOST_ELEMENTS:,}",
            hint="no rollout is as long; check the file, or take it out of --data",
        )
    weight = max(1, sum(column.num_values for column in read) * ELEMENT_BYTES // rows)
    return int(min(FIRST_ROWS, max(1, BATCH_BYTES // weight)))


def _filled(pieces: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Pieces put together until they weigh BATCH_BYTES or are MOST_ROWS rows."""
    pending: list[pa.RecordBatch] = []
    weight = rows = 0
    for piece in pieces:
        pending.append(piece)
        weight += piece.nbytes
        rows += piece.num_rows
        if weight >= BATCH_BYTES or rows >= MOST_ROWS:
            yield pa.concat_batches(pending)
            pending, weight, rows = [], 0, 0
    if pending:
        yield pa.concat_batches(pending)


def damaged(shard: Shard, error: BaseException) -> DataError:
    """What is said of a file that Arrow cannot make sense of."""
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(f"{shard.name} is damaged: {why}", hint=COPY_AGAIN)
