import numpy as np
import pytest
from support import lines_executed

from critic_train.settings import OptimizerSettings
from critic_train.training.plan import TrainingPlan, make_plan

RAGGED = np.repeat(np.arange(6), [1, 2, 3, 4, 5, 6])


def plan_of(groups=RAGGED, **changes):
    return TrainingPlan(groups, **{"batch_size": 8, "seed": 3, "epochs": 3, "max_steps": None, **changes})


@pytest.mark.parametrize(
    "groups", [RAGGED, np.arange(12) // 4, np.zeros(5, dtype=np.int64), np.zeros(20, dtype=np.int64)]
)
def test_steps_are_the_mini_batches_of_the_epochs_one_after_another(groups):
    plan = plan_of(groups)
    places = [plan.locate(step) for step in range(plan.total_steps)]
    assert places == [(e, b) for e, steps in enumerate(plan.steps_per_epoch) for b in range(steps)]
    assert plan.locate(plan.total_steps) == (3, 0)
    for epoch in range(3):
        seen = [plan.mini_batch(epoch, number) for number in range(plan.steps_per_epoch[epoch])]
        assert sorted(np.concatenate(seen).tolist()) == list(range(len(groups)))


def test_an_epoch_asked_for_again_is_the_same():
    plan = plan_of()
    before = plan.mini_batch(1, 0).tolist()
    plan.mini_batch(2, 0)
    assert plan.mini_batch(1, 0).tolist() == before


def test_where_a_run_ends_and_what_follows_from_it():
    whole = sum(plan_of().steps_per_epoch)
    assert plan_of().total_steps == whole
    assert plan_of(max_steps=4).total_steps == 4
    assert plan_of(epochs=None, max_steps=100).total_steps == 100
    assert plan_of(epochs=None, max_steps=100).warmup_steps == 3
    assert plan_of(epochs=None, max_steps=100).eval_every == 10
    assert plan_of(epochs=None, max_steps=100, eval_every=7, warmup_steps=500).eval_every == 7
    assert plan_of(epochs=None, max_steps=100, warmup_steps=500).warmup_steps == 100


def test_a_long_run_over_few_rollouts_starts_at_once():
    def first_and_last(steps):
        plan = plan_of(np.zeros(8, dtype=np.int64), epochs=None, max_steps=steps)
        assert plan.locate(steps - 1) == (steps - 1, 0)

    # A few lines an epoch and no more, so that 200,000 take a fraction of a second.
    assert lines_executed(lambda: first_and_last(2000)) < 20 * 2000


@pytest.mark.parametrize(("shuffle", "together"), [(None, True), ("groups", True), ("rollouts", False)])
def test_whether_the_rollouts_of_a_prompt_stay_together(shuffle, together):
    groups = np.arange(768 * 8) // 8
    plan = make_plan(OptimizerSettings(shuffle=shuffle, epochs=2), groups, None)
    for epoch in range(2):
        batches = [plan.mini_batch(epoch, number) for number in range(plan.steps_per_epoch[epoch])]
        assert {len(batch) for batch in batches} == {64}
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(groups)))
        prompts = [len(np.unique(groups[batch])) for batch in batches]
        # Of 64 rollouts drawn from 6,144, fewer than three pairs are of one prompt on average.
        assert set(prompts) == {8} if together else np.mean(prompts) > 61
    assert plan.mini_batch(0, 0).tolist() != plan.mini_batch(1, 0).tolist()
