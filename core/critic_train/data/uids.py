"""Find the uid of a few rows again: the program keeps hashes, a person needs the name."""

from collections.abc import Container, Sequence

import numpy as np

from critic_train.data.addresses import addresses
from critic_train.data.shards import Shard


class UidLookup:
    """Reads uids of single rows out of the shards.

    Args:
        shards: in the order in which the rollouts were read.
        renames: canonical name -> column, from --column.
        left_out: names of shards that gave no rollouts; their rows are not counted.
    """

    def __init__(self, shards: Sequence[Shard], renames: dict[str, str], left_out: Container[str] = ()) -> None:
        self._shards = list(shards)
        self._renames = renames
        self._left_out = left_out

    def __call__(self, rows: Sequence[int]) -> dict[int, str | None]:
        """Uids of places in the data set.

        Returns:
            Row -> uid. None where the shard has no uid column, the row no uid, or the shard cannot be read any more:
            a name is no reason to stop.
        """
        files = [(shard.name, shard.num_rows) for shard in self._shards if shard.name not in self._left_out]
        known = [row for row in rows if row < sum(count for _, count in files)]
        found = addresses(np.asarray(known, dtype=np.int64), files, self._renames)
        return dict.fromkeys(rows) | {row: address.uid or None for row, address in zip(known, found, strict=True)}
