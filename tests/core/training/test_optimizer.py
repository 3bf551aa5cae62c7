"""Learning rates are a pure function of the step."""

import pytest
from support import small_config

from critic_train.model.critic import freeze_all_but_last
from critic_train.training.optimizer import build_optimizer, schedule_factor, set_learning_rates
from critic_train.weights.loading import build_critic


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_warm_up_rises_by_equal_steps_to_the_peak(schedule):
    factors = [schedule_factor(schedule, step, total_steps=20, warmup_steps=4) for step in range(4)]
    assert factors == [0.25, 0.5, 0.75, 1.0]
    assert schedule_factor(schedule, 4, total_steps=20, warmup_steps=4) == 1.0


@pytest.mark.parametrize(("schedule", "half"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_after_it_the_rate_falls_to_0_one_step_after_the_last(schedule, half):
    factors = [schedule_factor(schedule, step, total_steps=20, warmup_steps=0) for step in range(21)]
    assert factors[10] == pytest.approx(half)
    assert factors[20] == pytest.approx(1.0 if schedule == "constant" else 0.0)
    assert factors == sorted(factors, reverse=True)


def test_every_group_has_its_own_peak_and_the_head_s_is_in_units_of_the_returns():
    critic = build_critic(small_config("Llama"), seed=0)
    optimizer = build_optimizer(critic, lr=1.0, head_lr=3.0, weight_decay=0.0, return_scale=20.0)
    assert set_learning_rates(optimizer, 0.5) == 0.5
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5, 30.0]


def test_of_a_head_alone_the_learning_rate_is_told_as_it_was_given():
    critic = build_critic(small_config("Llama"), seed=0)
    freeze_all_but_last(critic.trunk, 0)
    optimizer = build_optimizer(critic, lr=1.0, head_lr=3.0, weight_decay=0.0, return_scale=20.0)
    assert set_learning_rates(optimizer, 0.5) == 1.5
    assert [group["lr"] for group in optimizer.param_groups] == [30.0]
