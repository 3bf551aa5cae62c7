"""Train the head, or the head and the last layers, of a trunk whose rest is frozen.

What a frozen part computes never changes, so the states below the trained part can be kept and given back in place of
the tokens: a micro-batch then costs what is trained, and nothing of the rest.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from critic_train.errors import ModelError
from critic_train.model.inputs import ModelInput


def freeze(trunk: PreTrainedModel, layers: int) -> None:
    """Leave only the last layers, and the final norm above them, to be trained; with 0 layers nothing of the trunk.

    Raises:
        ModelError: the trunk has not so many layers, or keeps them where nobody knows.
    """
    trunk.requires_grad_(False)
    if layers == 0:
        return
    stack = layers_of(trunk)
    if layers >= len(stack):
        raise ModelError(
            f"--train last-{layers}: {trunk.config.model_type} has {len(stack)} layers",
            hint="--train full trains all of them",
        )
    stack[-layers:].requires_grad_(True)
    for name, child in trunk.named_children():
        if "norm" in name:
            child.requires_grad_(True)


def layers_of(trunk: PreTrainedModel) -> nn.ModuleList:
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


class UpperPart:
    """The last layers of a trunk as a trunk of their own, which takes hidden states in place of tokens.

    The layers and the norm are the trunk's: what is trained in one is trained in the other.

    Args:
        trunk: the whole.
        layers: how many of its last layers.
    """

    def __init__(self, trunk: PreTrainedModel, layers: int) -> None:
        self._first = layers_of(trunk)[-layers]
        self._whole = trunk
        # Not copy.copy: a sharded module's class makes a new module of its own when it is asked for one. The copy
        # shares the trunk's hooks, so that weights above the layers are gathered and their gradients summed as there.
        self._upper: Any = object.__new__(type(trunk))
        vars(self._upper).update(vars(trunk))
        self._upper._modules = dict(trunk._modules)
        self._upper.layers = nn.ModuleList(layers_of(trunk)[-layers:])

    def states_below(self, batch: ModelInput) -> Tensor:
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
def upper_part_agrees(trunk: PreTrainedModel, upper: UpperPart, batch: ModelInput, tolerance: float) -> bool:
    """Whether the upper part gives what the whole gives: some architectures do more to embeddings than pass them on.

    Those may also raise whatever their code raises.
    """
    whole = trunk(use_cache=False, **batch.trunk_arguments).last_hidden_state
    parted = upper.last_states(batch, upper.states_below(batch))
    return bool((parted - whole).abs().max() <= tolerance * whole.abs().max())
