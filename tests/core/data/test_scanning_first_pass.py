"""What is read before the model runs."""

import pytest
from support import branching_rollouts, write_shard

from critic_train.data.reading import Needs, RolloutReader
from critic_train.data.scanning import first_pass
from critic_train.data.shards import find_shards
from critic_train.events import Progress
from critic_train.stopping import Stopped, StopRequest


@pytest.fixture
def folder(tmp_path):
    write_shard(tmp_path / "a.parquet", branching_rollouts())
    write_shard(tmp_path / "b.parquet", branching_rollouts(), without=["values"])
    return tmp_path


def run(folder, stop):
    """(events, result) of a first pass."""
    shards = find_shards([str(folder)])
    going = first_pass(RolloutReader(shards, needs=Needs(values=False)), sum(s.num_rows for s in shards), stop)
    events = []
    while True:
        try:
            events.append(next(going))
        except StopIteration as ended:
            return events, ended.value


def test_every_row_is_counted_by_file(folder):
    events, result = run(folder, StopRequest())
    rows = len(branching_rollouts())
    assert list(result.rollouts.values()) == [rows, rows]
    assert not result.has_values
    last = [event for event in events if isinstance(event, Progress)][-1]
    assert last.done == last.total == 2 * rows


def test_the_sample_has_the_longest_rollout(folder):
    _, result = run(folder, StopRequest())
    assert result.sample.lengths.max() == branching_rollouts().lengths.max()


def test_it_stops_when_asked_to(folder):
    with pytest.raises(Stopped):
        run(folder, StopRequest(signal_number=2))
