import threading
import time

import pytest
import torch
from support import branching_rollouts, readable_rollouts, write_shard

from critic_train.model import microbatches
from critic_train.model.compute import Compute
from critic_train.model.microbatches import micro_batches
from critic_train.prefetch import ReadAhead, ahead
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit
from critic_train.training.plan import MiniBatches


def counted(made, stop=10**6, fail_at=None):
    for number in range(stop):
        if number == fail_at:
            raise OSError("the disk is gone")
        made.append(number)
        yield number


def settled(made, count):
    """Wait until so many are made, and see that no more are."""
    deadline = time.monotonic() + 300
    while len(made) < count and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    return len(made)


def test_items_come_in_order_and_only_so_many_are_made_ahead():
    made = []
    items = ahead(counted(made), 3)
    assert next(items) == 0
    assert settled(made, 4) == 4
    assert [next(items) for _ in range(5)] == [1, 2, 3, 4, 5]
    assert settled(made, 9) == 9
    items.close()
    assert "ahead" not in {thread.name.split("_")[0] for thread in threading.enumerate()}
    assert list(ahead(counted([], 7), 3)) == list(range(7))
    assert list(ahead(iter(()), 2)) == []


def test_an_error_comes_where_its_item_would_have():
    items = ahead(counted([], fail_at=2), 4)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)


def test_what_follows_is_read_while_this_is_worked_on():
    calls = []

    def read(key):
        calls.append((key, threading.current_thread().name))
        if key == "bad":
            raise OSError("the disk is gone")
        return key * 2

    reading = ReadAhead(read)
    assert reading.get("a", "b") == "aa"
    assert reading.get("b", "bad") == "bb"
    assert reading.get("c", "bad") == "cc"  # something else is asked for: the error is nobody's
    with pytest.raises(OSError, match="the disk is gone"):
        reading.get("bad", None)
    assert reading.get("d", "e") == "dd"
    reading.close()
    assert [key for key, _ in calls][:2] == ["a", "b"]
    assert calls[0][1] == threading.main_thread().name
    assert calls[1][1].startswith("read-ahead")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_micro_batches_laid_out_ahead_are_the_same(monkeypatch):
    rollouts = branching_rollouts()
    compute = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=60)
    plain = list(micro_batches(rollouts, compute, forest=True))
    beside = list(ahead(microbatches._laid_out(rollouts, compute, forest=True), 2))
    assert len(plain) == len(beside) > 2
    for one, other in zip(plain, beside, strict=True):
        assert torch.equal(one.read_positions, other.read_positions)
        assert torch.equal(one.trunk_arguments["input_ids"], other.trunk_arguments["input_ids"])


@pytest.mark.parametrize("old_values", ["column", "epoch"])
def test_a_run_reads_ahead_and_learns_the_same(old_values, tmp_path, monkeypatch):
    shard = write_shard(tmp_path / "data" / "a.parquet", readable_rollouts(12))

    def run(name):
        settings = FitSettings(
            data=[str(shard)],
            out=str(tmp_path / name),
            preset="tiny",
            epochs=2,
            batch_size=8,
            device="cpu",
            old_values=old_values,
            no_report=True,
        )
        list(fit(settings, StopRequest()))
        return (tmp_path / name / "metrics.jsonl").read_bytes()

    readers = []
    whole = MiniBatches._read

    def watched(self, what):
        readers.append(threading.current_thread() is threading.main_thread())
        return whole(self, what)

    monkeypatch.setattr(MiniBatches, "_read", watched)
    with_threads = run("ahead")
    # One read by the run itself, and one more at an epoch whose old values are taken only when it begins.
    assert readers.count(True) == (2 if old_values == "epoch" else 1)
    assert readers.count(False) >= 8
    monkeypatch.setattr(MiniBatches, "_next", lambda *_: None)
    assert run("one by one") == with_threads
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
