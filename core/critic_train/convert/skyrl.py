"""SkyRL's `dump_data_batch`: a pickle of a TrainingInputBatch, as `global_step_N_training_input.pkl`.

Read against SkyRL's skyrl/backends/skyrl_train/training_batch.py. `sequences` and `attention_mask` are padded on the
left; all other token columns are of the response's width and pair with the last tokens. `response_mask` is 1 on all
tokens behind the prompt, `loss_mask` on those of the policy alone.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from critic_train.convert.dump_names import TensorBatchState
from critic_train.convert.dump_tensors import Memory, RefusedError, torch_array
from critic_train.convert.raw_records import ObjectFormat, Records, column_of, matrix_column
from critic_train.convert.unpickle import half_of_memory
from critic_train.errors import DataError

KIND = "SkyRL training batch"
TOKENS = ("sequences", "attention_mask", "response_mask", "loss_mask", "values", "returns", "rewards")
INSTEAD_OF_REWARDS = ("custom_rewards", "rm_rewards")
"""Read as rewards where there are none, the first that is there."""


def kind_of(content: Any) -> str | None:
    """KIND of a TrainingInputBatch, None of anything else."""
    return KIND if isinstance(content, TensorBatchState) and isinstance(content.state, dict) else None


def records(content: TensorBatchState) -> Iterator[Records]:
    """The rollouts of a batch.

    Raises:
        DataError: it has no sequences, or its columns disagree in length.
    """
    tensors, meta = content.state.get("batch_dict"), content.state.get("metadata")
    batch = {str(name): _tensor(entry) for name, entry in (tensors if isinstance(tensors, dict) else {}).items()}
    if "sequences" not in batch:
        raise DataError(f"the batch holds no `sequences`; it holds {', '.join(batch) or 'nothing'}")
    count = len(batch["sequences"])
    if "rewards" not in batch:
        first = next((batch[name] for name in INSTEAD_OF_REWARDS if batch.get(name) is not None), None)
        batch |= {} if first is None else {"rewards": first}
    columns: dict[str, pa.Array] = {}
    for name in TOKENS:
        entries = batch.get(name)
        if isinstance(entries, np.ndarray) and entries.ndim == 2:
            columns[name] = matrix_column(entries)
        elif isinstance(entries, np.ndarray) and entries.ndim == 1:
            columns[name] = pa.array(entries)
    uids = meta.get("uids") if isinstance(meta, dict) else None
    if isinstance(uids, list):
        uid = column_of(uids)
        columns |= {} if uid is None else {"uid": uid.cast(pa.string())}
    step = meta.get("global_step") if isinstance(meta, dict) else None
    if isinstance(step, int):
        columns["step"] = pa.array([step] * count)
    odd = [name for name, column in columns.items() if len(column) != count]
    if odd:
        raise DataError(f"the batch's `{odd[0]}` has not {count} rows, as `sequences` has")
    left_out = [name for name in batch if name not in columns and name not in INSTEAD_OF_REWARDS]
    notes = tuple(f"`{name}` is left out: a critic needs none of it" for name in left_out)
    yield Records(batch=pa.record_batch(columns), rows=np.arange(count), notes=notes)


def _tensor(entry: Any) -> Any:
    """A tensor as {"format", "data", "shape", "dtype"}, or as torch pickles it."""
    if not isinstance(entry, dict):
        return entry
    if entry.get("format") != "numpy" or not isinstance(entry.get("dtype"), str):
        raise RefusedError("a tensor in an unknown form")
    return torch_array(entry.get("data"), entry["dtype"], entry.get("shape"), Memory(half_of_memory()))


FORMAT = ObjectFormat(name="skyrl", title="SkyRL .pkl", recognise=kind_of, read=records)
