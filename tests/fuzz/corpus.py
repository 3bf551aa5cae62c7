"""The sound shards that mutation starts from: small, and between them every encoding that rollouts are written in.

python tests/fuzz/corpus.py      # writes tests/fuzz/corpus anew: other mutants, so only on purpose
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

VOCABULARY = 60
CORPUS = Path(__file__).with_name("corpus")


def rollouts(rows: int, seed: int) -> dict[str, list[Any]]:
    """Rollouts of 5 to 24 tokens with gaps in their masks, as plain lists."""
    draw = np.random.default_rng(seed)
    columns: dict[str, list[Any]] = {name: [] for name in ("uid", "input_ids", "response_mask", "values", "returns")}
    for row in range(rows):
        prompt, response = int(draw.integers(2, 8)), int(draw.integers(3, 17))
        mask = [False] * prompt + [True] + draw.integers(0, 2, response - 1).astype(bool).tolist()
        columns["uid"].append(f"prompt-{row // 4}")
        columns["input_ids"].append(draw.integers(0, VOCABULARY, prompt + response).tolist())
        columns["response_mask"].append(mask)
        for name in ("values", "returns"):
            columns[name].append(draw.normal(size=prompt + response).round(3).tolist())
    return columns


def table(rows: int, seed: int, kinds: dict[str, pa.DataType]) -> pa.Table:
    """The same as a table, list items in the types given."""
    columns = rollouts(rows, seed)
    return pa.table(
        {
            name: pa.array(columns[name], kind if name != "response_mask" else None).cast(kind)
            for name, kind in kinds.items()
        }
    )


NARROW = {
    "uid": pa.string(),
    "input_ids": pa.list_(pa.int32()),
    "response_mask": pa.list_(pa.bool_()),
    "values": pa.list_(pa.float32()),
    "returns": pa.list_(pa.float32()),
}
WIDE = {
    "uid": pa.large_string(),
    "input_ids": pa.large_list(pa.int64()),
    "response_mask": pa.large_list(pa.int8()),
    "values": pa.large_list(pa.float64()),
    "returns": pa.large_list(pa.float64()),
}
FLOATS = ["values.list.element", "returns.list.element"]
HOW: dict[str, tuple[dict[str, pa.DataType], dict[str, Any]]] = {
    "plain": (NARROW, {"compression": "none", "use_dictionary": False}),
    "dictionary": (NARROW, {"compression": "snappy"}),
    "canonical": (
        NARROW,
        {
            "compression": "zstd",
            "use_dictionary": ["uid"],
            "use_byte_stream_split": FLOATS,
            "write_page_checksum": True,
        },
    ),
    "wide": (WIDE, {"compression": "gzip", "data_page_version": "2.0", "row_group_size": 5}),
    "pages": (WIDE, {"compression": "lz4", "data_page_size": 64, "write_batch_size": 2, "write_page_index": True}),
    "delta": (
        NARROW,
        {
            "compression": "none",
            "use_dictionary": False,
            "column_encoding": {"uid": "DELTA_BYTE_ARRAY", "input_ids.list.element": "DELTA_BINARY_PACKED"},
        },
    ),
}


def seeds() -> Iterator[tuple[str, bytes]]:
    """(name, content) of each."""
    for name in HOW:
        yield name, (CORPUS / f"{name}.parquet").read_bytes()


if __name__ == "__main__":
    CORPUS.mkdir(exist_ok=True)
    for number, (name, (kinds, how)) in enumerate(HOW.items()):
        pq.write_table(table(16, number, kinds), CORPUS / f"{name}.parquet", **how)
