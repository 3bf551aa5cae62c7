"""Rollouts as other systems dump them, to be converted: random, ids as uneven as those of text, prompts shared."""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

VOCABULARY = 50_000
PROMPT, RESPONSE, RESPONSES = 100, 300, 8


@dataclass(frozen=True)
class Dump:
    """Some rollouts: ids [n, PROMPT + RESPONSE], values and rewards [n, RESPONSE], all of one length."""

    ids: np.ndarray[Any, Any]
    values: np.ndarray[Any, Any]
    rewards: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.ids)


def drawn(count: int, seed: int) -> Dump:
    """Random rollouts; ids are as uneven as those of text, and prompts shared by RESPONSES."""
    draw = np.random.default_rng(seed)
    prompts = np.minimum(draw.zipf(1.2, (count // RESPONSES, PROMPT)), VOCABULARY - 1).repeat(RESPONSES, axis=0)
    responses = np.minimum(draw.zipf(1.2, (len(prompts), RESPONSE)), VOCABULARY - 1)
    rewards = np.zeros(responses.shape, np.float32)
    rewards[:, -1] = draw.integers(0, 2, len(prompts))
    ids = np.concatenate([prompts, responses], axis=1)
    return Dump(ids=ids, values=draw.normal(size=rewards.shape).astype(np.float32), rewards=rewards)


def slime_train(dump: Dump, folder: Path, place: int) -> None:
    """`--save-debug-train-data`."""
    samples = [
        {
            "tokens": torch.tensor(dump.ids[i]),
            "loss_masks": torch.ones(RESPONSE, dtype=torch.int),
            "response_lengths": RESPONSE,
            "rewards": float(dump.rewards[i, -1]),
            "values": torch.tensor(dump.values[i]),
            "returns": torch.tensor(dump.rewards[i]),
        }
        for i in range(len(dump))
    ]
    torch.save({"format_version": 2, "rollout_id": place, "samples": samples}, folder / f"train_{place}.pt")


def slime_rollout(dump: Dump, folder: Path, place: int) -> None:
    """`--save-debug-rollout-data`: lists of Python numbers."""
    samples = [
        {
            "group_index": i // RESPONSES,
            "tokens": dump.ids[i].tolist(),
            "response_length": RESPONSE,
            "reward": float(dump.rewards[i, -1]),
            "loss_mask": [1] * RESPONSE,
            "rollout_log_probs": dump.values[i].tolist(),
            "status": "completed",
        }
        for i in range(len(dump))
    ]
    torch.save({"rollout_id": place, "samples": samples}, folder / f"rollout_{place}.pt")


def verl(dump: Dump, folder: Path, place: int) -> None:
    """`DataProto.save_to_disk` by way of numpy, the class named by hand."""
    batch = {
        "prompts": ("int64", dump.ids[:, :PROMPT]),
        "responses": ("int64", dump.ids[:, PROMPT:]),
        "attention_mask": ("int64", np.ones_like(dump.ids)),
        "response_mask": ("int64", np.ones((len(dump), RESPONSE), np.int64)),
        "values": ("float32", dump.values),
        "returns": ("float32", dump.rewards),
    }
    tensors = {name: (kind, of.shape, np.frombuffer(of.tobytes(), np.uint8)) for name, (kind, of) in batch.items()}
    uids = np.asarray([str(i // RESPONSES) for i in range(len(dump))], dtype=object)
    state = pickle.dumps((((len(dump),), None, tensors), {"uid": uids}, {}), protocol=4)
    head = b"\x80\x04\x8c\x0dverl.protocol\x8c\x09DataProto\x93)\x81"
    (folder / f"{place}.pkl").write_bytes(head + state[2:-1] + b"b.")


def nemo_rl(dump: Dump, folder: Path, place: int) -> None:
    """`train_data_step{N}.jsonl`, without the log-probabilities."""
    mask = [0] * PROMPT + [1] * RESPONSE
    with (folder / f"train_data_step{place}.jsonl").open("w") as file:
        for i, ids in enumerate(dump.ids.tolist()):
            line = {"token_ids": [ids], "token_loss_mask": [mask], "input_lengths": [len(ids)], "sample_loss_mask": [1]}
            file.write(json.dumps({**line, "rewards": [float(dump.rewards[i, -1])], "idx": i}) + "\n")


def tokens(dump: Dump, folder: Path, place: int) -> None:
    """Token ids in Parquet, as pyarrow writes it when nothing is said."""

    def column(matrix: np.ndarray[Any, Any]) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1]).cast(
            pa.list_(pa.from_numpy_dtype(matrix.dtype))
        )

    columns = {"prompt_ids": column(dump.ids[:, :PROMPT]), "response_ids": column(dump.ids[:, PROMPT:])}
    columns |= {"values": column(dump.values), "returns": column(dump.rewards)}
    pq.write_table(pa.table(columns), folder / f"part-{place}.parquet")


WRITERS: dict[str, Callable[[Dump, Path, int], None]] = {
    "slime train data": slime_train,
    "slime rollout data": slime_rollout,
    "verl DataProto": verl,
    "NeMo-RL JSONL": nemo_rl,
    "Parquet of ids": tokens,
}
