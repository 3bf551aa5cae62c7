"""What an evaluation has to be taken with: groups that are none, and rollouts that the critic was trained on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from critic_train.data.labels import prompt_keys
from critic_train.jsonio import read_json_object_or_none
from critic_train.rollouts import Rollouts

Integers = NDArray[np.int64]

MANY_PROMPTS = 0.1
"""Share of the prompts that stand under several uids from which on it is said."""


BY_PROMPT = "; --group-by prompt goes by the prompts themselves"


@dataclass(slots=True)
class PromptGroups:
    """Compares the prompt groups that the uids make with the prompts themselves. Keeps 16 bytes a rollout."""

    _group: list[Integers] = field(default_factory=list)
    _prompt: list[Integers] = field(default_factory=list)

    def add(self, rollouts: Rollouts) -> None:
        """Take in rollouts; those without response tokens have no end of the prompt, and count nowhere."""
        used = np.flatnonzero(rollouts.response_counts)
        judged = rollouts if len(used) == len(rollouts) else rollouts.take(used)
        self._group.append(judged.group)
        self._prompt.append(prompt_keys(judged))

    def record(self) -> dict[str, int]:
        """Counts, ready for JSON.

        Returns:
            groups, prompts: how many there are; groups_of_several_prompts, prompts_in_several_groups: how many do not
            agree; groups_of_one_rollout.
        """
        group = np.concatenate([np.empty(0, np.int64), *self._group])
        prompt = np.concatenate([np.empty(0, np.int64), *self._prompt])
        _, group_index, group_size = np.unique(group, return_inverse=True, return_counts=True)
        prompts, prompt_index = np.unique(prompt, return_inverse=True)
        pairs = np.unique(group_index * max(1, len(prompts)) + prompt_index)
        in_group = np.bincount(pairs // max(1, len(prompts)), minlength=len(group_size))
        in_prompt = np.bincount(pairs % max(1, len(prompts)), minlength=len(prompts))
        return {
            "groups": len(group_size),
            "prompts": len(prompts),
            "groups_of_several_prompts": int(np.count_nonzero(in_group > 1)),
            "prompts_in_several_groups": int(np.count_nonzero(in_prompt > 1)),
            "groups_of_one_rollout": int(np.count_nonzero(group_size == 1)),
        }


def group_sentences(record: dict[str, int], rollouts: int) -> list[str]:
    """What is wrong with the prompt groups.

    Args:
        record: of `PromptGroups`.
        rollouts: their number.
    """
    groups, prompts, split = record["groups"], record["prompts"], record["prompts_in_several_groups"]
    mixed = record["groups_of_several_prompts"]
    sentences = []
    if mixed:
        sentences.append(
            f"{mixed:,} of {groups:,} uids stand for several prompts, as where numbers begin anew in each file: "
            f"their groups are none, and neither the group's mean nor an interval is what it seems{BY_PROMPT}"
        )
    if groups == rollouts and prompts < rollouts:
        sentences.append(
            f"every rollout has a uid of its own, but {rollouts:,} rollouts have {prompts:,} prompts: the uid is not "
            f"the prompt's, so that there is no group's mean, and intervals are too narrow{BY_PROMPT}"
        )
    elif split > MANY_PROMPTS * prompts:
        sentences.append(
            f"{split:,} of {prompts:,} prompts stand under several uids: they count as prompts of their own, and "
            "intervals are too narrow"
        )
    return sentences


def trained_on(model: Path, files: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many of these files the run was trained on that a model comes from.

    Args:
        model: a run, its `best`, or a checkpoint of it; for anything else nothing is known.
        files: of `data.shards.fingerprint`.

    Returns:
        files, rows: of those that are, by content, files of the run's training data.
    """
    resolved = model.resolve()
    records = (read_json_object_or_none(folder / "run.json") for folder in (resolved, *resolved.parents[:2]))
    record = next((record for record in records if record), {})
    data = record.get("data")
    training_files = {
        (file.get("bytes"), file.get("content"))
        for file in (data.get("files") if isinstance(data, dict) else None) or []
        if isinstance(file, dict)
    }
    seen = [file for file in files if (file["bytes"], file["content"]) in training_files]
    return {"files": len(seen), "rows": sum(int(file["rows"]) for file in seen)}


def trained_on_sentence(name: str, seen: dict[str, int], rows: int) -> str:
    """A sentence about rollouts that a critic was trained on; empty where there are none."""
    if not seen["rows"]:
        return ""
    share = "all" if seen["rows"] == rows else f"{seen['rows']:,} of"
    return (
        f"{name} was trained on the files of {share} these {rows:,} rollouts: what it learnt by heart flatters it; "
        "judge it on rollouts that it has not seen"
    )
