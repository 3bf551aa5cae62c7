"""The rollouts that packing and attention are tried on before a run."""

from types import SimpleNamespace

import numpy as np

from critic_train.training.build import SAMPLED_ROLLOUTS, selfcheck_sample


def test_packing_is_tried_on_rollouts_of_one_mini_batch_and_the_longest():
    lengths = np.array([3, 9, 4, 8, 5, 7, 6, 2] * 8)
    index = np.arange(1, 60, 2)  # the set has every other rollout of its cache
    train = SimpleNamespace(cache=SimpleNamespace(lengths=lengths), index=index, read=lambda rollouts: rollouts)
    plan = SimpleNamespace(mini_batch=lambda epoch, number: np.arange(20, 29) if (epoch, number) == (0, 0) else None)
    tried = selfcheck_sample(train, plan)
    assert tried[:-1].tolist() == list(range(20, 29))[:SAMPLED_ROLLOUTS]
    assert lengths[index[tried[-1]]] == lengths[index].max()
