"""What a run has said so far."""

from itertools import pairwise

import pytest

from critic_train.events import CheckpointSaved, EvaluationEnded, Progress, RunStarted, StepEnded
from critic_train_cli.run_state import CURVE_POINTS, Curve, RunState


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def step(number, loss=0.5):
    return StepEnded(step=number, epoch=0, metrics={"value_loss": loss}, timing={"memory_bytes": 1})


@pytest.fixture
def clock():
    return Clock()


def started(clock, *, first_step=0, plan=(60, 40)):
    state = RunState(clock)
    state.update(
        RunStarted(out="o", total_steps=sum(plan), steps_per_epoch=list(plan), first_step=first_step, summary={})
    )
    return state


@pytest.mark.parametrize(
    ("number", "epoch"),
    [(0, (1, 2, 0, 60)), (1, (1, 2, 1, 60)), (60, (1, 2, 60, 60)), (61, (2, 2, 1, 40)), (100, (2, 2, 40, 40))],
)
def test_epoch_is_read_off_the_plan(clock, number, epoch):
    state = started(clock)
    if number:
        state.update(step(number))
    assert state.epoch == epoch


def test_before_the_start_there_is_nothing_to_tell(clock):
    state = RunState(clock)
    assert state.left_seconds is None
    assert state.epoch == (1, 1, 0, 0)


def test_time_left_is_at_this_sessions_pace(clock):
    state = started(clock, first_step=50)
    assert state.left_seconds is None
    clock.now = 20.0
    state.update(step(60))
    assert (state.elapsed_seconds, state.left_seconds) == (20.0, 80.0)
    state.update(step(100))
    assert state.left_seconds == 0.0


def test_stage_goes_when_it_is_done_or_something_else_happens(clock):
    state = started(clock)
    state.update(Progress(stage="evaluating", done=1, total=2))
    assert state.stage is not None
    state.update(Progress(stage="evaluating", done=2, total=2))
    assert state.stage is None
    state.update(Progress(stage="counting", done=5, total=0))
    assert state.stage is not None
    state.update(step(1))
    assert state.stage is None


def test_stage_has_its_own_time(clock):
    state = RunState(clock)
    state.update(Progress(stage="one", done=0, total=9))
    clock.now = 3.0
    state.update(Progress(stage="one", done=1, total=9))
    assert state.stage_seconds == 3.0
    state.update(Progress(stage="two", done=0, total=9))
    assert state.stage_seconds == 0.0


def test_newest_and_best_are_kept(clock):
    state = started(clock)
    good = EvaluationEnded(step=1, metrics={}, best=True)
    worse = EvaluationEnded(step=2, metrics={}, best=False)
    saved = CheckpointSaved(step=2, path="p", size_bytes=1)
    for event in (good, worse, saved):
        state.update(event)
    assert (state.best, state.evaluation, state.checkpoint) == (good, worse, saved)


def test_curve_is_all_the_points_while_there_are_few():
    curve = Curve()
    for value in (3.0, None, 1.0):
        curve.add(value)
    assert curve.points == [3.0, 1.0]


def test_curve_stays_short_and_true_however_long_the_run():
    curve = Curve()
    total = 100_000
    for value in range(total):
        curve.add(float(value))
    points = curve.points
    assert CURVE_POINTS <= len(points) <= 2 * CURVE_POINTS
    gaps = {b - a for a, b in pairwise(points[:-1])}
    assert len(gaps) == 1
    assert points[0] == (next(iter(gaps)) - 1) / 2


def test_a_loss_that_is_missing_is_no_point(clock):
    state = started(clock)
    state.update(step(1, loss=None))
    state.update(step(2, loss=0.25))
    assert state.losses.points == [0.25]
