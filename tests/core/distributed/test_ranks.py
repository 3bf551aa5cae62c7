"""Which rank a process is, and the single process, which pays nothing for what several need."""

import pytest
import torch

from critic_train.distributed.ranks import SINGLE_PROCESS, RankInfo, on_cuda, rank_info
from critic_train.errors import ConfigError, MachineError
from critic_train.stopping import StopRequest


def set_environment(monkeypatch, variables):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_group_of_one_changes_nothing():
    numbers, stop = torch.arange(3.0), StopRequest()
    assert SINGLE_PROCESS.all_reduce_sum(numbers) is numbers
    assert SINGLE_PROCESS.agreed_stop(stop) is stop
    assert SINGLE_PROCESS.broadcast({"a": 1}) == {"a": 1}
    assert not SINGLE_PROCESS.reported_out_of_memory(RuntimeError("connection closed"))


def test_memory_that_runs_out_on_the_only_process_is_an_error_of_the_machine():
    with pytest.raises(MachineError) as caught:
        SINGLE_PROCESS.end_out_of_memory("memory ran out with 64 tokens at once", "out of memory\n", "use less", {})
    assert caught.value.message == "memory ran out with 64 tokens at once\nout of memory"
    assert caught.value.hint == "use less"


@pytest.mark.parametrize(
    ("variables", "info"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}, RankInfo(rank=5, size=8, local_rank=1)),
        ({"WORLD_SIZE": "2", "RANK": "1"}, RankInfo(rank=1, size=2, local_rank=0)),
    ],
)
def test_the_environment_names_the_rank(monkeypatch, variables, info):
    set_environment(monkeypatch, variables)
    assert rank_info() == info


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"WORLD_SIZE": "two"}, "must be numbers"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK 2 and LOCAL_RANK 0 of WORLD_SIZE 2"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK -1 and LOCAL_RANK 0 of WORLD_SIZE 2"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "2"}, "RANK 1 and LOCAL_RANK 2 of WORLD_SIZE 2"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(monkeypatch, variables, complaint):
    set_environment(monkeypatch, variables)
    with pytest.raises(ConfigError, match=complaint):
        rank_info()


def test_auto_means_cuda_where_there_is_one(monkeypatch):
    assert [on_cuda(device) for device in ("cpu", "cuda", "cuda:1")] == [False, True, True]
    for available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert on_cuda("auto") == available
