"""Where in the shards a rollout comes from: file, row group, row, and the uid, of which memory holds only a hash."""

from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from critic_train.data.labels import uid_texts
from critic_train.data.schema import Needs, resolve_schema
from critic_train.data.shards import Shard, find_shards
from critic_train.data.stores import parquet_file
from critic_train.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """The location of a rollout in the shards.

    Attributes:
        file: the shard.
        row_group: its row group; -1 where the shard can no longer be read.
        row: counts from 0 within the row group, or within the file where there is no row group.
        uid: as in the shard's uid column; an empty string where it has none.
    """

    file: str
    row_group: int
    row: int
    uid: str

    def __str__(self) -> str:
        group = f", row group {self.row_group}" if self.row_group >= 0 else ""
        return f"{self.file}{group}, row {self.row}" + (f", uid {self.uid}" if self.uid else "")


def addresses(rows: NDArray[np.int64], files: list[tuple[str, int]], renames: dict[str, str]) -> list[Address]:
    """The addresses of rollouts, in the order given.

    Args:
        rows: int64 [n], positions in the data set as read.
        files: the shards in the order read, and the rows of each.
        renames: canonical name -> column, from --column.
    """
    ends = np.cumsum([count for _, count in files])
    owner = np.searchsorted(ends, rows, side="right")
    by_row: dict[int, Address] = {}
    for number in np.unique(owner).tolist():
        name, count = files[number]
        inside = np.unique(rows[owner == number] - (ends[number] - count))
        for row, address in zip(inside.tolist(), _in_file(name, inside, renames), strict=True):
            by_row[row + int(ends[number]) - count] = address
    return [by_row[row] for row in rows.tolist()]


def _in_file(name: str, rows: NDArray[np.int64], renames: dict[str, str]) -> list[Address]:
    """Addresses of rows of one file, ascending."""
    try:
        with parquet_file(name) as file:
            footer = file.metadata
            ends = np.cumsum([footer.row_group(i).num_rows for i in range(footer.num_row_groups)])
            groups = np.searchsorted(ends, rows, side="right")
            positions = rows - np.append(0, ends)[groups]
            uid = _uid_column(name, file.schema_arrow, renames)
            located = []
            for group in np.unique(groups).tolist():
                inside = positions[groups == group]
                uids = _uids(file, group, uid, inside) if uid else [""] * len(inside)
                located += [
                    Address(file=name, row_group=group, row=int(row), uid=text)
                    for row, text in zip(inside, uids, strict=True)
                ]
            return located
    except (OSError, DataError, pa.ArrowException, IndexError):
        return [Address(file=name, row_group=-1, row=int(row), uid="") for row in rows]


def _uid_column(name: str, schema: pa.Schema, renames: dict[str, str]) -> str | None:
    try:
        (shard,) = find_shards([name])
        needs = Needs(returns=False, values=False)
        return resolve_schema(schema, shard, renames=renames, labels=(), needs=needs).uid
    except (DataError, ValueError):
        return None


def _uids(file: pq.ParquetFile, row_group: int, column: str, rows: NDArray[np.int64]) -> list[str]:
    """The uids of ascending rows of a row group, decoded piece by piece."""
    uids: list[str] = []
    start = 0
    for batch in file.iter_batches(batch_size=1024, row_groups=[row_group], columns=[column]):
        inside = rows[(rows >= start) & (rows < start + batch.num_rows)] - start
        uids += [uid or "" for uid in uid_texts(batch.column(0).take(pa.array(inside)))]
        start += batch.num_rows
    return uids


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
        """Uids of rows of the data set.

        Returns:
            Row -> uid; None where the shard has no uid column, the row no uid, or the shard cannot be read any more.
            Never raises.
        """
        files = [(shard.name, shard.num_rows) for shard in self._shards if shard.name not in self._left_out]
        present = [row for row in rows if row < sum(count for _, count in files)]
        located = addresses(np.asarray(present, dtype=np.int64), files, self._renames)
        return dict.fromkeys(rows) | {row: address.uid or None for row, address in zip(present, located, strict=True)}
