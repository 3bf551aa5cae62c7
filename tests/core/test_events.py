"""A job's events, followed to the result."""

import pytest

from critic_train.events import Notice, Progress, RunEnded, run_to_end


def test_the_result_is_the_last_event_and_warnings_are_given_as_pythons():
    ended = RunEnded(status="finished", result={"steps": 1})
    events = [Notice(message="a head was created"), Progress(stage="reading", done=1, total=2)]
    with pytest.warns(UserWarning, match="rows were left out") as warned:
        assert run_to_end(iter([*events, Notice(message="rows were left out", level="warning"), ended])) is ended
    assert [str(warning.message) for warning in warned] == ["rows were left out"]


def test_the_job_is_run_to_its_very_end():
    """What it cleans up after its last event is cleaned up: a lock, other processes."""
    closed = []

    def job():
        yield RunEnded(status="finished")
        closed.append(True)

    run_to_end(job())
    assert closed == [True]


def test_a_job_that_does_not_say_how_it_ended_is_a_bug():
    with pytest.raises(RuntimeError, match="without a RunEnded"):
        run_to_end([])
