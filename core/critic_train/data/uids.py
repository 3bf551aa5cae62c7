"""Find the uid of a few rows again: the program keeps hashes, a person needs the name."""

import bisect
import itertools
from collections.abc import Container, Sequence

import pyarrow as pa

from critic_train.data.columns import Needs, understand
from critic_train.data.labels import uid_texts
from critic_train.data.places import parquet_file
from critic_train.data.shards import Shard
from critic_train.errors import DataError


class UidLookup:
    """Reads uids of single rows out of the shards, one row group's uid column at a time.

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
        found: dict[int, str | None] = dict.fromkeys(rows)
        shards = [shard for shard in self._shards if shard.name not in self._left_out]
        ends = list(itertools.accumulate(shard.num_rows for shard in shards))
        for at, together in itertools.groupby(sorted(rows), lambda row: bisect.bisect_right(ends, row)):
            if at < len(shards):
                shard = shards[at]
                first = ends[at] - shard.num_rows
                try:
                    found.update(self._read(shard, first, list(together)))
                except (OSError, DataError, pa.ArrowException):
                    continue
        return found

    def _read(self, shard: Shard, first: int, rows: list[int]) -> dict[int, str | None]:
        found: dict[int, str | None] = {}
        with parquet_file(shard.path) as file:
            columns = understand(
                file.schema_arrow, shard, renames=self._renames, labels=(), needs=Needs(returns=False, values=False)
            )
            if columns.uid is None:
                return found
            groups = [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
            ends = [first + end for end in itertools.accumulate(groups)]
            for at, together in itertools.groupby(rows, lambda row: bisect.bisect_right(ends, row)):
                column = file.read_row_group(at, columns=[columns.uid]).column(0).combine_chunks()
                mine = list(together)
                start = ends[at] - groups[at]
                texts = uid_texts(column.take(pa.array([row - start for row in mine], type=pa.int64())))
                found.update(zip(mine, texts, strict=True))
        return found
