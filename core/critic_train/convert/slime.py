"""slime's `--save-debug-train-data` and `--save-debug-rollout-data`: `.pt` files of one dictionary a sample.

Field names as in slime 0.3 (slime/observability/train_data_utils.py and rollout_data_utils.py, slime/utils/types.py).
All token columns but `tokens` are as long as the response, and pair with its tokens.
"""

from collections.abc import Iterator
from typing import Any

from critic_train.convert.dump_names import DiskReference
from critic_train.convert.raw_records import ObjectFormat, Records, Rows

TRAIN, ROLLOUT = "slime train data", "slime rollout data"
EXPECTED = "a sample as slime writes it"
RESPONSE_COLUMNS = ("values", "returns")
TRUNCATED = "truncated"
CUT = ("truncated", "aborted")
"""A sample's status where it did not end by itself: it was too long, or the rollout was stopped around it."""
HANDLED = frozenset({
    "tokens", "loss_mask", "loss_masks", "response", "response_length", "response_lengths", "total_lengths", "prompt",
    "reward", "rewards", "status", "weight_versions", "group_index", "truncated", "remove_sample", "sample_index",
})  # fmt: skip
"""Fields that are read under their own rules, or repeat what the tokens hold."""


def kind_of(content: Any) -> str | None:
    """TRAIN or ROLLOUT; None where an object is neither."""
    samples = content.get("samples") if isinstance(content, dict) else None
    first = samples[0] if isinstance(samples, list) and samples else None
    if not isinstance(first, dict) or "tokens" not in first:
        return None
    if "loss_masks" in first or "response_lengths" in first:
        return TRAIN
    return ROLLOUT if "response_length" in first else None


def records(content: dict[str, Any]) -> Iterator[Records]:
    """The samples of a dump, as one piece."""
    rows = Rows()
    train = kind_of(content) == TRAIN
    raw_rewards = content.get("raw_reward")
    samples = content["samples"]
    sample: Any = None
    entries: dict[str, Any] = {}
    removed = 0
    for row, sample in enumerate(samples):
        if not isinstance(sample, dict):
            rows.refuse(row, "samples", f"a {type(sample).__name__}", EXPECTED)
        elif sample.get("remove_sample"):
            removed += 1
        else:
            sample = {name: None if isinstance(value, DiskReference) else value for name, value in sample.items()}
            entries = _train(sample) if train else _rollout(sample)
            if train and isinstance(raw_rewards, list) and len(raw_rewards) == len(samples):
                entries["raw_reward"] = _number(raw_rewards[row])
            rows.add(row, {"step": content.get("rollout_id"), **_others(sample), **entries})
    if removed:
        rows.notes.setdefault(f"{removed} samples are left out: slime had taken them out of training (remove_sample)")
    columns = rows.records()
    # Frees the dump's own lists while the columns are worked on.
    del content, samples, sample, entries, rows
    yield columns


def _train(sample: dict[str, Any]) -> dict[str, Any]:
    truncated = _number(sample.get(TRUNCATED))
    return {
        "input_ids": sample.get("tokens"),
        "response_mask": sample.get("loss_masks", _ones(sample.get("response_lengths"))),
        "reward": _number(sample.get("rewards")),
        **({} if truncated is None else {TRUNCATED: bool(truncated)}),
        **{name: sample[name] for name in RESPONSE_COLUMNS if sample.get(name) is not None},
    }


def _rollout(sample: dict[str, Any]) -> dict[str, Any]:
    mask = sample.get("loss_mask")
    versions = sample.get("weight_versions")
    group = sample.get("group_index")
    return {
        "uid": None if group is None else str(group),
        "input_ids": sample.get("tokens"),
        "response_mask": _ones(sample.get("response_length")) if mask is None else mask,
        **_reward(sample.get("reward")),
        TRUNCATED: sample.get("status") in CUT,
        "status": sample.get("status"),
        "policy_version": str(versions[-1]) if isinstance(versions, list) and versions else None,
    }


def _reward(reward: Any) -> dict[str, Any]:
    """A number as `reward`; of a dictionary, each as `reward_NAME`, and the only one as `reward` too."""
    if not isinstance(reward, dict):
        return {"reward": _number(reward)}
    named = {f"reward_{name}": number for name, value in reward.items() if (number := _number(value)) is not None}
    return {**named, **({"reward": next(iter(named.values()))} if len(named) == 1 else {})}


def _ones(length: Any) -> list[int] | None:
    length = _number(length)
    return [1] * int(length) if length is not None and 0 <= length < 2**31 else None


def _number(value: Any) -> Any:
    """A number, also out of an array of one; None where it is none."""
    if hasattr(value, "size") and value.size == 1:
        value = value.item()
    return value if isinstance(value, int | float) else None


def _others(sample: dict[str, Any]) -> dict[str, Any]:
    """The remaining fields with one entry a rollout."""
    return {
        name: value
        for name, value in sample.items()
        if isinstance(name, str) and name not in HANDLED and isinstance(value, str | int | float | bool)
    }


FORMAT = ObjectFormat(name="slime", title="slime .pt", recognise=kind_of, read=records)
