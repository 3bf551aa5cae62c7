"""Prompt groups: the rollouts of one uid, where uids are what they say, and else those of equal prompts.

A group is the prompt. Many dumps have an id a rollout (a request's) where others have one a prompt, and ids that count
from 0 in every file or run; the uids of a data set are therefore compared with each other, and with the prompts.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from critic_train.data.labels import prompt_keys, uid_keys
from critic_train.errors import DataError
from critic_train.rollouts import Rollouts

UID, PROMPT = "uid", "prompt"
MIXED = np.uint64(0x9E3779B97F4A7C15)


def grouping_renames(renames: dict[str, str], group_by: str | None) -> dict[str, str]:
    """Canonical name -> column, with what --group-by says of `uid`."""
    return renames if group_by in (None, UID, PROMPT) else {**renames, "uid": str(group_by)}


class PromptGroups:
    """Gives every rollout of a data set its group.

    Without --group-by, a uid that no two rollouts share is not used, and one that stands in several files is used for
    the prompt that it has in the first of them; rollouts with that uid and another prompt are a group of their own.

    Args:
        group_by: "uid", "prompt", a column's name, or None.

    Attributes:
        by_prompt: whether uids are not used.
    """

    def __init__(self, group_by: str | None = None) -> None:
        self.by_prompt = group_by == PROMPT
        self._is_given = group_by is not None
        self._recurring: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._first_prompts: dict[int, int] = {}
        self._prompts: list[NDArray[np.int64]] = []
        self._set_apart = 0

    def survey(self, files: Iterable[Iterator[pa.Array]]) -> None:
        """Look at the uids of all files, before any rollout is given its group.

        Args:
            files: the uid column of each, in pieces; none where a file has no such column.
        """
        if self._is_given:
            return
        distinct: list[NDArray[np.int64]] = []
        rows = with_uid = 0
        for pieces in files:
            keys = [np.zeros(0, dtype=np.int64)]
            for column in pieces:
                piece, has_uid = uid_keys(column)
                keys.append(piece[has_uid])
                rows += len(piece)
            with_uid += sum(map(len, keys))
            distinct.append(np.unique(np.concatenate(keys)))
        every, files_with = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *distinct]), return_counts=True)
        self.by_prompt = rows > 1 and len(every) == with_uid == rows
        self._recurring = every[files_with > 1]

    def assign(self, rollouts: Rollouts, uids: pa.Array | None) -> None:
        """Set the groups of some rollouts.

        Args:
            rollouts: in the order of their files.
            uids: one entry a rollout; None without such a column.
        """
        if uids is None or self.by_prompt:
            rollouts.group[:] = prompt_keys(rollouts)
            if uids is not None and not self._is_given:
                self._prompts.append(rollouts.group.copy())
            return
        keys, has_uid = uid_keys(uids)
        recurs = has_uid & np.isin(keys, self._recurring)
        if has_uid.all() and not recurs.any():
            rollouts.group[:] = keys
            return
        prompts = prompt_keys(rollouts)
        firsts = [
            self._first_prompts.setdefault(int(keys[row]), int(prompts[row])) if recurs[row] else int(prompts[row])
            for row in range(len(keys))
        ]
        apart = prompts != np.asarray(firsts, dtype=np.int64)
        self._set_apart += int(apart.sum())
        mixed = (keys.view(np.uint64) ^ (prompts.view(np.uint64) * MIXED)).view(np.int64)
        keys = np.where(apart, mixed, keys)
        rollouts.group[:] = np.where(has_uid, keys, prompts)

    def sentences(self) -> list[str]:
        """What was found out about the uids, once all rollouts have their groups."""
        if self._set_apart:
            return [
                f"uids start anew: {self._set_apart:,} rollouts have a uid that an earlier file has with another "
                "prompt, and are groups of their own (--group-by uid joins them, --group-by prompt goes by the prompt)"
            ]
        prompts = np.concatenate([np.zeros(0, dtype=np.int64), *self._prompts])
        if len(np.unique(prompts)) < len(prompts):
            return [
                "every rollout has a uid of its own, although prompts repeat: rollouts with equal prompts are a group "
                "(--group-by uid goes by the uid)"
            ]
        return []


def require_uid(name: str, uid: str | None, group_by: str | None) -> None:
    """Raise DataError where --group-by asks for a uid that a file does not have."""
    if group_by == UID and uid is None:
        raise DataError(
            f"--group-by uid: {name} has no column uid", hint="--group-by prompt, or --group-by COLUMN with its name"
        )
