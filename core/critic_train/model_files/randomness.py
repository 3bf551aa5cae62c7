"""What training mode draws at random in a trunk: found by behaviour, and turned off.

A critic is trained without dropout, and without noise in the routers of experts: PPO's value loss compares values of
one state at two times, and a run must not depend on how rollouts are packed. Configurations call these by many names.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from critic_train.errors import ModelError

DROPOUT_NAME = re.compile(r"dropout|pdrop|layerdrop|drop_path|drop_prob")
"""In the name of a probability that evaluation mode does not read. Amplitudes of noise are left as they are: PhiMoE's
evaluation reads `router_jitter_noise`."""

PASSES = 3
SAME = 1e-5
"""Two passes without randomness may differ by so much, relative to the largest state: a GPU adds in any order."""


def is_dropout(name: str, value: Any) -> bool:
    """Whether a number of that name, in a configuration or a module, is the probability of a dropout above 0."""
    return isinstance(value, float) and value > 0.0 and DROPOUT_NAME.search(name) is not None


def silence(trunk: nn.Module, compute: Callable[[], Tensor]) -> list[str]:
    """Have training mode compute what evaluation mode does, where passes show that it does not.

    Args:
        trunk: the model; in evaluation mode nothing is done.
        compute: a pass over a rollout, its states, without gradients.

    Returns:
        What was done, as in "self_attn.attention_dropout is 0".

    Raises:
        ModelError: training mode still draws at random.
    """
    if not trunk.training:
        return []
    trunk.eval()
    expected, again = compute(), compute()
    trunk.train()
    if not _same(again, expected) or _agrees(compute, expected):
        return []
    numbers = _dropouts_of(trunk)
    for module, name in numbers:
        setattr(module, name, 0.0)
    actions = [f"{name} is 0" for name in sorted({_name_of(trunk, module, name) for module, name in numbers})]
    if _agrees(compute, expected):
        return actions
    if classes := _kept_in_evaluation(trunk, compute, expected):
        return actions + [f"{name} stays in evaluation mode" for name in classes]
    kind: Any = getattr(trunk, "config", None)
    raise ModelError(
        f"{kind.model_type} draws at random in training mode, in {_first_that_draws(trunk, compute)}, "
        "and nothing that turns it off is known",
        hint="a critic is trained without dropout: set its probability to 0 in config.json",
    )


def _agrees(compute: Callable[[], Tensor], expected: Tensor) -> bool:
    return all(_same(compute(), expected) for _ in range(PASSES))


def _same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= SAME * other.abs().max())


def _dropouts_of(trunk: nn.Module) -> list[tuple[nn.Module, str]]:
    """(module, attribute) of every probability of a dropout above 0."""
    return [
        (module, name)
        for module in trunk.modules()
        for name, value in vars(module).items()
        if is_dropout(name, value) or (name == "p" and is_dropout(type(module).__name__.lower(), value))
    ]


def _name_of(trunk: nn.Module, module: nn.Module, name: str) -> str:
    path = next(path for path, other in trunk.named_modules() if other is module)
    return re.sub(r"(^|\.)(\d+|layers|h)(?=\.)", "", f"{path}.{name}").lstrip(".")


def _kept_in_evaluation(trunk: nn.Module, compute: Callable[[], Tensor], expected: Tensor) -> list[str]:
    """Keep modules in evaluation mode for good, as few classes as are enough; the names of those, or none.

    Decoder layers are left in training mode: it is there that they read whether to checkpoint their activations.
    """
    inner = [m for m in trunk.modules() if m is not trunk and not isinstance(m, GradientCheckpointingLayer)]
    for module in inner:
        module.training = False
    if not _agrees(compute, expected):
        trunk.train()
        return []
    for kind in sorted({type(module).__name__ for module in inner}):
        alike = [module for module in inner if type(module).__name__ == kind]
        for module in alike:
            module.training = True
        if not _agrees(compute, expected):
            for module in alike:
                module.training = False
    unread = [module for module in inner if not module.training]
    for module in unread:
        module.train = partial(_stay_in_evaluation, module)  # type: ignore[method-assign]
    return sorted({type(module).__name__ for module in unread})


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    for child in module.children():
        child.train(mode)
    module.training = False
    return module


def _first_that_draws(trunk: nn.Module, compute: Callable[[], Tensor]) -> str:
    """The first module, in the order of their ends, whose output differs in two passes."""
    passes: list[list[tuple[str, Tensor]]] = []
    hooks = []
    for path, module in trunk.named_modules():
        hooks.append(module.register_forward_hook(lambda _, __, output, path=path: passes[-1].append((path, output))))
    try:
        for _ in range(2):
            passes.append([])
            compute()
    finally:
        for hook in hooks:
            hook.remove()
    for (path, one), (_, other) in zip(*passes, strict=False):
        if (
            isinstance(one, Tensor)
            and isinstance(other, Tensor)
            and not (one.shape == other.shape and _same(one, other))
        ):
            return f"{path or 'the model'} ({type(trunk.get_submodule(path)).__name__})"
    return "a place that its modules do not show"
