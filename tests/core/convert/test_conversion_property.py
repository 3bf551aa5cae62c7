"""One data set, written in any order of columns, files, row groups, encodings and list types: the same rollouts."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st

LISTS = (pa.list_, pa.large_list)
INTEGERS = (pa.int16(), pa.int32(), pa.int64(), pa.uint32())
FLOATS = (pa.float32(), pa.float64())
NAMES = {"input_ids": "tokens", "response_mask": "loss_mask", "returns": "returns_to_go", "values": "vpreds"}


def rollouts() -> list[dict[str, Any]]:
    draw = np.random.default_rng(5)
    made = []
    for i in range(12):
        prompt, response = [i // 4 + 3, 7], draw.integers(1, 900, int(draw.integers(1, 6))).tolist()
        mask = [0] * len(prompt) + draw.integers(0, 2, len(response) - 1).tolist() + [1]
        numbers = [np.float32(x).item() for x in draw.normal(size=len(mask))]
        made.append(
            {
                "input_ids": prompt + response, "response_mask": mask, "reward": float(i % 3) / 2, "uid": f"g{i // 4}",
                "returns": [x * m for x, m in zip(numbers, mask, strict=True)],
                "values": [x * m / 2 for x, m in zip(numbers, mask, strict=True)], "task": "sums" if i % 2 else "words",
            }
        )  # fmt: skip
    return made


ROLLOUTS = rollouts()


def typed(draw: Any, name: str, rows: list[dict[str, Any]]) -> pa.Array:
    entries = [row[name] for row in rows]
    if not isinstance(entries[0], list):
        array = pa.array(entries)
        return array.dictionary_encode() if pa.types.is_string(array.type) and draw(st.booleans()) else array
    if name == "input_ids":
        item = draw(st.sampled_from(INTEGERS))
    else:
        item = draw(st.sampled_from((*INTEGERS, pa.bool_(), pa.float32()) if name == "response_mask" else FLOATS))
    if item == pa.bool_():
        entries = [list(map(bool, entry)) for entry in entries]
    return pa.array(entries, type=draw(st.sampled_from(LISTS))(item))


def write(draw: Any, rows: list[dict[str, Any]], path: Path) -> None:
    """Some rollouts as Parquet, Arrow or JSON, under the canonical names or others, columns in any order."""
    columns = draw(st.permutations(list(rows[0])))
    names = {name: NAMES.get(name, name) if draw(st.booleans()) else name for name in columns}
    kind = draw(st.sampled_from(("parquet", "arrow", "jsonl", "json")))
    if kind in ("jsonl", "json"):
        records = [{names[name]: row[name] for name in columns} for row in rows]
        lines = "\n".join(map(json.dumps, records))
        path.with_suffix(f".{kind}").write_text(lines if kind == "jsonl" else json.dumps(records, indent=1))
        return
    table = pa.table({names[name]: typed(draw, name, rows) for name in columns})
    if kind == "arrow":
        with pa.OSFile(str(path.with_suffix(".arrow")), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=draw(st.integers(1, 5)))
        return
    pq.write_table(
        table,
        path.with_suffix(".parquet"),
        row_group_size=draw(st.integers(1, 8)),
        compression=draw(st.sampled_from(("none", "snappy", "zstd"))),
        use_dictionary=draw(st.booleans()),
        data_page_version=draw(st.sampled_from(("1.0", "2.0"))),
    )


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_the_same_rollouts_whatever_the_files(data: Any) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ROLLOUTS) - 1), max_size=3)))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "dump").mkdir()
        for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(ROLLOUTS)], strict=True)):
            write(data.draw, ROLLOUTS[start:stop], Path(folder) / "dump" / f"part{number}")
        done = run(Path(folder) / "shards", Path(folder) / "dump")
        found = [{name: row[name] for name in ROLLOUTS[0]} for row in done.table.to_pylist()]
    assert found == [{**row, "response_mask": list(map(bool, row["response_mask"]))} for row in ROLLOUTS]
