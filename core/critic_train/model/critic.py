"""The critic: a transformers trunk without its vocabulary head, and a value head in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from critic_train.model.freezing import UpperPart
from critic_train.model.inputs import ModelInput


class ValueHead(nn.Linear):
    """One linear unit, kept and computed in float32 whatever the trunk computes in.

    A new head has weight 0 and the mean return as its bias, so that an untrained critic predicts the mean:
    explained variance 0. (A head drawn from N(0, 0.02), the usual default, starts far below.)
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, dtype=torch.float32)

    def reset_parameters(self) -> None:
        """Start at 0: no random numbers are drawn."""
        self.start_at(0.0)

    def start_at(self, mean_return: float) -> None:
        """Make the head predict `mean_return` everywhere."""
        with torch.no_grad():
            self.weight.zero_()
            self.bias.fill_(mean_return)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] of any float dtype -> [...] float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight, self.bias).squeeze(-1)


class Critic(nn.Module):
    """V(s) for every state that a micro-batch asks about.

    Args:
        trunk: a decoder without a language-model head, as `transformers.AutoModel` gives it.
        head: the value head.
    """

    def __init__(self, trunk: PreTrainedModel, head: ValueHead) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        # In a list, so that the layers it shares with the trunk are not registered twice.
        self._upper: list[UpperPart] = []

    @property
    def device(self) -> torch.device:
        """Where it computes; with `--offload all` its weights wait elsewhere."""
        mesh = getattr(self.head.weight, "device_mesh", None)
        return self.head.weight.device if mesh is None else torch.device(mesh.device_type)

    @property
    def upper(self) -> UpperPart | None:
        """The layers that kept states are given to; None where they are given to the head."""
        return self._upper[0] if self._upper else None

    def give_states_to_last(self, layers: int) -> None:
        """Take kept states, where a micro-batch has them, as what enters the last layers, or (0 layers) the head."""
        if layers:
            self._upper.append(UpperPart(self.trunk, layers))

    def states_below(self, batch: ModelInput) -> Tensor:
        """What `give_states_to_last` takes: [P, hidden_size] at every position, or [R, hidden_size] that are read."""
        return self.hidden(batch) if self.upper is None else self.upper.states_below(batch)

    def forward(self, batch: ModelInput) -> Tensor:
        """float32 [M]: the value paired with each of the M response tokens of the batch, in the batch's order.

        The value paired with token t is read off the hidden state of token t-1 of the same rollout: the state in
        which token t is chosen.
        """
        return self.head(self.hidden(batch))[batch.pair]  # type: ignore[no-any-return]

    def hidden(self, batch: ModelInput) -> Tensor:
        """[R, hidden_size]: the trunk's last hidden state at each of the R positions that are read."""
        if batch.states is None:
            states: Tensor = self.trunk(use_cache=False, **batch.trunk_arguments).last_hidden_state
        elif self.upper is None:
            return batch.states
        else:
            states = self.upper.last_states(batch, batch.states)
        states = states.flatten(0, 1)
        if len(states) == batch.computed_tokens:
            return states[batch.read]
        return states if batch.read_of_kept is None else states[batch.read_of_kept]
