"""Damaged and hostile shards: named, and read in bounded memory."""

import tracemalloc
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from critic_train.data import decoding
from critic_train.data.reading import Needs, RowLimits
from critic_train.errors import DataError


def ragged_table(rows: int, tokens: int) -> pa.Table:
    """Rollouts of equal length without sharing."""
    draw = np.random.default_rng(0)
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * tokens)
    mask = np.tile(np.arange(tokens) >= tokens // 2, rows)
    columns = {
        "input_ids": draw.integers(0, 1000, rows * tokens).astype(np.int32),
        "response_mask": mask,
        "returns": draw.normal(size=rows * tokens).astype(np.float32),
        "values": draw.normal(size=rows * tokens).astype(np.float32),
    }
    return pa.table({name: pa.ListArray.from_arrays(offsets, pa.array(flat)) for name, flat in columns.items()})


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_flipped_byte_in_a_page_with_a_checksum(shards: Any, place: float) -> None:
    path = shards.write(ragged_table(200, 50), write_page_checksum=True, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 0x10
    path.write_bytes(content)
    reader = shards.reader()
    with pytest.raises(DataError, match=r"a\.parquet is damaged: ") as caught:
        list(reader)
    assert "\n" not in caught.value.message


def test_pages_of_zeros(shards: Any) -> None:
    path = shards.write(ragged_table(200, 50))
    content = path.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    path.write_bytes(content[:4] + bytes(len(content) - footer - 4) + content[-footer:])
    with pytest.raises(DataError, match=r"a\.parquet is damaged: "):
        list(shards.reader())


def test_a_file_that_vanishes(shards: Any, good: dict[str, Any]) -> None:
    path = shards.write(good)
    reader = shards.reader()
    path.unlink()
    with pytest.raises(DataError, match=r"a\.parquet"):
        list(reader)


def test_a_large_row_group_is_read_in_bounded_memory(shards: Any) -> None:
    rows, tokens = 50_000, 100
    shards.write(ragged_table(rows, tokens), row_group_size=rows)
    decoded = rows * tokens * 13
    before = pa.total_allocated_bytes()
    most_arrow = seen = 0
    tracemalloc.start()
    try:
        for batch in shards.reader():
            most_arrow = max(most_arrow, pa.total_allocated_bytes() - before)
            seen += len(batch)
        most_python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen == rows
    # A batch aims at 16 MiB of Arrow; numpy needs a few times that while checking.
    assert most_arrow < 48 * 2**20 < decoded
    assert most_python < 100 * 2**20


def test_batches_follow_the_weight_of_rows(shards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "BATCH_BYTES", 2**16)
    shards.write(ragged_table(300, 10), "a.parquet")
    shards.write(ragged_table(40, 2000), "b.parquet")
    shards.write(ragged_table(300, 10), "c.parquet")
    sizes = [(len(batch), int(batch.lengths[0])) for batch in shards.reader()]
    assert sum(n for n, _ in sizes) == 640
    assert all(n * tokens * 13 <= 2 * 2**16 for n, tokens in sizes)
    assert {n for n, tokens in sizes if tokens == 2000} <= {1, 2, 3}


def test_a_giant_row_among_small_ones(shards: Any) -> None:
    lengths = [4, 400_000, 4]
    columns = {
        "input_ids": [np.zeros(n, dtype=np.int32) for n in lengths],
        "response_mask": [np.arange(n) > 1 for n in lengths],
        "returns": [np.ones(n, dtype=np.float32) for n in lengths],
    }
    shards.write(columns)
    assert shards.read(needs=Needs(values=False)).lengths.tolist() == lengths
    reader = shards.reader(needs=Needs(values=False), on_bad_rows="skip", limits=RowLimits(max_length=4096))
    assert [batch.row.tolist() for batch in reader] == [[0, 2]]
    assert reader.bad_rows.first[0].actual == "400000 tokens"


def test_a_long_uid_that_repeats_is_kept_once(shards: Any, good: dict[str, Any]) -> None:
    rows = 512
    table = pa.table({name: rows_ * rows for name, rows_ in {n: r[:1] for n, r in good.items()}.items()})
    uid = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, dtype=np.int32)), ["x" * 2**20])
    path = shards.write(table.append_column("uid", uid.cast(pa.string())), compression="zstd")
    assert path.stat().st_size < 10_000
    before, most = pa.total_allocated_bytes(), 0
    groups: set[int] = set()
    for batch in shards.reader():
        most = max(most, pa.total_allocated_bytes() - before)
        groups |= set(batch.group.tolist())
    assert len(groups) == 1
    assert most < 32 * 2**20
