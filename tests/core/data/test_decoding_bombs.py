"""Small files that claim or decode to much: refused by what they claim, or read in bounded memory."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from critic_train.data import decoding
from critic_train.data import parquet_footer as footer
from critic_train.errors import DataError

ROOT = Path(__file__).parents[3]
READ = """
import json, sys
from pathlib import Path
from critic_train.data import decoding, parquet_footer as footer
from critic_train.data.reading import RolloutReader, RowLimits
from critic_train.data.shards import find_shards
from critic_train.errors import DataError
path, labels, ceiling = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
decoding.MOST_BYTES = ceiling or decoding.MOST_BYTES
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
before = peak()
said, rows, reasons = "", 0, {}
try:
    reader = RolloutReader(find_shards([path]), on_bad_rows="skip", labels=labels)
    rows = sum(len(batch) for batch in reader)
    reasons = dict(reader.bad_rows.reasons)
except DataError as error:
    said = error.message
print(json.dumps({"said": said, "rows": rows, "reasons": reasons, "grew": peak() - before}))
"""
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")


def read(path: Path, labels: tuple[str, ...] = (), ceiling: int = 0) -> dict[str, Any]:
    """Read a shard in a process of its own, and say how much memory that took beyond what the imports had."""
    command = [sys.executable, "-c", READ, str(path), json.dumps(labels), str(ceiling)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "core"), "ARROW_DEFAULT_MEMORY_POOL": "system"}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    found: dict[str, Any] = json.loads(shown.stdout)
    return found


def lists(flat: np.ndarray[Any, Any], lengths: list[int]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32)), pa.array(flat))


def rollouts(lengths: list[int], ids: np.ndarray[Any, Any] | None = None, **more: Any) -> pa.Table:
    total = sum(lengths)
    starts = np.append(0, np.cumsum(lengths))[:-1]
    mask = np.ones(total, dtype=bool)
    mask[starts] = False
    numbers = np.zeros(total, dtype=np.float32)
    ids = np.random.default_rng(0).integers(0, 1000, total).astype(np.int32) if ids is None else ids
    columns = {"input_ids": ids, "response_mask": mask, "returns": numbers, "values": numbers}
    return pa.table({name: lists(flat, lengths) for name, flat in columns.items()} | more)


@linux
@pytest.mark.parametrize("column", ["uid", "task"])
def test_a_long_text_in_every_row_is_held_once(shards: Any, column: str) -> None:
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2000, dtype=np.int32)), ["x" * 2**20])
    table = rollouts([4] * 2000, **{column: text})
    path = shards.write(table, compression="zstd", dictionary_pagesize_limit=2**21, store_schema=False)
    assert path.stat().st_size < 50_000  # and 2 GB decoded
    found = read(path, labels=("task",) if column == "task" else ())
    assert (found["rows"], found["said"]) == (2000, "")
    assert found["grew"] < 150 * 2**20


def test_a_text_larger_than_any_page(shards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footer, "MOST_PAGE_BYTES", 2**20)
    shards.write(rollouts([4], uid=["x" * 2**21]), compression="zstd")
    with pytest.raises(DataError, match="found a page of uid that unpacks to 2,097,"):
        list(shards.reader())


@linux
def test_more_rows_than_bytes(shards: Any) -> None:
    empty = pa.array(np.zeros(2_000_001, dtype=np.int32))
    columns = {
        name: pa.ListArray.from_arrays(empty, pa.array([], kind))
        for name, kind in (("input_ids", pa.int32()), ("response_mask", pa.bool_()), ("returns", pa.float32()))
    }
    path = shards.write(pa.table({**columns, "values": columns["returns"]}))
    found = read(path)
    assert f"found a claim of 2,000,000 rows in {path.stat().st_size:,} bytes" in found["said"]
    assert found["grew"] < 30 * 2**20


@linux
def test_a_list_of_one_token_repeated(shards: Any) -> None:
    path = shards.write(rollouts([4, 8_000_000, 4], ids=np.zeros(8_000_008, dtype=np.int32)), compression="zstd")
    found = read(path)
    assert "found 8,000,008 token ids in " in found["said"]
    assert found["grew"] < 30 * 2**20


@linux
def test_a_long_list_beside_few_tokens(shards: Any) -> None:
    table = rollouts([4, 4])
    long = lists(np.zeros(8_000_000, dtype=np.float32), [4, 7_999_996])
    found = read(shards.write(table.set_column(2, "returns", long)))
    assert "found 8,000,000 elements beside 8 token ids in row group 0" in found["said"]
    assert found["grew"] < 30 * 2**20


@linux
def test_a_row_longer_than_any_context_is_bad_and_the_others_are_not(shards: Any) -> None:
    found = read(shards.write(rollouts([4, 2_500_000, 4])))
    assert (found["rows"], found["reasons"]) == (2, {"lists of absurd length": 1})
    assert found["grew"] < 250 * 2**20


@linux
def test_the_ceiling_on_memory_refuses_what_claims_cannot_tell(shards: Any) -> None:
    path = shards.write(rollouts([4, 4_000_000, 4]))
    found = read(path, ceiling=2**24)
    assert found["said"] == f"{path} holds a row that takes more than 16 MiB to decode"
    assert found["grew"] < 100 * 2**20


def test_a_piece_too_heavy_is_taken_row_by_row(shards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shards.write(rollouts([3 + i % 5 for i in range(300)]), row_group_size=150)
    expected = shards.read()
    monkeypatch.setattr(decoding, "MOST_ROWS", 100)
    after = decoding._after

    def heavy(decoded: Iterator[pa.RecordBatch], skip: int, heavy: bool) -> Iterator[pa.RecordBatch]:
        for number, batch in enumerate(after(decoded, skip, heavy)):
            if number == 2 and batch.num_rows > 1:
                raise MemoryError
            yield batch

    monkeypatch.setattr(decoding, "_after", heavy)
    found = shards.read()
    assert found.row.tolist() == expected.row.tolist() == list(range(300))
    assert found.input_ids.tolist() == expected.input_ids.tolist()


def test_texts_in_delta_encoding_are_read(shards: Any, good: dict[str, Any]) -> None:
    """Arrow reads those not as dictionaries."""
    shards.write({**good, "uid": ["aa", "ab", "ab"]}, use_dictionary=False, column_encoding={"uid": "DELTA_BYTE_ARRAY"})
    group = shards.read().group.tolist()
    assert group[0] != group[1] == group[2]
