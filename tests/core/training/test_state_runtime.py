"""Values of a critic: those of `predict_values`, finite, and none when asked to stop."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import readable_rollouts, small_config

from critic_train.errors import DivergedError
from critic_train.events import Event
from critic_train.model.compute import Compute
from critic_train.model.microbatches import predict_values
from critic_train.rollouts import Rollouts
from critic_train.stopping import Stopped, StopRequest
from critic_train.training.state import CriticRuntime
from critic_train.weights.loading import build_critic


@pytest.fixture
def runtime() -> CriticRuntime:
    compute = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=60)
    return CriticRuntime(
        critic=build_critic(small_config("Llama"), 0), compute=compute, forest=True, stop=StopRequest()
    )


def values(runtime: CriticRuntime, rollouts: Rollouts, step: int = 0) -> tuple[NDArray[np.float32], list[Event]]:
    """What `values` returns, and the events meanwhile."""
    passing = runtime.values(rollouts, step=step, stage="evaluating", before=10, total=100)
    events = []
    while True:
        try:
            events.append(next(passing))
        except StopIteration as ended:
            return ended.value, events


def test_values_are_those_of_the_critic(runtime):
    rollouts = readable_rollouts(4)
    with torch.no_grad():
        runtime.critic.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    expected = predict_values(runtime.critic, rollouts, runtime.compute, forest=True)
    found, events = values(runtime, rollouts)
    np.testing.assert_array_equal(found, expected)
    done = [event.done for event in events]
    assert len(done) > 2
    assert done == sorted(done)
    assert done[0] >= 10
    assert done[-1] < 10 + len(rollouts)
    assert {(event.stage, event.total) for event in events} == {("evaluating", 100)}


@pytest.mark.parametrize("bias", [0.3, -7.25])
def test_a_head_of_weight_0_needs_no_pass_and_gives_the_same(runtime, bias, monkeypatch):
    rollouts = readable_rollouts(4)
    runtime.critic.head.set_constant(bias)
    expected = predict_values(runtime.critic, rollouts, runtime.compute, forest=True)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the trunk was run")

    monkeypatch.setattr(runtime.critic.trunk, "forward", refuse)
    found, events = values(runtime, rollouts)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype
    assert events == []


def test_a_value_that_is_not_finite_names_the_step(runtime):
    with torch.no_grad():
        runtime.critic.head.bias.fill_(math.nan)
    with pytest.raises(DivergedError, match="NaN or infinite values after step 7"):
        values(runtime, readable_rollouts(2), step=7)


def test_a_stop_is_raised(runtime):
    runtime.stop.signal_number = 15
    with pytest.raises(Stopped):
        values(runtime, readable_rollouts(2))


def test_a_lowered_token_budget_is_reported_once(runtime):
    runtime.compute.max_tokens = 30
    assert ["memory ran out with 60" in notice.message for notice in runtime.memory_notices()] == [True]
    assert list(runtime.memory_notices()) == []
