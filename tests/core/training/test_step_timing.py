"""Timed steps leave the critic as it was."""

import pytest
import torch
from support import readable_rollouts, small_config

from critic_train.events import Progress
from critic_train.model.compute import Compute
from critic_train.settings import FitSettings
from critic_train.stopping import Stopped, StopRequest
from critic_train.training.step_timing import Layout, time_steps
from critic_train.weights.loading import build_critic

OPTIMIZER = FitSettings(data=["x"]).optimizer


def test_weights_stay_and_times_are_above_0():
    critic = build_critic(small_config("Llama"), 0).train()
    before = {name: tensor.clone() for name, tensor in critic.state_dict().items()}
    compute = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=120)
    timing = time_steps(
        critic, readable_rollouts(4), OPTIMIZER, compute, forest=True, caches_states=False, stop=StopRequest()
    )
    events = []
    while True:
        try:
            events.append(next(timing))
        except StopIteration as done:
            times = done.value
            break
    assert [event.stage for event in events if isinstance(event, Progress)] == ["timing steps"]
    assert min(times.train_seconds_per_token, times.predict_seconds_per_token, times.optimizer_seconds) > 0
    assert times.cache_seconds_per_token == 0
    assert times.moment_bytes == 8 * sum(p.numel() for p in critic.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in critic.state_dict().items())


def test_a_stop_is_raised():
    critic = build_critic(small_config("Llama"), 0)
    compute = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=120)
    stop = StopRequest(signal_number=15)
    with pytest.raises(Stopped):
        list(time_steps(critic, readable_rollouts(2), OPTIMIZER, compute, forest=True, caches_states=False, stop=stop))


def test_a_layout_counts_shared_prefixes_once():
    rollouts = readable_rollouts(4)
    compute = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=10**6)
    assert Layout.of(rollouts, compute, forest=True).computed_tokens < len(rollouts.input_ids)
    assert Layout.of(rollouts, compute, forest=False).computed_tokens >= len(rollouts.input_ids)
