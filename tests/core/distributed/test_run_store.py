"""What ranks write for each other in the store; two of them in one process here, on a store of torch.distributed."""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from critic_train.distributed import run_store
from critic_train.distributed.launch import Workers
from critic_train.distributed.run_store import RunStore
from critic_train.errors import DataError, MachineError
from critic_train.settings import FitSettings


class Started(Workers):
    """Workers none of which is started; `lost` is the error of one that has ended."""

    def __init__(self) -> None:
        super().__init__(FitSettings(data=["none"]), 2)
        self.lost: MachineError | None = None

    def lost_error(self) -> MachineError | None:
        return self.lost


@pytest.fixture
def pair(monkeypatch):
    """The store as ranks 0 and 1 see it."""
    monkeypatch.setattr(run_store, "GRACE_SECONDS", 0.2)
    timeout = timedelta(seconds=60)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timeout, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timeout, wait_for_workers=False)
    return RunStore(server, 0, 2, Started()), RunStore(client, 1, 2, Started())


def test_what_one_rank_writes_the_other_reads(pair):
    one, other = pair
    assert other.read("plan") is None
    for value in ({"steps": [1, 2], "é": None}, False, "1"):
        one.write("plan", value)
        assert one.read("plan") == value  # writes do not wait for the store, reads do
        assert other.read("plan") == value


def test_what_is_written_once_stands(pair):
    one, other = pair
    other.write_once("first", "of rank 1")
    one.write_once("first", "of rank 0")
    assert one.read("first") == other.read("first") == "of rank 1"


def test_the_first_error_of_all_is_raised_by_all(pair):
    one, other = pair
    one.raise_if_lost()
    assert not one.has_error()
    other.publish_error(DataError("row 7 has no tokens", hint="leave it out"))
    one.publish_error(DataError("another"))
    for store in pair:
        assert store.has_error()
        with pytest.raises(DataError, match=r"^rank 1: row 7 has no tokens$") as caught:
            store.raise_if_lost()
        assert caught.value.hint == "leave it out"


def test_a_worker_that_has_ended_is_raised_before_what_it_left_in_the_store(pair):
    one, other = pair
    other.publish_error(DataError("row 7 has no tokens"))
    one._workers.lost = MachineError("rank 1 was killed")
    with pytest.raises(MachineError, match="rank 1 was killed"):
        one.raise_if_lost()


def test_ranks_are_waited_for_until_all_are_there(pair):
    one, other = pair
    arrival = threading.Timer(0.2, other.write, ["here/1", True])
    one.write("here/0", True)
    arrival.start()
    one.wait_for(lambda rank: one.read(f"here/{rank}"))
    assert one.read("here/1")
    arrival.join()


def test_ranks_that_do_not_come_are_named(pair, monkeypatch):
    monkeypatch.setattr(run_store, "TIMEOUT", timedelta(0))
    with pytest.raises(MachineError, match=r"only 1 of 2 ranks came within 0:00:00; missing: \[1\]") as caught:
        pair[0].wait_for(lambda rank: rank == 0, hint="start them all")
    assert caught.value.hint == "start them all"


def test_an_error_ends_the_waiting(pair):
    one, other = pair
    other.publish_error(DataError("row 7 has no tokens"))
    with pytest.raises(DataError, match="rank 1: row 7"):
        one.wait_for(lambda _: False)


def test_the_cause_of_a_lost_connection_is_the_other_ranks_error(pair):
    one, other = pair
    closed = RuntimeError("Connection closed by peer\nmore of it")
    cause = one.cause_of(closed)
    assert isinstance(cause, MachineError)
    assert cause.message == "rank 0 of 2 lost contact with another rank: Connection closed by peer"
    other.publish_error(DataError("row 7 has no tokens"))
    assert str(one.cause_of(closed)) == "rank 1: row 7 has no tokens"
    assert str(other.cause_of(closed)).startswith("rank 1 of 2 lost contact")  # its own error explains nothing
    one._workers.lost = MachineError("rank 1 was killed")
    one.store.delete_key(run_store.ERROR)
    assert one.cause_of(closed) is one._workers.lost


def test_a_store_that_is_gone_takes_no_error_and_knows_no_cause(pair):
    one, other = pair
    del pair, one.store  # with rank 0 its store ends
    other.publish_error(DataError("row 7 has no tokens"))
    assert str(other.cause_of(RuntimeError("Broken pipe"))).endswith("lost contact with another rank: Broken pipe")


def test_a_wait_on_a_connection_of_its_own_keeps_nobody_waiting(pair):
    """As NCCL waits for rank 0's id, for minutes where rank 0 has failed, while a thread looks for that very error."""
    _, other = pair
    connection = other.own_connection()
    waiting = threading.Thread(target=connection.get, args=("id",))
    waiting.start()
    time.sleep(0.2)
    began = time.monotonic()
    assert other.read("error") is None
    assert time.monotonic() - began < 5.0
    assert waiting.is_alive()
    other.store.set("id", "1")
    waiting.join(timeout=30)
    assert not waiting.is_alive()
