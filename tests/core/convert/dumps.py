"""The same eight rollouts as each framework lays them out, field by field as its source says.

What can be written by a framework's own code is written by it in `write_fixtures.py`, from the layouts here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

PAD = 0
STEP = 7


@dataclass
class Rollout:
    """One rollout; `mask`, `values`, `returns` and `rewards` are as long as `ids`."""

    uid: str
    task: str
    prompt: int
    ids: list[int]
    mask: list[bool]
    values: list[float]
    returns: list[float]
    rewards: list[float]
    truncated: bool

    @property
    def reward(self) -> float:
        return float(sum(self.rewards))

    def response(self, name: str) -> list[Any]:
        return getattr(self, name)[self.prompt :]


def rollouts() -> list[Rollout]:
    """Two prompts, four rollouts of each, not side by side; two have an observation between two turns."""
    draw = np.random.default_rng(3)
    prompts = {"p": draw.integers(1, 900, 5).tolist(), "q": draw.integers(1, 900, 9).tolist()}
    made = []
    for number, uid in enumerate("pqqppqpq"):
        length = int(draw.integers(4, 12))
        ids = prompts[uid] + draw.integers(1, 900, length).tolist()
        mask = [False] * len(prompts[uid]) + [True] * length
        if number % 4 == 3:
            mask[-3] = False
        reward = float(np.float32(draw.random()))
        rewards = [0.0] * (len(ids) - 1) + [reward]
        values = draw.normal(size=len(ids)).astype(np.float32).tolist()
        where = [kept if kept else 0.0 for kept in mask]
        made.append(
            Rollout(
                uid=uid,
                task="sums" if uid == "p" else "words",
                prompt=len(prompts[uid]),
                ids=ids,
                mask=mask,
                values=[v if m else 0.0 for v, m in zip(values, mask, strict=True)],
                returns=[reward * m for m in where],
                rewards=rewards,
                truncated=number in (2, 5),
            )
        )
    return made


def padded(rows: list[list[Any]], *, left: bool, fill: Any = PAD, width: int = 0) -> np.ndarray:
    width = max(width, *map(len, rows))
    return np.asarray([[fill] * (width - len(r)) + r if left else r + [fill] * (width - len(r)) for r in rows])


def verl_batch(of: list[Rollout], *, extra_padding: int = 2) -> dict[str, torch.Tensor]:
    """The tensors of a DataProto after the advantages: prompts padded left, responses right, NaN on no token."""
    prompts = padded([r.ids[: r.prompt] for r in of], left=True, width=9 + extra_padding)
    responses = padded([r.response("ids") for r in of], left=False, width=12 + extra_padding)
    seen = np.concatenate(
        [
            padded([[1] * r.prompt for r in of], left=True, width=prompts.shape[1]),
            padded([[1] * (len(r.ids) - r.prompt) for r in of], left=False, width=responses.shape[1]),
        ],
        axis=1,
    )
    wide = {
        name: torch.tensor(padded([r.response(name) for r in of], left=False, width=responses.shape[1], fill=0.0))
        for name in ("values", "returns", "rewards")
    }
    mask = padded([list(map(int, r.response("mask"))) for r in of], left=False, width=responses.shape[1])
    return {
        "prompts": torch.tensor(prompts),
        "responses": torch.tensor(responses),
        "input_ids": torch.tensor(np.concatenate([prompts, responses], axis=1)),
        "attention_mask": torch.tensor(seen),
        "position_ids": torch.tensor(np.maximum(seen.cumsum(1) - 1, 0)),
        "response_mask": torch.tensor(mask),
        "old_log_probs": torch.full(mask.shape, -0.5),
        "token_level_scores": wide["rewards"].float(),
        "token_level_rewards": wide["rewards"].float(),
        "values": wide["values"].float(),
        "returns": wide["returns"].float(),
        "advantages": (wide["returns"] - wide["values"]).float(),
    }


def verl_others(of: list[Rollout]) -> dict[str, np.ndarray]:
    """The arrays of objects of a DataProto."""
    return {
        "uid": np.asarray([r.uid for r in of], dtype=object),
        "data_source": np.asarray([r.task for r in of], dtype=object),
        "reward_model": np.asarray([{"style": "rule", "ground_truth": "4"}] * len(of), dtype=object),
        "acc": np.asarray([r.reward for r in of], dtype=object),
    }


def openrlhf_fields(of: list[Rollout]) -> dict[str, Any]:
    """The fields of one Experience: sequences padded right, action columns one shorter."""
    sequences = padded([r.ids for r in of], left=False)

    def actions(name: str) -> torch.Tensor:
        return torch.tensor(padded([getattr(r, name)[1:] for r in of], left=False, width=sequences.shape[1] - 1))

    return {
        "sequences": torch.tensor(sequences),
        "attention_mask": torch.tensor(padded([[1] * len(r.ids) for r in of], left=False)),
        "action_mask": actions("mask").bool(),
        "values": actions("values").float(),
        "returns": actions("returns").float(),
        "rewards": torch.tensor([r.reward for r in of]),
        "truncated": torch.tensor([r.truncated for r in of]),
        "total_length": torch.tensor([float(len(r.ids)) for r in of]),
        "labels": [r.task for r in of],
        "prompts": ["text"] * len(of),
    }


def slime_train(of: list[Rollout], path: Path) -> None:
    """`_build_dump_payload` of slime/observability/train_data_utils.py, format_version 2."""
    samples = [
        {
            "data_parallel_rank": place % 2,
            "sample_index": place,
            "rollout_position": place,
            "tokens": torch.tensor(r.ids),
            "loss_masks": torch.tensor(r.response("mask"), dtype=torch.int),
            "response_lengths": len(r.response("ids")),
            "total_lengths": len(r.ids),
            "rewards": r.reward,
            "truncated": int(r.truncated),
            **{name: torch.tensor(r.response(name)) for name in ("values", "returns")},
            "log_probs": torch.zeros(len(r.response("ids"))),
        }
        for place, r in enumerate(of)
    ]
    layout = [{"rank": rank, "partition": list(range(rank, len(of), 2)), "sample_indices": None} for rank in (0, 1)]
    payload = {"format_version": 2, "rollout_id": STEP, "rank": 0, "samples": samples, "dp_shards": layout}
    torch.save(payload | {"raw_reward": [r.reward for r in of]}, path)


def slime_rollout(of: list[Rollout], path: Path) -> None:
    """`Sample.to_dict` of slime/utils/types.py, as save_debug_rollout_data keeps it."""
    samples = [
        {
            "group_index": "pq".index(r.uid),
            "index": place,
            "prompt": [{"role": "user", "content": "?"}],
            "tokens": r.ids,
            "multimodal_inputs": None,
            "response": "text",
            "response_length": len(r.response("ids")),
            "label": r.task,
            "reward": r.reward,
            "loss_mask": list(map(int, r.response("mask"))),
            "weight_versions": ["3", "4"],
            "rollout_log_probs": [-0.25] * len(r.response("ids")),
            "remove_sample": False,
            "status": "truncated" if r.truncated else "completed",
            "metadata": {"source": {"deep": 1}},
            "train_metadata": None,
            "non_generation_time": 0.0,
            "spec_info": {"spec_accept_token_num": 0},
        }
        for place, r in enumerate(of)
    ]
    torch.save({"rollout_id": STEP, "samples": samples}, path)


def nemo_rl(of: list[Rollout], path: Path) -> None:
    """`Logger.log_batched_dict_as_jsonl` of nemo_rl/utils/logger.py: slices of one, and `idx`."""
    ids = padded([r.ids for r in of], left=False, width=24).tolist()
    mask = padded([list(map(int, r.mask)) for r in of], left=False, width=24).tolist()
    with path.open("w") as file:
        for place, r in enumerate(of):
            line = {
                "agent_ref": [{"name": r.task}],
                "content": ["text"],
                "rewards": [r.reward],
                "input_lengths": [len(r.ids)],
                "token_ids": [ids[place]],
                "token_loss_mask": [mask[place]],
                "sample_loss_mask": [1.0],
                "advantages": [[float("nan")] * 24],
                "generation_logprobs": [[0.0] * 24],
                "prev_logprobs": [[0.0] * 24],
            }
            file.write(json.dumps({**line, "idx": place}) + "\n")


def tokens_elsewhere(of: list[Rollout], path: Path) -> None:
    """Token ids in Parquet under names of somebody's own."""
    columns = {
        "grp": [r.uid for r in of],
        "task": [r.task for r in of],
        "my_tokens": [r.ids for r in of],
        "policy_mask": [r.mask for r in of],
        "v": pa.array([r.values for r in of], type=pa.list_(pa.float64())),
        "target": [r.response("returns") for r in of],
        "embedding": [[0.5, 0.5]] * len(of),
    }
    pq.write_table(pa.table(columns), path)


def token_lines(of: list[Rollout], path: Path) -> None:
    """The same as JSON Lines under names that are known."""
    with path.open("w") as file:
        for r in of:
            line = {
                "group_id": r.uid,
                "prompt_ids": r.ids[: r.prompt],
                "completion_ids": r.response("ids"),
                "completion_mask": list(map(int, r.response("mask"))),
                "token_level_rewards": r.response("rewards"),
                "is_truncated": r.truncated,
                "meta": {"any": "thing"},
            }
            file.write(json.dumps(line) + "\n")
