"""The value head."""

import numpy as np
import torch
from support import branching_rollouts, small_config

from critic_train.model.compute import Compute
from critic_train.model.microbatches import predict_values
from critic_train.weights.loading import build_critic

CPU = Compute(device=torch.device("cpu"), precision="fp32", max_tokens=10_000)


def test_a_new_head_predicts_the_mean_whatever_the_trunk_says():
    critic = build_critic(small_config("Llama"), seed=0)
    critic.head.set_constant(0.4)
    values = predict_values(critic, branching_rollouts(), CPU, forest=True)
    assert np.all(values[branching_rollouts().response_mask] == np.float32(0.4))
