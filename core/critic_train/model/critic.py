"""Train the head, or the head and the last layers, of a trunk whose rest is frozen.

What a frozen part computes never changes, so the states below the trained part can be kept and given back in place of
the tokens: a micro-batch then costs what is trained, and nothing of the rest.

The critic: a transformers trunk without its vocabulary head, and a value head in float32.
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from critic_train.errors import ModelError
from critic_train.model.model_input import ModelInput


def freeze_all_but_last(trunk: PreTrainedModel, layers: int) -> None:
    """Leave only the last layers, and the final norm above them, to be trained; with 0 layers nothing of the trunk.

    Raises:
        ModelError: the trunk has not so many layers, or keeps them where nobody knows.
    """
    trunk.requires_grad_(False)
    if layers == 0:
        return
    stack = decoder_layers(trunk)
    if layers >= len(stack):
        raise ModelError(
            f"--train last-{layers}: {trunk.config.model_type} has {len(stack)} layers",
            hint="--train full trains all of them",
        )
    stack[-layers:].requires_grad_(True)
    for name, child in trunk.named_children():
        if "norm" in name:
            child.requires_grad_(True)


def decoder_layers(trunk: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers.

    Raises:
        ModelError: they are not in `layers`.
    """
    stack = getattr(trunk, "layers", None)
    if not isinstance(stack, nn.ModuleList):
        raise ModelError(
            f"{trunk.config.model_type} keeps its layers elsewhere than in `layers`: --train last-K cannot find them",
            hint="--train head, lora or full",
        )
    return stack


class LastLayers:
    """The last layers of a trunk as a trunk of their own, which takes hidden states in place of tokens.

    The layers and the norm are the trunk's: what is trained in one is trained in the other.

    Args:
        trunk: the whole.
        layers: how many of its last layers.
    """

    def __init__(self, trunk: PreTrainedModel, layers: int) -> None:
        self._first = decoder_layers(trunk)[-layers]
        self._whole = trunk
        # Not copy.copy: a sharded module's class makes a new module of its own when it is asked for one. The copy
        # shares the trunk's hooks, so that weights above the layers are gathered and their gradients summed as there.
        self._upper: Any = object.__new__(type(trunk))
        vars(self._upper).update(vars(trunk))
        self._upper._modules = dict(trunk._modules)
        self._upper.layers = nn.ModuleList(decoder_layers(trunk)[-layers:])

    def states_to_cache(self, batch: ModelInput) -> Tensor:
        """[P, hidden_size]: the hidden states that enter the first of the layers, at every position."""
        seen: list[Tensor] = []
        sharded = type(self._whole).__name__.startswith("FSDP")

        def look(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(arguments[0])
            if not sharded:  # FSDP2 keeps count of passes that were begun: there all layers are gone through
                raise _ReachedError

        hook = self._first.register_forward_pre_hook(look)
        with contextlib.suppress(_ReachedError):
            try:
                self._whole(use_cache=False, **batch.trunk_arguments)
            finally:
                hook.remove()
        if not seen:
            raise ModelError(f"{self._whole.config.model_type} went by its own layers")
        return seen[0].flatten(0, 1)

    def last_states(self, batch: ModelInput, states: Tensor) -> Tensor:
        """What the whole trunk's `last_hidden_state` would be, from [P, hidden_size] states below."""
        arguments = dict(batch.trunk_arguments)
        shape = arguments.pop("input_ids").shape
        output = self._upper(use_cache=False, inputs_embeds=states.view(*shape, -1), **arguments)
        found: Tensor = output.last_hidden_state
        return found


class _ReachedError(Exception):
    """The layer was reached; the rest of the pass is not wanted."""


@torch.no_grad()
def last_layers_agree(trunk: PreTrainedModel, upper: LastLayers, batch: ModelInput, tolerance: float) -> bool:
    """Whether the upper part gives what the whole gives: some architectures do more to embeddings than pass them on.

    Those may also raise whatever their code raises.
    """
    whole = trunk(use_cache=False, **batch.trunk_arguments).last_hidden_state
    parted = upper.last_states(batch, upper.states_to_cache(batch))
    return bool((parted - whole).abs().max() <= tolerance * whole.abs().max())


class ValueHead(nn.Linear):
    """One linear unit, kept and computed in float32 whatever the trunk computes in.

    A new head has weight 0 and the mean return as its bias, so that an untrained critic predicts the mean:
    explained variance 0. (A head drawn from N(0, 0.02), the usual default, starts far below.)
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, dtype=torch.float32)

    def reset_parameters(self) -> None:
        """Start at 0: no random numbers are drawn."""
        self.set_constant(0.0)

    def set_constant(self, mean_return: float) -> None:
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
        self._upper: list[LastLayers] = []

    @property
    def device(self) -> torch.device:
        """Where it computes; with `--offload all` its weights wait elsewhere."""
        mesh = getattr(self.head.weight, "device_mesh", None)
        return self.head.weight.device if mesh is None else torch.device(mesh.device_type)

    @property
    def last_layers(self) -> LastLayers | None:
        """The layers that kept states are given to; None where they are given to the head."""
        return self._upper[0] if self._upper else None

    def use_cached_states(self, layers: int) -> None:
        """Take kept states, where a micro-batch has them, as what enters the last layers, or (0 layers) the head."""
        if layers:
            self._upper.append(LastLayers(self.trunk, layers))

    def states_to_cache(self, batch: ModelInput) -> Tensor:
        """What `use_cached_states` takes: [P, hidden_size] at every position, or [R, hidden_size] that are read."""
        return self.hidden(batch) if self.last_layers is None else self.last_layers.states_to_cache(batch)

    def forward(self, batch: ModelInput) -> Tensor:
        """float32 [M]: the value paired with each of the M response tokens of the batch, in the batch's order.

        The value paired with token t is read off the hidden state of token t-1 of the same rollout: the state in
        which token t is chosen.
        """
        return self.head(self.hidden(batch))[batch.value_index]  # type: ignore[no-any-return]

    def hidden(self, batch: ModelInput) -> Tensor:
        """[R, hidden_size]: the trunk's last hidden state at each of the R positions that are read."""
        if batch.cached_states is None:
            states: Tensor = self.trunk(use_cache=False, **batch.trunk_arguments).last_hidden_state
        elif self.last_layers is None:
            return batch.cached_states
        else:
            states = self.last_layers.last_states(batch, batch.cached_states)
        states = states.flatten(0, 1)
        if len(states) == batch.computed_tokens:
            return states[batch.read_positions]
        return states if batch.read_in_last_layer is None else states[batch.read_in_last_layer]
