"""The rollouts of a run as every rank opens them, once rank 0 has read them into the cache."""

import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import readable_rollouts, write_shard

from critic_train.errors import MachineError
from critic_train.events import Event, Notice
from critic_train.run.run_directory import RunDirectory
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.dataset import RunData, open_data
from critic_train.training.run_shards import find_run_shards, read_rollouts, row_limits
from critic_train.training.targets import Targets


def opened(folder: Path, **flags: Any) -> tuple[RunData, list[Event]]:
    settings = FitSettings(data=[str(folder / "data")], **flags)
    targets, run = Targets.of(settings.returns, settings.loss), RunDirectory(folder / "run")
    shards, limits = find_run_shards(settings.reading), row_limits(None, None)
    names, _ = drained(read_rollouts(settings.reading, targets, shards, limits, run, StopRequest()))
    return drained(open_data(settings.reading, targets, run.cache, names, seed=0))


def drained(events: Generator[Event, None, Any]) -> tuple[Any, list[Event]]:
    """What a generator returns, and what it yields."""
    seen = []
    while True:
        try:
            seen.append(next(events))
        except StopIteration as done:
            return done.value, seen


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    write_shard(tmp_path / "data" / "a.parquet", readable_rollouts(10, seed=1))
    return tmp_path


def test_a_share_of_the_prompt_groups_is_held_out(folder):
    data, _ = opened(folder, val_fraction=0.3)
    assert data.held_out is not None
    assert len(data.train) + len(data.held_out) == 40
    assert not np.isin(data.held_out.groups, data.train.groups).any()
    assert data.by_cache()[0].index.tolist() == [*data.train.index.tolist(), *data.held_out.index.tolist()]
    assert data.shape.max_length == int(data.train.cache.lengths.max())


def test_the_largest_group_is_that_with_the_most_tokens(folder):
    data, _ = opened(folder, val_fraction=0.3)
    tokens = {
        group: int(data.train.cache.lengths[data.train.index][data.train.groups == group].sum())
        for group in set(data.train.groups.tolist())
    }
    largest = data.train.largest_group()
    assert set(largest.group.tolist()) == {max(tokens, key=tokens.__getitem__)}
    assert len(largest.input_ids) == max(tokens.values())


def test_of_a_very_large_group_only_the_first_rollouts_are_read(folder, monkeypatch):
    data, _ = opened(folder, val_fraction=0.3)
    largest = data.train.largest_group()
    monkeypatch.setattr("critic_train.training.dataset.MOST_TOKENS_OF_A_GROUP", int(largest.lengths[:2].sum()))
    assert data.train.largest_group().input_ids.tolist() == largest.input_ids[: largest.offsets[2]].tolist()
    monkeypatch.setattr("critic_train.training.dataset.MOST_TOKENS_OF_A_GROUP", 1)
    assert len(data.train.largest_group()) == 1


def test_the_address_of_a_rollout_names_its_file_and_row(folder):
    data, _ = opened(folder, val_fraction=0.0)
    rollouts = data.train.read(np.asarray([5]))
    (address,) = data.train.addresses(rollouts.row)
    assert (Path(address.file).name, address.row, address.uid) == ("a.parquet", 5, "1")


def test_held_out_prompts_that_are_trained_on_are_a_warning(folder):
    write_shard(folder / "val" / "v.parquet", readable_rollouts(4, seed=1))
    data, events = opened(folder, val_data=[str(folder / "val")])
    assert data.held_out is not None
    assert len(data.held_out) == 16
    assert [e.message.split(":")[0] for e in events if isinstance(e, Notice)] == [
        "4 of 4 held-out prompt groups are also in --data, by uid or by prompt"
    ]


def test_a_rank_that_does_not_see_the_cache_says_so(folder):
    opened(folder)
    shutil.rmtree(folder / "run" / "cache" / "train")
    settings = FitSettings(data=["x"])
    targets = Targets.of(settings.returns, settings.loss)
    with pytest.raises(MachineError, match="cannot be seen from here"):
        drained(open_data(settings.reading, targets, folder / "run" / "cache", ["train"], seed=0))
