"""Values of whole rollouts, without gradients: for evaluation and for fresh old values."""

import numpy as np
import torch
from numpy.typing import NDArray

from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.memory import in_memory
from critic_train.model.microbatches import micro_batches
from critic_train.rollouts import Rollouts
from critic_train.stopping import StopRequest


def predict_values(
    critic: Critic, rollouts: Rollouts, compute: Compute, *, forest: bool, stop: StopRequest | None = None
) -> NDArray[np.float32] | None:
    """The critic's value paired with every response token.

    Args:
        critic: on its device.
        rollouts: any number of rollouts; those that stand together should share prompts.
        compute: device, precision and token budget, which is lowered where memory runs out; of several ranks each
            computes its share, and all get all values.
        forest: lay rollouts out as a forest, or as padded rows.
        stop: looked at between micro-batches.

    Returns:
        float32 [T], 0 where response_mask is false; None when asked to stop.
    """

    def attempt() -> NDArray[np.float32] | None:
        values = np.zeros(len(rollouts.input_ids), dtype=np.float32)
        try:
            with torch.no_grad(), compute.autocast():
                for batch in micro_batches(rollouts, compute, forest=forest):
                    if stop is not None and stop.look():
                        return None
                    values[batch.tokens] = critic(batch).float().cpu().numpy()
        finally:
            compute.ranks.in_parts((critic.trunk, critic.head))
        return compute.ranks.total_of(values)

    return in_memory(attempt, rollouts, compute, critic)
