"""verl's `DataProto.save_to_disk`: a pickle of a tensor dictionary, arrays of objects and a meta dictionary.

Read against verl 0.9.1 (verl/protocol.py). The prompt is padded on its left, the response on its right; columns of
the response's width pair with its tokens. `VERL_DATAPROTO_SERIALIZATION_METHOD=numpy` writes the batch another way.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from critic_train.convert.dump_names import DataProtoState, TensorDictState
from critic_train.convert.dump_tensors import Memory, RefusedError, torch_array
from critic_train.convert.raw_records import ObjectFormat, Records, column_of, matrix_column, ragged_column
from critic_train.convert.unpickle import half_of_memory, load_bytes
from critic_train.errors import DataError

KIND = "verl DataProto"
TOKENS = ("prompts", "responses", "input_ids", "attention_mask", "response_mask", "loss_mask", "info_mask")
"""`loss_mask` (verl 0.4, 0.5) and Search-R1's `info_mask` are as wide as `input_ids`, and 0 on what tools answered."""
RESPONSE_COLUMNS = {"values": "values", "returns": "returns", "token_level_rewards": "rewards"}
SCORES = ("token_level_scores", "rm_scores")
"""Read as rewards where there are no `token_level_rewards`, the first that is there."""
RENAMED = {"data_source": "task"}


def kind_of(content: Any) -> str | None:
    """KIND of a DataProto, None of anything else."""
    return KIND if isinstance(content, DataProtoState) and content.state is not None else None


def records(content: DataProtoState) -> Iterator[Records]:
    """The rollouts of a DataProto.

    Raises:
        DataError: it has no responses, or its columns disagree in length.
    """
    tensors, objects, meta = content.state
    batch = _batch(tensors)
    if "responses" not in batch:
        names = ", ".join(str(name) for name in batch) or "nothing"
        raise DataError(
            f"the DataProto holds no `responses`; it holds {names}",
            hint="save the batch after the advantages are computed, as in batch.save_to_disk(path)",
        )
    columns = _token_columns(batch)
    count = len(columns["responses"])
    others = {name: list(entries) for name, entries in _dictionary(objects).items()}
    odd = [name for name, entries in {**columns, **others}.items() if len(entries) != count]
    if odd:
        raise DataError(f"the DataProto's `{odd[0]}` has not {count} rows, as `responses` has")
    notes = []
    for name, entries in others.items():
        array = column_of(entries)
        if array is None or not _is_single(array.type):
            notes.append(f"`{name}` is left out: it has several values a rollout")
        else:
            columns[RENAMED.get(name, name)] = array.cast(pa.string()) if name == "uid" else array
    step = _dictionary(meta).get("global_steps")
    if isinstance(step, int) and "step" not in columns:
        columns["step"] = pa.array([step] * count)
    yield Records(batch=pa.record_batch(columns), rows=np.arange(count), notes=tuple(notes))


def _batch(batch: Any) -> dict[str, Any]:
    """The tensor dictionary, name -> array [n, ...] or one array a row."""
    if isinstance(batch, bytes | memoryview):
        batch = load_bytes(memoryview(batch))
    elif isinstance(batch, tuple) and len(batch) == 3 and isinstance(batch[2], dict):
        batch = {name: _from_numpy(tensor) for name, tensor in batch[2].items()}
    if isinstance(batch, TensorDictState):
        batch = batch.state
    if not isinstance(batch, dict):
        raise RefusedError("a DataProto whose batch is no tensor dictionary")
    return batch


def _from_numpy(tensor: Any) -> Any:
    """A tensor as (dtype, shape, bytes), a nested one as (layout, those of its parts)."""
    if isinstance(tensor, tuple) and len(tensor) == 3:
        return torch_array(tensor[2], tensor[0], tensor[1], Memory(half_of_memory()))
    if isinstance(tensor, tuple) and len(tensor) == 2 and isinstance(tensor[1], list):
        return [_from_numpy(part) for part in tensor[1]]
    raise RefusedError("a tensor in an unknown form")


def _token_columns(batch: dict[str, Any]) -> dict[str, pa.Array]:
    columns = {name: array for name in TOKENS if (array := _column(batch.get(name))) is not None}
    if "prompts" in columns:
        columns.pop("input_ids", None)
    elif "input_ids" not in columns:
        raise DataError("the DataProto holds neither `prompts` nor `input_ids` beside its `responses`")
    scores = [name for name in SCORES if "token_level_rewards" not in batch and name in batch][:1]
    for name, canonical in {**RESPONSE_COLUMNS, **dict.fromkeys(scores, "rewards")}.items():
        array = _column(batch.get(name))
        if array is not None:
            columns[canonical] = array
    return columns


def _column(rows: Any) -> pa.Array | None:
    if isinstance(rows, np.ndarray) and rows.ndim == 2:
        return matrix_column(rows)
    return ragged_column(rows) if isinstance(rows, Sequence) and len(rows) else None


def _dictionary(value: Any) -> dict[str, Any]:
    return {str(key): entry for key, entry in value.items()} if isinstance(value, dict) else {}


def _is_single(kind: pa.DataType) -> bool:
    return not pa.types.is_nested(kind)


FORMAT = ObjectFormat(name="verl", title="verl DataProto or JSONL", recognise=kind_of, read=records)
