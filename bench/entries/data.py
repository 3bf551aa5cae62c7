"""The data path alone, stage by stage, beside a plain read and beside a DataLoader that collates row by row."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader

from bench.drawing import draw_dump
from bench.entry import Options, Table
from bench.measuring import in_turn, ratio
from critic_train.data.order import epoch_plan
from critic_train.data.reading import RolloutReader
from critic_train.data.rollout_cache import RolloutCache, write_cache
from critic_train.data.shards import find_shards
from critic_train.data.writing import ShardFile
from critic_train.model.microbatches import forest_micro_batches
from critic_train.model.model_input import tree_input
from critic_train.rollouts import Rollouts

NAME = "data"
TITLE = "The data path alone, millions of tokens a second of CPU time"
DEVICES = ("cpu", "cuda")

GROUPS = {"quick": 20, "usual": 800, "full": 2500}
COLUMNS = ("input_ids", "response_mask", "values", "returns")
MAX_TOKENS = 16_384
BATCH_SIZE = 64
LOADER_ROWS = 640
GOAL, LOADER_GOAL = 8.0, 8.0


def run(options: Options) -> Table:
    """Measure on shards written as critic-train writes them, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "part-00000.parquet"
        write(shard, draw_dump(GROUPS[options.size]))
        spool = Path(folder) / "spool"
        things: dict[str, Callable[[], object]] = {
            "pyarrow read of the same columns": lambda: pq.read_table(shard, columns=list(COLUMNS), use_threads=False),
            "read and check": lambda: sum(len(batch) for batch in reader(shard)),
            "read, check, keep in the cache": lambda: write_cache(spool, reader(shard)),
            "cache to laid-out micro-batches": lambda: sum(1 for _ in laid_out(RolloutCache.open(spool))),
            "Parquet to laid-out micro-batches": lambda: whole(shard, spool),
        }
        seconds = in_turn(things, options.rounds)
        kept = RolloutCache.open(spool)
        tokens = kept.num_tokens
        loader_tokens = int(kept.lengths[:LOADER_ROWS].sum())
        loader = in_turn({"loader": lambda: sum(1 for _ in by_rows(shard))}, max(1, options.rounds // 2))["loader"]
        table = Table(columns={"stage": "", "Mtok/s": ".1f", "of pyarrow": ".2f", "goal": ""})
        plain = seconds["pyarrow read of the same columns"]
        for name, found in seconds.items():
            rate = tokens / float(np.median(found)) / 1e6
            table.rows.append({"stage": name, "Mtok/s": rate, "of pyarrow": ratio(plain, found)})
        table.rows[-1]["goal"] = f"{GOAL:g}"
        rate = loader_tokens / float(np.median(loader)) / 1e6
        table.rows.append({"stage": "DataLoader, row by row, padded", "Mtok/s": rate})
        times = table.rows[-2]["Mtok/s"] / rate
        table.notes = [
            f"{kept.num_rollouts:,} rollouts, {tokens:,} tokens, mini-batches of {BATCH_SIZE}, micro-batches of "
            f"{MAX_TOKENS:,} positions",
            f"Parquet to laid-out micro-batches is {times:.1f}x the DataLoader; the goal is {LOADER_GOAL:g}x",
        ]
        return table


def write(path: Path, rollouts: Rollouts) -> None:
    """A canonical shard."""
    offsets = pa.array(rollouts.offsets.astype(np.int32))
    columns: dict[str, pa.Array] = {"uid": pa.array([f"prompt-{key}" for key in rollouts.group.tolist()])}
    for name in COLUMNS:
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(getattr(rollouts, name)))
    table = pa.table(columns)
    with ShardFile(path, table.schema) as file:
        for start in range(0, table.num_rows, 1000):
            file.write_row_group(table.slice(start, 1000))


def reader(shard: Path) -> RolloutReader:
    """What `fit` reads with."""
    return RolloutReader(find_shards([str(shard)]))


def laid_out(spool: RolloutCache) -> Iterator[Any]:
    """An epoch in shuffled order, as far as the arrays that the model is called with."""
    plan = epoch_plan(spool.groups, batch_size=BATCH_SIZE, seed=0, epoch=0)
    device = torch.device("cpu")
    for first, last in zip(plan.bounds[:-1], plan.bounds[1:], strict=True):
        rollouts = spool.read(plan.order[first:last])
        for order in forest_micro_batches(rollouts, MAX_TOKENS):
            yield tree_input(rollouts, order, device)


def whole(shard: Path, spool: Path) -> int:
    """Everything between the file and the model, once."""
    return sum(1 for _ in laid_out(write_cache(spool, reader(shard))))


def by_rows(shard: Path) -> Iterator[dict[str, torch.Tensor]]:
    """What is usual: rows as Python lists, a tensor a cell, padded in `collate_fn`; shuffled, no worker processes."""
    table = pq.read_table(shard, columns=list(COLUMNS), use_threads=False).slice(0, LOADER_ROWS)

    def collate(rows: list[dict[str, list[float]]]) -> dict[str, torch.Tensor]:
        return {
            name: torch.nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True)
            for name in COLUMNS
        }

    yield from DataLoader(_Rows(table), batch_size=8, shuffle=True, collate_fn=collate)


class _Rows(torch.utils.data.Dataset[dict[str, list[float]]]):
    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, row: int) -> dict[str, list[float]]:
        return {name: self._table[name][row].as_py() for name in COLUMNS}
