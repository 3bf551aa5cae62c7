"""`split`: the rows that `fit` would hold out, in files of their own, with everything that was in them."""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import StopAfter, readable_rollouts, write_shard

from critic_train.data import decoding
from critic_train.data.split import split
from critic_train.errors import ConfigError, DataError
from critic_train.events import Event, RunEnded
from critic_train.run.run_directory import RunDirectory
from critic_train.settings import FitSettings, SplitSettings
from critic_train.stopping import StopRequest
from critic_train.training.dataset import open_data
from critic_train.training.run_shards import find_run_shards, read_rollouts, row_limits
from critic_train.training.targets import Targets

T = TypeVar("T")


@pytest.fixture
def shards(tmp_path, monkeypatch) -> Path:
    """Two files of several row groups whose prompt groups overlap; each row says its place."""
    monkeypatch.setattr(decoding, "FIRST_ROWS", 3)
    monkeypatch.setattr(decoding, "MOST_ROWS", 5)
    folder = tmp_path / "rollouts"
    for number, name in enumerate(("a", "deep/b")):
        rollouts = readable_rollouts(15, seed=number)
        path = write_shard(folder / f"{name}.parquet", replace(rollouts, group=rollouts.group + 10 * number))
        table = pq.read_table(path).append_column("place", pa.array([f"{number}-{i}" for i in range(60)]))
        pq.write_table(table, path, row_group_size=25)
    return folder


def divide(shards: Path, to: Path, stop: StopRequest | None = None, **changes: object) -> RunEnded:
    *_, last = split(SplitSettings(**({"data": [str(shards)], "to": str(to)} | changes)), stop or StopRequest())
    assert isinstance(last, RunEnded)
    return last


def tables(folder: Path) -> dict[str, pa.Table]:
    return {p.relative_to(folder).as_posix(): pq.read_table(p) for p in sorted(folder.rglob("*.parquet"))}


def returned(events: Generator[Event, None, T]) -> T:
    """What a generator returns."""
    while True:
        try:
            next(events)
        except StopIteration as done:
            return done.value


@pytest.mark.parametrize(("fraction", "seed"), [(0.1, 0), (0.3, 7), (0.9, 1)])
def test_the_rows_held_out_are_those_that_fit_holds_out(fraction, seed, shards, tmp_path):
    result = divide(shards, tmp_path / "to", val_fraction=fraction, seed=seed).result
    settings = FitSettings(data=[str(shards)], val_fraction=fraction, seed=seed)
    targets, run, sets = Targets.of(settings.returns, settings.loss), RunDirectory(tmp_path / "run"), settings.reading
    names = returned(read_rollouts(sets, targets, find_run_shards(sets), row_limits(None, None), run, StopRequest()))
    data = returned(open_data(sets, targets, run.cache, names, seed))
    everything = pa.concat_tables(tables(shards).values())
    for side, chosen in (("train", data.train), ("val", data.held_out)):
        found = pa.concat_tables(tables(tmp_path / "to" / side).values())
        assert found == everything.take(np.sort(chosen.cache.rows[chosen.index]))
        assert result[side] == {"rollouts": len(chosen), "prompt_groups": len(set(chosen.groups.tolist()))}
    assert {p.name for p in (tmp_path / "to").iterdir()} == {"train", "val", "_split.json"}


def test_row_groups_keep_their_bounds(shards, tmp_path):
    divide(shards, tmp_path / "to", val_fraction=0.3)
    for name, table in tables(shards).items():
        for side in ("train", "val"):
            file = pq.ParquetFile(tmp_path / "to" / side / name)
            found = [file.read_row_group(i)["place"].to_pylist() for i in range(file.metadata.num_row_groups)]
            kept = {place for group in found for place in group}
            whole = [table["place"].to_pylist()[start : start + 25] for start in (0, 25, 50)]
            expected = [[place for place in group if place in kept] for group in whole]
            assert found == [group for group in expected if group]  # one that is left without rows is gone
            assert table.schema == file.schema_arrow


def test_a_file_without_rows_of_a_side_is_not_written_there(tmp_path):
    rollouts = readable_rollouts(2)
    write_shard(tmp_path / "data" / "a.parquet", rollouts.take(np.arange(4)))
    write_shard(tmp_path / "data" / "b.parquet", rollouts.take(np.arange(4, 8)))
    divide(tmp_path / "data", tmp_path / "to", val_fraction=0.5)
    names = [sorted(tables(tmp_path / "to" / side)) for side in ("train", "val")]
    assert sorted(names) == [["a.parquet"], ["b.parquet"]]


def test_rows_that_cannot_be_used_are_on_neither_side(shards, tmp_path):
    path = shards / "a.parquet"
    table = pq.read_table(path)
    masks = table["response_mask"].to_pylist()
    masks[7] = [False] * len(masks[7])
    pq.write_table(table.set_column(2, "response_mask", pa.array(masks)), path)
    with pytest.raises(DataError, match="1 row cannot be used"):
        divide(shards, tmp_path / "no")
    result = divide(shards, tmp_path / "to", on_bad_rows="skip").result
    assert result["rows_left_out"]["count"] == 1
    assert result["train"]["rollouts"] + result["val"]["rollouts"] == 119


@pytest.mark.parametrize("looks", [0, 5, 40, 60])
def test_stopped_anywhere_it_goes_on_and_ends_alike(looks, shards, tmp_path):
    divide(shards, tmp_path / "whole")
    assert divide(shards, tmp_path / "to", StopAfter(looks=looks)).status == "interrupted"
    assert divide(shards, tmp_path / "to").status == "finished"
    for side in ("train", "val"):
        assert tables(tmp_path / "whole" / side) == tables(tmp_path / "to" / side)


def test_refusals(shards, tmp_path):
    divide(shards, tmp_path / "to")
    with pytest.raises(ConfigError, match="--seed was 0, is now 1"):
        divide(shards, tmp_path / "to", seed=1)
    with pytest.raises(ConfigError, match="would then read its own output"):
        divide(shards, shards / "split")
    one = write_shard(tmp_path / "one" / "a.parquet", readable_rollouts(1))
    with pytest.raises(DataError, match="there is nothing to hold out"):
        divide(one, tmp_path / "none")
    for settings, complaint in (({"to": None}, "--to is needed"), ({"val_fraction": 0.0}, "--val-fraction must be")):
        with pytest.raises(ConfigError, match=complaint):
            SplitSettings(**({"data": ["x"], "to": "y"} | settings))
