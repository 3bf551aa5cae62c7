"""One process alone pays nothing for what several need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from critic_train.distributed.init import init_ranks
from critic_train.distributed.ranks import SINGLE_PROCESS, rank_info
from critic_train.errors import ConfigError
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest

ROOT = Path(__file__).parents[3]
SETTINGS = FitSettings(data=["none"])


def test_a_group_of_one_changes_nothing():
    with init_ranks(SETTINGS, nproc=1, device="cpu") as ranks:
        assert ranks is SINGLE_PROCESS
    numbers, stop = torch.arange(3.0), StopRequest()
    assert SINGLE_PROCESS.all_reduce_sum(numbers) is numbers
    assert SINGLE_PROCESS.agreed_stop(stop) is stop
    assert SINGLE_PROCESS.broadcast({"a": 1}) == {"a": 1}


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ({"WORLD_SIZE": "two"}, "must be numbers"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK 2 and LOCAL_RANK 0 of WORLD_SIZE 2"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(monkeypatch, said, wrong):
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=wrong):
        rank_info()


def test_nproc_and_torchrun_may_not_differ(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match="--nproc 2, but the environment says that this is one of 4"):  # noqa: SIM117
        with init_ranks(SETTINGS, nproc=2, device="cpu"):
            pass


@pytest.mark.slow
def test_nothing_of_process_groups_is_imported():
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'core')!r})\n"
        "import critic_train.training.fit, critic_train.evaluation.evaluate\n"
        "print([m for m in sys.modules if m.startswith('critic_train.distributed.')])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found = {name.removeprefix("critic_train.distributed.") for name in ast.literal_eval(shown.stdout)}
    assert found == {"init", "ranks", "rank_errors"}
