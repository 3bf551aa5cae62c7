"""V_old of an epoch: the critic's values at its start, written once, removed when nothing resumes from before."""

import numpy as np
import pytest
import torch
from support import readable_rollouts, small_config

from critic_train.data.rollout_cache import write_cache
from critic_train.errors import MachineError
from critic_train.events import Progress
from critic_train.model.compute import Compute
from critic_train.model.microbatches import predict_values
from critic_train.stopping import Stopped, StopRequest
from critic_train.training.dataset import RolloutSet
from critic_train.training.old_values import OldValues
from critic_train.training.plan import old_values_column
from critic_train.training.state import CriticRuntime
from critic_train.weights.loading import build_critic


@pytest.fixture
def old_values(tmp_path) -> OldValues:
    rollouts = readable_rollouts(6)
    cache = write_cache(tmp_path / "train", [rollouts])
    index = np.arange(len(rollouts), dtype=np.int64)
    compute = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=60)
    critic = build_critic(small_config("Llama"), 0)
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    runtime = CriticRuntime(critic=critic, compute=compute, forest=True, stop=StopRequest())
    return OldValues(runtime=runtime, train=RolloutSet(cache=cache, index=index, files=[], renames={}))


def test_the_column_holds_the_values_at_the_start_of_the_epoch(old_values):
    events = list(old_values.take(1, begun=False, step=4))
    assert {(event.stage, event.total) for event in events if isinstance(event, Progress)} == {("old values", 24)}
    train = old_values.train
    rollouts = train.read(train.index, values_from=old_values_column(1))
    runtime = old_values.runtime
    expected = predict_values(runtime.critic, rollouts, runtime.compute, forest=True)
    np.testing.assert_allclose(rollouts.values, expected, rtol=1e-5, atol=1e-6)
    assert list(old_values.take(1, begun=True, step=5)) == []


def test_they_are_not_taken_from_a_critic_that_has_moved_on(old_values):
    with pytest.raises(MachineError, match="old_values-epoch-0 is gone"):
        list(old_values.take(0, begun=True, step=1))


def test_a_stop_leaves_no_column(old_values):
    old_values.runtime.stop.signal_number = 15
    with pytest.raises(Stopped):
        list(old_values.take(0, begun=False, step=0))
    assert not [path for path in old_values.train.cache.directory.iterdir() if "old_values" in path.name]


def test_columns_of_earlier_epochs_are_removed(old_values):
    for epoch in range(3):
        list(old_values.take(epoch, begun=False, step=epoch))
    old_values.drop_before(2)
    cache = old_values.train.cache
    assert [cache.has_column(old_values_column(epoch)) for epoch in range(3)] == [False, False, True]
