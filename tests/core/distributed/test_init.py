"""Joining the ranks of a run; on one process alone nothing is joined and nothing for it is imported."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from rank_work import fail_before_groups, fail_on_rank
from ranks import on_ranks
from support import StopAfter

from critic_train.distributed.init import init_ranks
from critic_train.distributed.ranks import SINGLE_PROCESS
from critic_train.errors import ConfigError, MachineError
from critic_train.settings import FitSettings
from critic_train.stopping import Stopped
from critic_train.training.fit import fit

ROOT = Path(__file__).parents[3]
SETTINGS = FitSettings(data=["none"])


def test_one_process_joins_nothing():
    with init_ranks(SETTINGS, nproc=1, device="cpu") as ranks:
        assert ranks is SINGLE_PROCESS


def test_nproc_and_torchrun_may_not_differ(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match="--nproc 2, but the environment says that this is one of 4"):  # noqa: SIM117
        with init_ranks(SETTINGS, nproc=2, device="cpu"):
            pass


def test_more_ranks_than_cores_are_refused_before_one_is_started(monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    monkeypatch.setattr("critic_train.distributed.launch.cores_here", lambda: 2)
    with pytest.raises(MachineError, match=r"^--nproc 64: this machine has 2 cores$") as caught:  # noqa: SIM117
        with init_ranks(SETTINGS, nproc=64, device="cpu"):
            pass
    assert caught.value.hint == "--nproc 2 uses all of them"


def test_a_signal_while_ranks_start_is_heard(monkeypatch, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr("critic_train.distributed.launch.PATIENCE_SECONDS", 0.6)
    with pytest.raises(Stopped), init_ranks(SETTINGS, nproc=2, device="cpu", stop=StopAfter(looks=3)):
        raise AssertionError("the block has begun without rank 1")
    ended = list(fit(FitSettings(data=["none"], nproc=2, device="cpu"), StopAfter(looks=3)))
    assert [event.status for event in ended] == ["interrupted"]


@pytest.mark.parametrize("rank", [0, 2])
def test_an_error_of_one_rank_ends_the_block_on_all(rank):
    """The others wait for it in a collective. Rank 0 reports whose error it is; where it is rank 0's, the store may be
    gone before they have read it."""
    answers = on_ranks(3, fail_on_rank, rank)
    assert answers[rank] == {"fault": "DataError", "message": "row 7 has no tokens"}
    cause = {"fault": "DataError", "message": f"rank {rank}: row 7 has no tokens"}
    assert answers[0] == (cause if rank else answers[rank])
    for number in {1, 2} - {rank}:
        lost = answers[number]["message"].startswith(f"rank {number} of 3 lost contact with another rank")
        assert answers[number] == cause or lost


def test_a_rank_that_is_gone_before_groups_are_made_is_seen_at_once():
    """Not when the time limit of the group that is being made is over."""
    said = on_ranks(2, fail_before_groups)[0]["message"]
    assert said.startswith("rank 0 of 2 lost contact with another rank")
    assert "by peer" in said  # a connection that closed or was reset; no "wait timeout"


def test_a_rank_that_cannot_start_is_reported_with_its_last_words(monkeypatch, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'no module named torch' >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    expected = r"^rank 1 \(process \d+\) ended with exit code 3:\nno module named torch$"
    with pytest.raises(MachineError, match=expected), init_ranks(SETTINGS, nproc=2, device="cpu"):
        raise AssertionError("the block has begun without rank 1")


@pytest.mark.slow
def test_nothing_of_process_groups_is_imported():
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'core')!r})\n"
        "import critic_train.training.fit, critic_train.evaluation.evaluate\n"
        "print([m for m in sys.modules if m.startswith('critic_train.distributed.')])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    imported = {name.removeprefix("critic_train.distributed.") for name in ast.literal_eval(shown.stdout)}
    assert imported == {"init", "ranks", "rank_errors"}
