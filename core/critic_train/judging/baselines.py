"""What a critic has to beat."""

import numpy as np

from critic_train.judging.moments import Floats, Integers


def leave_one_out(mean_returns: Floats, group: Integers, alone: float) -> tuple[Floats, int]:
    """The mean of the other rollouts of the prompt group.

    GRPO's baseline (Shao et al. 2024, DeepSeekMath, with the group mean) in its unbiased, leave-one-out form
    (RLOO, Ahmadian et al. 2024). A rollout's mean return is its reward when gamma = lambda = 1.

    Args:
        mean_returns: float64 [m], mean return over each rollout's response tokens.
        group: int64 [m], index of its prompt group, from 0.
        alone: the figure for rollouts that are alone in their group.

    Returns:
        (float64 [m], number of rollouts that are alone).
    """
    size = np.bincount(group)
    reference = np.zeros(len(size))
    reference[group] = mean_returns
    # Distances from a member of the group: equal returns then have exactly their own value as mean.
    distance = mean_returns - reference[group]
    others = np.bincount(group, weights=distance)[group] - distance
    peers = size[group] - 1
    lone = peers == 0
    means = reference[group] + others / np.maximum(peers, 1)
    return np.where(lone, alone, means), int(np.count_nonzero(lone))
