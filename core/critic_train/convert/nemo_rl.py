"""NeMo-RL's `train_data_step{N}.jsonl`, as `Logger.log_batched_dict_as_jsonl` writes it.

Each line is a slice of one of the batch, so that every field but `idx` stands in a list of one. `token_ids` and
`token_loss_mask` are padded on the right to the batch's width; `input_lengths` is the rollout's length.
"""

import re
from typing import Any

from critic_train.convert.raw_records import Line, LineFormat, Records, Rows

KIND = "NeMo-RL train data"
HANDLED = frozenset({
    "token_ids", "token_loss_mask", "sample_loss_mask", "rewards", "filtered_rewards", "input_lengths", "idx",
    "content", "agent_ref", "advantages", "generation_logprobs", "prev_logprobs", "reference_policy_logprobs",
})  # fmt: skip


def kind_of(record: dict[str, Any]) -> str | None:
    """KIND of a record of NeMo-RL's, None of any other."""
    return KIND if {"token_ids", "token_loss_mask", "input_lengths"} <= set(record) else None


def records(lines: list[Line], file_name: str, _: Any = None) -> Records:
    """The rollouts of some lines; the step is in the file's name."""
    step = re.fullmatch(r"train_data_step(\d+)\.jsonl", file_name)
    rows = Rows()
    masked = 0
    for row, line in lines:
        record = {name: _single(name, value) for name, value in line.items()}
        length = record.get("input_lengths")
        ids, mask = record.get("token_ids"), record.get("token_loss_mask")
        if not isinstance(length, int) or not isinstance(ids, list) or not isinstance(mask, list):
            rows.refuse(row, "token_ids", "no token_ids, token_loss_mask and input_lengths", "those of one rollout")
        elif not 0 <= length <= len(ids):
            rows.refuse(row, "input_lengths", f"{length} beside {len(ids)} tokens", "at most as many")
        elif record.get("sample_loss_mask") == 0:
            masked += 1
        else:
            reward = record.get("filtered_rewards", record.get("rewards"))
            entries = {"input_ids": ids[:length], "response_mask": mask[:length], "reward": reward}
            rows.add(row, {"step": int(step[1]) if step else None, **_others(record), **entries})
    if masked:
        rows.notes.setdefault("rollouts whose sample_loss_mask is 0 are left out, as NeMo-RL trains on none of them")
    return rows.records()


def _single(name: str, value: Any) -> Any:
    """The entry of a list of one."""
    return value[0] if name != "idx" and isinstance(value, list) and len(value) == 1 else value


def _others(record: dict[str, Any]) -> dict[str, Any]:
    others = {
        name: value
        for name, value in record.items()
        if name not in HANDLED and isinstance(value, str | int | float | bool)
    }
    agent = record.get("agent_ref")
    name = agent.get("name") if isinstance(agent, dict) else None
    return {**others, **({"task": name} if isinstance(name, str) else {})}


FORMAT = LineFormat(name="nemo-rl", title="NeMo-RL JSONL", recognise=kind_of, read=records)
