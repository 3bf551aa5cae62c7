"""Columns with one entry a rollout: keys of prompt groups, and labels for slicing."""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from critic_train.rollouts import Rollouts

MISSING = "(none)"
"""The label of a rollout whose column is null."""

LONGEST_LABEL = 200
"""Characters."""


def uid_keys(column: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Keys of a uid column: equal where the uids have the same text, in any file and of any type.

    Returns:
        (int64 [n] keys, bool [n] whether the row has a uid). Only distinct uids are hashed.
    """
    if not pa.types.is_dictionary(column.type):
        column = (column if _is_plain(column.type) else _as_text(column)).dictionary_encode()
    keys = np.asarray([_key(str(uid).encode()) for uid in column.dictionary.to_pylist()] or [0], dtype=np.int64)
    indices = pc.fill_null(column.indices, pa.scalar(0).cast(column.indices.type)).to_numpy(zero_copy_only=False)
    return keys[indices], column.is_valid().to_numpy(zero_copy_only=False)


def uid_texts(column: pa.Array) -> list[str | None]:
    """The uids of some rows as `uid_keys` reads them; None where a row has none."""
    items = (column if _is_plain(column.type) else _as_text(column)).to_pylist()
    return [None if item is None else str(item) for item in items]


def prompt_keys(rollouts: Rollouts) -> NDArray[np.int64]:
    """int64 [n]: a key of the tokens before the first response token; equal prompts have equal keys."""
    if not len(rollouts):
        return np.zeros(0, dtype=np.int64)
    at = np.flatnonzero(rollouts.response_mask)
    first = at[np.searchsorted(at, rollouts.offsets[:-1])]
    ids = rollouts.input_ids.tobytes()
    spans = zip(rollouts.offsets[:-1].tolist(), first.tolist(), strict=True)
    return np.asarray([_key(ids[4 * start : 4 * stop]) for start, stop in spans], dtype=np.int64)


def label_kind(kind: pa.DataType) -> str:
    """The kind of a label column in memory: "bool", "int", "float" or "text"."""
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind):
        return "int"
    return "float" if pa.types.is_floating(kind) else "text"


def label_column(column: pa.Array, *, as_text: bool) -> NDArray[Any]:
    """A label column as numpy.

    Args:
        column: one value a rollout.
        as_text: as text whatever the type, since files differ or entries are missing somewhere. It must not depend on
            the batch: 3 and "3" would be two slices.
    """
    if as_text or label_kind(column.type) == "text" or column.null_count:
        if not pa.types.is_dictionary(column.type):
            column = (column if _is_plain(column.type) else _as_text(column)).dictionary_encode()
        # A long text in many rows is shortened once.
        items = column.dictionary.to_pylist()
        distinct = [MISSING if item is None else _short(str(item)) for item in items] + [MISSING]
        indices = pc.fill_null(column.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
        return np.asarray(np.asarray(distinct, dtype=np.str_)[indices])
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _short(text: str) -> str:
    """The text, or its beginning and a digest of all of it: labels are in memory for every rollout, and in tables."""
    if len(text) <= LONGEST_LABEL:
        return text
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    return f"{text[: LONGEST_LABEL - 12]}... {digest}"


def _is_plain(kind: pa.DataType) -> bool:
    """Whether `str` of the Python value is the text of the entry."""
    if pa.types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_float32(kind)
        or pa.types.is_float64(kind)
    )


def _as_text(column: pa.Array) -> pa.Array:
    """Decimals, dates and times as Arrow casts them to text; bytes, and types without a cast, as Python's `str`."""
    if not _is_bytes(column.type):
        try:
            return pc.cast(column, pa.string())
        except pa.ArrowException:
            pass
    return pa.array([None if item is None else str(item) for item in column.to_pylist()], type=pa.string())


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _key(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
