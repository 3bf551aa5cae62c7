"""Shards made in a test's own folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from critic_train.data.reading import RolloutReader
from critic_train.data.shards import find_shards
from critic_train.rollouts import Rollouts, ragged_take

GOOD: dict[str, Any] = {
    "input_ids": [[5, 6, 7, 8], [9, 10, 11], [5, 6, 12, 13, 14]],
    "response_mask": [[0, 0, 1, 1], [0, 1, 0], [0, 0, 1, 0, 1]],
    "returns": [[0.0, 0.0, 1.0, 2.0], [0.0, 3.0, 0.0], [0.0, 0.0, 4.0, 0.0, 5.0]],
    "values": [[0.0, 0.0, 0.5, 0.25], [0.0, 1.5, 0.0], [0.0, 0.0, 2.5, 0.0, 3.5]],
}
"""Three sound rollouts."""


class Shards:
    """Writes shards into a folder and reads them back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, columns: dict[str, Any] | pa.Table, name: str = "a.parquet", **how: Any) -> Path:
        """Write one shard."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **how)
        return path

    def reader(self, **options: Any) -> RolloutReader:
        """A reader of the whole folder."""
        return RolloutReader(find_shards([str(self.folder)]), **options)

    def read(self, columns: dict[str, Any] | pa.Table | None = None, **options: Any) -> Rollouts:
        """Write one shard, if columns are given, and read the folder as one batch."""
        if columns is not None:
            self.write(columns)
        return together(list(self.reader(**options)))


def together(batches: list[Rollouts]) -> Rollouts:
    """Batches end to end."""
    lengths = np.concatenate([batch.lengths for batch in batches])

    def joined(name: str) -> Any:
        parts = [getattr(batch, name) for batch in batches]
        return None if any(part is None for part in parts) else np.concatenate(parts)

    return Rollouts(
        input_ids=np.concatenate([batch.input_ids for batch in batches]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        response_mask=np.concatenate([batch.response_mask for batch in batches]),
        returns=np.concatenate([batch.returns for batch in batches]),
        values=joined("values"),
        group=np.concatenate([batch.group for batch in batches]),
        row=np.concatenate([batch.row for batch in batches]),
        rewards=joined("rewards"),
        truncated=joined("truncated"),
        labels={n: np.concatenate([batch.labels[n] for batch in batches]) for n in batches[0].labels},
    )


def rows_of(rollouts: Rollouts, name: str) -> list[list[Any]]:
    """A token column as one list a rollout."""
    column = getattr(rollouts, name)
    tokens = [ragged_take(rollouts.offsets, np.asarray([i]))[0] for i in range(len(rollouts))]
    return [column[at].tolist() for at in tokens]


def as_rows(rollouts: Rollouts) -> dict[str, Any]:
    """All token columns as lists, for comparing."""
    names = ["input_ids", "response_mask", "returns"] + (["values"] if rollouts.values is not None else [])
    return {name: rows_of(rollouts, name) for name in names}


@pytest.fixture
def good() -> dict[str, Any]:
    """The columns of three sound rollouts; the test may change them."""
    return {name: [list(row) for row in rows] for name, rows in GOOD.items()}


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    """Shards in `tmp_path / "rollouts"`."""
    return Shards(tmp_path / "rollouts")


@pytest.fixture
def listed() -> Callable[[Rollouts], dict[str, Any]]:
    """`as_rows`."""
    return as_rows
