"""Exact copies among rollouts: counted, for a dump written twice weighs twice; no fault, for a policy may do so."""

from hashlib import blake2b
from itertools import pairwise
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from critic_train.rollouts import Rollouts


class Copies:
    """Counts rollouts whose tokens, mask and returns are those of an earlier one. Keeps 8 bytes a rollout."""

    def __init__(self) -> None:
        self._keys: list[NDArray[np.uint64]] = []

    def add(self, rollouts: Rollouts) -> None:
        """Take in some more rollouts."""
        ids, mask, returns = (
            memoryview(np.ascontiguousarray(column).view(np.uint8))  # type: ignore[arg-type]
            for column in (rollouts.input_ids, rollouts.response_mask, rollouts.returns)
        )
        bounds = rollouts.offsets.tolist()
        keys = np.empty(len(rollouts), dtype=np.uint64)
        for row, (start, stop) in enumerate(pairwise(bounds)):
            tokens = int.from_bytes(blake2b(ids[4 * start : 4 * stop], digest_size=8).digest(), "little")
            keys[row] = tokens ^ crc32(mask[start:stop]) << 32 ^ crc32(returns[4 * start : 4 * stop])
        self._keys.append(keys)

    @property
    def count(self) -> int:
        """Rollouts that are copies of one before them."""
        keys = np.concatenate([np.zeros(0, dtype=np.uint64), *self._keys])
        return len(keys) - len(np.unique(keys))

    def sentence(self) -> str:
        """What is said of them; an empty string where there are none."""
        count = self.count
        if not count:
            return ""
        rollouts = "1 rollout is an exact copy" if count == 1 else f"{count:,} rollouts are exact copies"
        return f"{rollouts} of others (tokens, mask and returns): each counts as often as it stands there"
