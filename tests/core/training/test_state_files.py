"""The smaller budget that a run remembers; how state is saved on several ranks is in test_out_of_memory."""

import json

import pytest
import torch

from critic_train.distributed.ranks import SINGLE_PROCESS
from critic_train.model.compute import Compute
from critic_train.run.run_directory import RunDirectory
from critic_train.training.state_files import BUDGET_FILE, begin_with_remembered_budget, remember_budget


@pytest.fixture
def run(tmp_path):
    with RunDirectory(tmp_path / "run") as run:
        yield run


def begun(run, asked):
    """What a start with --max-tokens says, and the budgets it begins with."""
    compute = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=asked)
    notices = [event.message for event in begin_with_remembered_budget(run, asked, compute)]
    return notices, compute.max_tokens, compute.checked_rollouts


def test_a_run_that_never_ran_out_begins_as_asked(run):
    assert begun(run, 64) == ([], 64, None)


def test_the_same_command_begins_with_what_the_run_remembers(run):
    remember_budget(run, 64, SINGLE_PROCESS, {"max_tokens": 32})
    remember_budget(run, 64, SINGLE_PROCESS, {"checked_rollouts": 2})
    (tokens, check), *budgets = begun(run, 64)
    assert tokens.startswith("memory ran out with 64 tokens at once before: starting with 32")
    assert check == "memory ran out in the self-check before: it takes 2 rollouts at most"
    assert budgets == [32, 2]


def test_another_budget_is_tried_as_it_is_and_then_remembered_alone(run):
    remember_budget(run, 64, SINGLE_PROCESS, {"max_tokens": 32})
    assert begun(run, 48) == ([], 48, None)
    remember_budget(run, 48, SINGLE_PROCESS, {"checked_rollouts": 2})
    assert json.loads((run.path / BUDGET_FILE).read_text()) == {"asked": 48, "ranks": 1, "checked_rollouts": 2}


@pytest.mark.parametrize("max_tokens", ["32", -1, 0, 64, 1000, True, None])
def test_what_is_no_smaller_budget_is_passed_over(run, max_tokens):
    run.write_json(BUDGET_FILE, {"asked": 64, "ranks": 1, "max_tokens": max_tokens})
    assert begun(run, 64) == ([], 64, None)
