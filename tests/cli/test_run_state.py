"""What a run has said so far."""

from itertools import pairwise

import pytest

from critic_train.events import CheckpointSaved, EvaluationEnded, Progress, RunStarted, StepEnded
from critic_train_cli.run_state import CURVE_POINTS, STEPS_AVERAGED, Curve, RunState


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def step(number, loss=0.5, seconds=None, rollouts=None):
    timing = {"memory_bytes": 1} if seconds is None else {"step_seconds": seconds}
    return StepEnded(step=number, epoch=0, metrics={"value_loss": loss, "rollouts": rollouts}, timing=timing)


@pytest.fixture
def clock():
    return Clock()


def started(clock, *, first_step=0, plan=(60, 40), **summary):
    state = RunState(clock)
    state.update(
        RunStarted(out="o", total_steps=sum(plan), steps_per_epoch=list(plan), first_step=first_step, summary=summary)
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


def test_time_left_is_at_the_pace_of_this_starts_steps(clock):
    state = started(clock, first_step=50)
    assert state.left_seconds is None
    clock.now = 500.0  # what a start takes once is not what a step takes
    state.update(step(51, seconds=8.0))
    assert (state.elapsed_seconds, state.left_seconds) == (500.0, 49 * 8.0)
    state.update(step(52, seconds=2.0))
    state.update(step(53, seconds=4.0))
    assert state.left_seconds == 47 * 3.0, "the first step of a start is left out"
    state.update(step(100, seconds=4.0))
    assert state.left_seconds == 0.0


def test_many_steps_count_with_the_newest_of_them(clock):
    state = started(clock)
    for number in range(1, 41):
        state.update(step(number, seconds=100.0))
    for number in range(41, 41 + STEPS_AVERAGED):
        state.update(step(number, seconds=1.0))
    assert state.left_seconds == 100 - 40 - STEPS_AVERAGED


def test_time_left_has_the_evaluations_to_come(clock):
    """100 steps, an evaluation every 30 and at the end: 4 after step 0, of which each takes as long as the last did."""
    state = started(clock, eval_every=30, held_out_rollouts=240)
    state.update(Progress(stage="evaluating", done=0, total=240))
    state.update(EvaluationEnded(step=0, metrics={}, best=False))  # of a new head: it costs nothing
    state.update(step(1, seconds=6.0, rollouts=64))
    # None is timed yet: a forward pass is a third of a step, over 240 rollouts in place of 64.
    assert state.left_seconds == pytest.approx(99 * 6.0 + 4 * 6.0 / 3 * 240 / 64)
    state.update(step(30, seconds=6.0, rollouts=64))
    assert state.left_seconds == pytest.approx(70 * 6.0 + 4 * 7.5), "that of step 30 is still to come"
    clock.now = 1000.0
    state.update(Progress(stage="evaluating", done=0, total=240))
    clock.now = 1012.0
    state.update(EvaluationEnded(step=30, metrics={}, best=True))
    assert state.left_seconds == pytest.approx(70 * 6.0 + 3 * 12.0)


def test_a_step_since_the_start_is_told_from_those_before(clock):
    state = started(clock, first_step=50)
    assert not state.has_learned
    state.update(step(51))
    assert state.has_learned


def test_a_solved_head_is_worth_saving(clock):
    state = started(clock)
    state.update(Progress(stage="solving the value head", done=60, total=64))
    assert not state.has_learned
    state.update(Progress(stage="solving the value head", done=64, total=64))
    assert state.has_learned


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
