"""Rollouts as the Arrow columns of a canonical shard."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

TOKEN_COLUMNS = {
    "input_ids": pa.list_(pa.int32()),
    "response_mask": pa.list_(pa.bool_()),
    "values": pa.list_(pa.float32()),
    "returns": pa.list_(pa.float32()),
    "rewards": pa.list_(pa.float32()),
    "advantages": pa.list_(pa.float32()),
}
"""One number a token, aligned to the token it pairs with, as long as the rollout."""

ROLLOUT_COLUMNS = {"reward": pa.float64(), "truncated": pa.bool_()}
"""One entry a rollout."""


def rollout_table(
    offsets: NDArray[np.int64], tokens: dict[str, NDArray[Any]], rollouts: dict[str, Any] | None = None
) -> pa.Table:
    """Ragged numpy columns as a table with the canonical names' types.

    Args:
        offsets: int64 [n+1]; rollout i owns tokens offsets[i]:offsets[i+1].
        tokens: name of TOKEN_COLUMNS -> [T], cast to the column's type; `input_ids` and `response_mask` among them.
        rollouts: name -> one entry a rollout [n]: uid, task, reward, truncated, step, ...; a list, an array, or an
            Arrow array, in whatever type it has unless ROLLOUT_COLUMNS says one.

    Returns:
        Columns in the order: uid and the other rollout columns as given, then the token columns.

    Raises:
        ValueError: a column is not as long as the offsets say.
    """
    columns: dict[str, pa.Array] = {}
    count = len(offsets) - 1
    for name, entries in (rollouts or {}).items():
        columns[name] = pa.array(entries, type=ROLLOUT_COLUMNS.get(name))
        if len(columns[name]) != count:
            raise ValueError(f"{name}: {len(columns[name])} entries for {count} rollouts")
    for name, flat in tokens.items():
        if len(flat) != offsets[-1]:
            raise ValueError(f"{name}: {len(flat)} entries for {offsets[-1]} tokens")
        columns[name] = token_column(flat, offsets, TOKEN_COLUMNS[name])
    return pa.table(columns)


def token_column(flat: NDArray[Any], offsets: NDArray[np.int64], kind: pa.DataType) -> pa.ListArray:
    """A ragged column as a list array.

    Args:
        flat: [T], the lists end to end.
        offsets: int64 [n+1].
        kind: the list's type, with 32-bit offsets.

    Raises:
        ValueError: more than 2^31 - 1 tokens at once.
    """
    if len(flat) > np.iinfo(np.int32).max:
        raise ValueError(f"{len(flat):,} tokens are too many for one batch")
    items = pa.array(np.ascontiguousarray(flat, dtype=numpy_dtype(kind.value_type)), type=kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), items).cast(kind)


def numpy_dtype(kind: pa.DataType) -> np.dtype[Any]:
    """numpy's name of a type of numbers or booleans. (pyarrow's own answer needs pandas up to pyarrow 22.)"""
    if pa.types.is_boolean(kind):
        return np.dtype(np.bool_)
    letter = "f" if pa.types.is_floating(kind) else "u" if pa.types.is_unsigned_integer(kind) else "i"
    return np.dtype(f"{letter}{kind.bit_width // 8}")
