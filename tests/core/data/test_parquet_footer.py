"""What a footer and page headers claim is compared with the file's size before anything is allocated."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from critic_train.data.parquet_footer import Chunk, FooterError, check_pages, read_footer
from critic_train.data.shards import find_shards
from critic_train.errors import DataError


def varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def integer(step: int, number: int) -> bytes:
    """A Thrift field of type i32, `step` fields after the last."""
    return bytes([step << 4 | 5]) + varint(2 * number)


def list_of(step: int, items: list[bytes], claimed: int | None = None) -> bytes:
    return bytes([step << 4 | 9, 15 << 4 | 12]) + varint(len(items) if claimed is None else claimed) + b"".join(items)


def group(name: bytes, children: int) -> bytes:
    """A schema element: its name and the number of its children."""
    return b"\x48" + varint(len(name)) + name + integer(1, children) + b"\0"


def parquet(folder: Path, schema: list[bytes], row_groups: list[bytes], claimed: int | None = None) -> str:
    """A file that is nothing but a footer; large enough for its one row."""
    footer = integer(1, 1) + list_of(1, schema) + integer(1, 1) + list_of(1, row_groups, claimed) + b"\0"
    path = folder / "a.parquet"
    path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    return str(path)


@pytest.mark.parametrize(("depth", "said"), [(500, "nested 500 deep"), (200_000, "a schema of 200,000 columns")])
def test_columns_nested_in_columns(tmp_path: Path, depth: int, said: str) -> None:
    path = parquet(tmp_path, [group(b"a", 1)] * (depth - 1) + [group(b"a", 0)], [])
    with pytest.raises(DataError, match=said):
        find_shards([path])


def test_many_row_groups(tmp_path: Path) -> None:
    one = b"\x19\x0c" + integer(1, 0) + integer(1, 0) + b"\0"
    path = parquet(tmp_path, [group(b"a", 0)], [one] * 150_000)
    with pytest.raises(DataError, match="found 150,000 row groups, expected at most 100,000"):
        find_shards([path])


def test_a_claim_of_more_row_groups_than_there_is_room_for(tmp_path: Path) -> None:
    path = parquet(tmp_path, [group(b"a", 0)], [], claimed=10**9)
    with pytest.raises(DataError, match="found 1,000,000,000 row groups, expected at most 100,000"):
        find_shards([path])
    path = parquet(tmp_path, [group(b"a", 0)], [], claimed=99_999)
    with open(path, "rb") as file, pytest.raises(FooterError, match="it claims a list of 99,999 elements"):
        read_footer(file)


def test_a_footer_larger_than_any(tmp_path: Path) -> None:
    with (tmp_path / "a.parquet").open("wb") as file:
        file.write(b"PAR1")
        file.seek(2**26)
        file.write((2**25 + 1).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(DataError, match="found a Parquet footer of 33,554,433 bytes, expected at most 33,554,432"):
        find_shards([str(tmp_path / "a.parquet")])


@pytest.mark.parametrize(
    ("unpacked", "packed", "said"),
    [
        (2**31 - 1, 10, "found a page of x that unpacks to 2,147,483,647 bytes, expected at most 268,435,456"),
        (10, 2**31 - 1, "is damaged: a page of x does not fit into its column chunk"),
        (10, 10, "is damaged: x holds 7 elements, its footer says 8"),
    ],
)
def test_pages_that_claim_what_cannot_be(unpacked: int, packed: int, said: str) -> None:
    data_page = integer(1, 7) + integer(1, 0) + integer(1, 3) + integer(1, 3) + b"\0"
    header = integer(1, 0) + integer(1, unpacked) + integer(1, packed) + b"\x2c" + data_page + b"\0"
    content = header + bytes(10)
    chunk = Chunk(
        column="x",
        path="x",
        elements=8,
        start=0,
        end=len(content),
        page_bytes=10,
        is_nested=False,
        is_integer=True,
        is_text=False,
        delta=False,
        nulls=None,
    )
    with pytest.raises(FooterError) as caught:
        check_pages(BytesIO(content), chunk)
    assert str(caught.value) == said


def test_own_reading_of_a_footer_agrees_with_arrow(shards: Any) -> None:
    """On every column chunk of a file with pages, dictionaries and nested columns."""
    lengths = [5, 9, 3, 7] * 50
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = pa.ListArray.from_arrays(offsets, np.arange(sum(lengths)) % 100)
    numbers = pa.ListArray.from_arrays(offsets, np.zeros(sum(lengths), dtype=np.float32))
    table = pa.table({"input_ids": ids, "returns": numbers, "uid": pa.array([None, "b", "c", "d"] * 50)})
    path = shards.write(table, row_group_size=70, compression="zstd", data_page_size=100)
    arrow = pq.read_metadata(path)
    with path.open("rb") as file:
        footer = read_footer(file)
    groups = footer.row_groups()
    assert [g.rows for g in groups] == [arrow.row_group(i).num_rows for i in range(arrow.num_row_groups)]
    assert (footer.file_bytes, len(footer.content)) == (path.stat().st_size, arrow.serialized_size)
    for number, mine in enumerate(groups):
        for at, chunk in enumerate(mine.chunks):
            theirs = arrow.row_group(number).column(at)
            assert chunk.path == theirs.path_in_schema
            assert chunk.elements == theirs.num_values
            assert chunk.page_bytes == theirs.total_uncompressed_size
            assert chunk.end - chunk.start == theirs.total_compressed_size
            assert chunk.start == min(theirs.dictionary_page_offset or theirs.data_page_offset, theirs.data_page_offset)
            assert chunk.nulls == theirs.statistics.null_count
            assert (chunk.is_integer, chunk.is_text) == (
                theirs.physical_type in ("INT32", "INT64"),
                theirs.physical_type == "BYTE_ARRAY",
            )
