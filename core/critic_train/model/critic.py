"""The critic: a transformers trunk without its vocabulary head, and a value head in float32.

Of a trunk that is frozen below its last layers (`--train head`, `--train last-K`), the hidden states that enter the
trained part never change. They can be computed once, cached, and given to the critic in place of tokens; a micro-batch
then costs only what is trained. `LastLayers` is the trained part as a trunk of its own.

Shapes: P, R and M as in `model_input`.
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from critic_train.errors import ModelError
from critic_train.model.head_inputs import running_mean
from critic_train.model.model_input import ModelInput
from critic_train.model.next_token_head import NextTokenHead
from critic_train.model_files.gather import full_tensor
from critic_train.model_files.multimodal import Multimodal
from critic_train.model_files.tensor_file import copy_rows
from critic_train.settings import HeadInputs

HEAD_OUTPUTS: dict[HeadInputs, int] = {"last": 1, "last+mean": 2}
"""Rows of a value head's weight: what it makes of the last state and, in the second, of the mean of states so far."""


class ValueHead(nn.Linear):
    """One linear unit for each of its inputs, held and computed in float32 whatever the trunk computes in.

    A new head has weight 0 and the mean return as its bias, so that an untrained critic predicts the mean:
    explained variance 0. (A head drawn from N(0, 0.02), the usual default, starts far below.)

    Args:
        hidden_size: of a state.
        inputs: what it reads; see `head_inputs`.
    """

    def __init__(self, hidden_size: int, inputs: HeadInputs = "last") -> None:
        super().__init__(hidden_size, HEAD_OUTPUTS[inputs], dtype=torch.float32)

    @property
    def inputs(self) -> HeadInputs:
        """What it reads."""
        return "last" if self.out_features == 1 else "last+mean"

    def reset_parameters(self) -> None:
        """Start at 0: no random numbers are drawn."""
        self.set_constant(0.0)

    def set_constant(self, mean_return: float) -> None:
        """Make the head predict `mean_return` everywhere."""
        with torch.no_grad():
            self.weight.zero_()
        self._set_bias(mean_return)

    def set_linear(self, weight: Tensor, bias: float) -> None:
        """Make the head predict `weight . inputs + bias`, also where it is sharded; weight [inputs * hidden_size]."""
        copy_rows(weight.view(self.out_features, -1), self.weight)
        self._set_bias(bias)

    def _set_bias(self, bias: float) -> None:
        copy_rows(torch.tensor([bias] + [0.0] * (self.out_features - 1)), self.bias)

    def constant(self) -> float | None:
        """What the head predicts everywhere, where its weight is 0; None where it is not. All ranks call it."""
        weight, bias = full_tensor(self.weight.detach()), full_tensor(self.bias.detach())
        return None if weight.any() else float(bias.sum())

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] of any float dtype -> [...] float32; with two inputs [..., 2], one score for each."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight, self.bias).squeeze(-1)


