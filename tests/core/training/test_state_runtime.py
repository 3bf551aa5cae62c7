"""Values of a critic: those of `predict_values`, finite, and none when asked to stop."""

import math

import numpy as np
import pytest
import torch
from support import readable_rollouts, small_config

from critic_train.errors import DivergedError
from critic_train.model.compute import Compute
from critic_train.model.loading import build_critic
from critic_train.model.microbatches import predict_values
from critic_train.stopping import Stopped, StopRequest
from critic_train.training.state import CriticRuntime


@pytest.fixture
def runtime() -> CriticRuntime:
    compute = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=60)
    return CriticRuntime(
        critic=build_critic(small_config("Llama"), 0), compute=compute, forest=True, stop=StopRequest()
    )


def test_values_are_those_of_the_critic(runtime):
    rollouts = readable_rollouts(4)
    expected = predict_values(runtime.critic, rollouts, runtime.compute, forest=True)
    np.testing.assert_array_equal(runtime.values(rollouts, step=0), expected)


def test_a_value_that_is_not_finite_names_the_step(runtime):
    with torch.no_grad():
        runtime.critic.head.bias.fill_(math.nan)
    with pytest.raises(DivergedError, match="NaN or infinite values after step 7"):
        runtime.values(readable_rollouts(2), step=7)


def test_a_stop_is_raised(runtime):
    runtime.stop.signal_number = 15
    with pytest.raises(Stopped):
        runtime.values(readable_rollouts(2), step=0)


def test_a_lowered_token_budget_is_reported_once(runtime):
    runtime.compute.max_tokens = 30
    assert ["memory ran out with 60" in notice.message for notice in runtime.memory_notices()] == [True]
    assert list(runtime.memory_notices()) == []
