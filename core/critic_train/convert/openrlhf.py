"""Files of the snippet in docs/guides/convert.md, which saves OpenRLHF's `Experience` batches.

Fields as in OpenRLHF 0.11 (openrlhf/trainer/ppo_utils/experience.py). `sequences` [B, T] are padded; columns of
actions are [B, A] with A below T, and pair with the last A tokens.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from critic_train.convert.raw_records import ObjectFormat, Records, column_of, matrix_column
from critic_train.errors import DataError

KIND = "OpenRLHF Experience"
ACTION_COLUMNS = ("values", "returns")
SINGLE = {"rewards": "reward", "scores": "score", "truncated": "truncated", "labels": "label", "index": "index"}
"""Field with one entry a rollout -> the shard's column."""


def kind_of(content: Any) -> str | None:
    """KIND of what the snippet writes, None of anything else."""
    batches = content.get("experiences") if isinstance(content, dict) else None
    first = batches[0] if isinstance(batches, list) and batches else None
    return KIND if isinstance(first, dict) and "sequences" in first and "action_mask" in first else None


def records(content: dict[str, Any]) -> Iterator[Records]:
    """The rollouts of every batch.

    Raises:
        DataError: a batch lacks a field, or its fields disagree in shape.
    """
    first = 0
    for number, batch in enumerate(content["experiences"]):
        columns = _columns(batch, f"experience {number}")
        count = len(columns["input_ids"])
        if isinstance(content.get("step"), int):
            columns["step"] = pa.array([content["step"]] * count)
        yield Records(batch=pa.record_batch(columns), rows=np.arange(first, first + count))
        first += count


def _columns(batch: Any, where: str) -> dict[str, pa.Array]:
    fields = batch if isinstance(batch, dict) else {}
    matrices = {name: value for name, value in fields.items() if isinstance(value, np.ndarray) and value.ndim == 2}
    missing = {"sequences", "attention_mask", "action_mask"} - set(matrices)
    if missing:
        raise DataError(f"{where} has no {' and '.join(sorted(missing))} [rollouts, tokens]")
    count, width = matrices["sequences"].shape
    actions = matrices["action_mask"].shape[1]
    columns = {
        "input_ids": matrix_column(matrices["sequences"]),
        "attention_mask": matrix_column(matrices["attention_mask"]),
    }
    for name in ("action_mask", *ACTION_COLUMNS):
        if name in matrices:
            if matrices[name].shape != (count, actions) or actions > width:
                raise DataError(f"{where}: `{name}` is {matrices[name].shape}, beside {count} x {width} tokens")
            # Over all tokens, since an action mask of the response alone does not say where padding begins.
            padded = np.zeros((count, width), dtype=matrices[name].dtype)
            padded[:, width - actions :] = matrices[name]
            columns["response_mask" if name == "action_mask" else name] = matrix_column(padded)
    for name, canonical in SINGLE.items():
        entries = fields.get(name)
        entries = entries.reshape(-1).tolist() if isinstance(entries, np.ndarray) else entries
        array = column_of(entries) if isinstance(entries, list) and len(entries) == count else None
        if array is not None and not pa.types.is_nested(array.type) and array.null_count < count:
            columns[canonical] = array.cast(pa.bool_()) if canonical == "truncated" else array
    return columns


FORMAT = ObjectFormat(
    name="openrlhf", title="OpenRLHF .pt of the snippet in docs/guides/convert.md", recognise=kind_of, read=records
)