class Critic(nn.Module):
    """V(s) of every response token of a micro-batch.

    Args:
        trunk: a decoder without a language-model head, as `transformers.AutoModel` gives it.
        head: the value head.
        multimodal: what the directory had besides the trunk, which a checkpoint may have to hold as well.

    Attributes:
        next_token_head: trained beside the value head with --lm-loss-weight; no part of what is exported.
    """

    def __init__(self, trunk: PreTrainedModel, head: ValueHead, multimodal: Multimodal | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.next_token_head: NextTokenHead | None = None
        self.multimodal = multimodal
        # In a list, so that the layers it shares with the trunk are not registered twice.
        self._last_layers: list[LastLayers] = []

    @property
    def device(self) -> torch.device:
        """The device that computes; with `--offload all` the weights are in host memory between uses."""
        mesh = getattr(self.head.weight, "device_mesh", None)
        return self.head.weight.device if mesh is None else torch.device(mesh.device_type)

    @property
    def parts(self) -> list[nn.Module]:
        """What is sharded as a root of its own."""
        return [self.trunk, self.head, *([] if self.next_token_head is None else [self.next_token_head])]

    @property
    def num_parameters(self) -> int:
        """Of the critic as it is exported."""
        return sum(p.numel() for part in (self.trunk, self.head) for p in part.parameters())

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """Those of which a run may keep an average: what is trained of the critic as it is exported."""
        named = ((name, p) for name, p in self.named_parameters() if not name.startswith("next_token_head."))
        return {name: p for name, p in named if p.requires_grad}

    @property
    def last_layers(self) -> "LastLayers | None":
        """The layers that cached states enter; None where they enter the head."""
        return self._last_layers[0] if self._last_layers else None

    def use_cached_states(self, layers: int) -> None:
        """Take a micro-batch's cached states as the input of the last `layers` layers, or (0) of the head."""
        if layers:
            self._last_layers.append(LastLayers(self.trunk, layers))

    def states_to_cache(self, batch: ModelInput) -> Tensor:
        """The hidden states that `forward` takes as `cached_states`: [P, hidden_size], or [R, hidden_size]."""
        return self.hidden(batch) if self.last_layers is None else self.last_layers.input_states(batch)

    def forward(self, batch: ModelInput) -> Tensor:
        """float32 [M]: the value paired with each response token of the batch, in the order of the batch.

        The value paired with token t is read off the hidden state of token t-1 of the same rollout: the state in
        which token t is chosen.
        """
        return self.values(self.hidden(batch), batch)

    def values(self, states: Tensor, batch: ModelInput) -> Tensor:
        """float32 [M]: what the head makes of the states [R, hidden_size] that `hidden` gave for the batch."""
        scores: Tensor = self.head(states)[batch.value_index]
        if self.head.inputs == "last":
            return scores
        own, averaged = scores.unbind(1)
        all_ranks = batch.of_all_ranks
        if all_ranks is None:
            return own + running_mean(averaged, batch.token_index)
        averaged = all_ranks.sequence.gathered(averaged, all_ranks.here, len(all_ranks.token_index))
        return own + running_mean(averaged, all_ranks.token_index)[all_ranks.here]

    def hidden(self, batch: ModelInput) -> Tensor:
        """[R, hidden_size]: the trunk's last hidden state at each position that is read."""
        if batch.cached_states is None:
            states: Tensor = self.trunk(use_cache=False, **batch.trunk_arguments).last_hidden_state
        elif self.last_layers is None:
            return batch.cached_states
        else:
            states = self.last_layers.output_states(batch, batch.cached_states)
        states = states.flatten(0, 1)
        if len(states) == batch.computed_tokens:
            return states[batch.read_positions]
        # The last layer has computed fewer positions (see `last_layer`).
        return states if batch.read_in_last_layer is None else states[batch.read_in_last_layer]


def decoder_layers(trunk: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a trunk.

    Raises:
        ModelError: they are not in `layers`.
    """
    layers = getattr(trunk, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(
            f"{trunk.config.model_type} keeps its layers elsewhere than in `layers`: --train last-K cannot find them",
            hint="--train head, lora or full",
        )
    return layers


def freeze_all_but_last(trunk: PreTrainedModel, layers: int) -> None:
    """Freeze the trunk except for its last layers and the final norm above them; with 0 layers all of it.

    Raises:
        ModelError: the trunk has no more layers than that, or they are not in `layers`.
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


class LastLayers:
    """The last layers of a trunk as a trunk of their own, which takes hidden states in place of tokens.

    The layers and the norm are the trunk's own modules: what is trained in one is trained in the other.

    Args:
        trunk: the full trunk.
        layers: the number of its last layers.
    """

    def __init__(self, trunk: PreTrainedModel, layers: int) -> None:
        self._first = decoder_layers(trunk)[-layers]
        self._trunk = trunk
        # Not copy.copy: the class of a sharded module makes a new module when it is called. The copy shares the
        # trunk's hooks, so that weights above the layers are gathered and their gradients reduced as in the trunk.
        self._upper: Any = object.__new__(type(trunk))
        vars(self._upper).update(vars(trunk))
        self._upper._modules = dict(trunk._modules)
        self._upper.layers = nn.ModuleList(decoder_layers(trunk)[-layers:])

    def input_states(self, batch: ModelInput) -> Tensor:
        """[P, hidden_size]: the hidden states that enter the first of the layers, at every position."""
        captured: list[Tensor] = []
        sharded = type(self._trunk).__name__.startswith("FSDP")

        def capture(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            captured.append(arguments[0])
            if not sharded:  # FSDP2 expects every forward pass that was begun to end: there all layers are run
                raise _LayerReachedError

        hook = self._first.register_forward_pre_hook(capture)
        with contextlib.suppress(_LayerReachedError):
            try:
                self._trunk(use_cache=False, **batch.trunk_arguments)
            finally:
                hook.remove()
        if not captured:
            raise ModelError(f"{self._trunk.config.model_type} does not call its own layers")
        return captured[0].flatten(0, 1)

    def output_states(self, batch: ModelInput, states: Tensor) -> Tensor:
        """The trunk's `last_hidden_state`, from the states [P, hidden_size] that enter the layers."""
        arguments = dict(batch.trunk_arguments)
        shape = arguments.pop("input_ids").shape
        output = self._upper(use_cache=False, inputs_embeds=states.view(*shape, -1), **arguments)
        last_hidden_state: Tensor = output.last_hidden_state
        return last_hidden_state


class _LayerReachedError(Exception):
    """Ends a forward pass at the layer whose input is captured."""


@torch.no_grad()
def last_layers_agree(trunk: PreTrainedModel, last_layers: LastLayers, batch: ModelInput, tolerance: float) -> bool:
    """Whether the last layers give, from cached states, what the full trunk gives from tokens.

    Some architectures do more to embeddings than pass them to the first layer, and give something else.

    Args:
        trunk: the full trunk.
        last_layers: made from it.
        batch: a micro-batch to try.
        tolerance: the largest difference allowed, relative to the largest hidden state.

    Raises:
        TypeError, ValueError, RuntimeError: as the architecture's own code raises.
    """
    expected = trunk(use_cache=False, **batch.trunk_arguments).last_hidden_state
    states = last_layers.output_states(batch, last_layers.input_states(batch))
    return bool((states - expected).abs().max() <= tolerance * expected.abs().max())
