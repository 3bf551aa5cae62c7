"""Learning rates are a pure function of the step."""

import pytest
import torch

from critic_train.training.optimizer import schedule_factor, set_learning_rates


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


def test_every_group_has_its_own_peak():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr, "peak_lr": lr} for lr in (1.0, 3.0)]
    optimizer = torch.optim.AdamW(groups)
    assert set_learning_rates(optimizer, 0.5) == 0.5
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1.5]
