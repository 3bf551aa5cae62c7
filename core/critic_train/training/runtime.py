"""A critic together with how it computes: device, precision, token budget and layout."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from critic_train.events import Event, Notice
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.microbatches import predict_values
from critic_train.rollouts import Rollouts
from critic_train.stopping import Stopped, StopRequest
from critic_train.training.divergence import diverged


@dataclass(slots=True, kw_only=True)
class CriticRuntime:
    """A critic and how it computes.

    Attributes:
        critic: on its device, or sharded over the ranks.
        compute: device, precision, ranks and token budget; its token budget is lowered where memory runs out.
        forest: lay rollouts out as a forest of shared prefixes, or as padded rows.
        stop: checked before every micro-batch, by all ranks together.
    """

    critic: Critic
    compute: Compute
    forest: bool
    stop: StopRequest

    def values(self, rollouts: Rollouts, *, step: int) -> NDArray[np.float32]:
        """The critic's values, without gradients.

        Args:
            rollouts: any number of them, the same on all ranks.
            step: optimizer steps the critic has taken, for the message of an error.

        Returns:
            float32 [T], 0 where response_mask is false.

        Raises:
            DivergedError: a value is not finite.
            Stopped: asked to stop.
        """
        values = predict_values(self.critic, rollouts, self.compute, forest=self.forest, stop=self.stop)
        if values is None:
            raise Stopped
        if not np.isfinite(values).all():
            raise diverged(f"the critic predicts NaN or infinite values after step {step}")
        return values

    def memory_notices(self) -> Iterator[Event]:
        """A warning where memory ran out and the token budget was lowered since this was last called."""
        if sentence := self.compute.lowered():
            yield Notice(message=sentence, level="warning")
