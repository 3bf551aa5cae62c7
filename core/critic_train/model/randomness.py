"""What training mode draws at random in a trunk: found by behaviour, and set to 0.

A critic is trained without dropout, and without noise in the routers of experts: PPO's value loss compares values of
one state at two times, and a run must not depend on how rollouts are packed. Configurations call these by many names.
"""

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from critic_train.errors import ModelError

RANDOM_NAME = re.compile(r"dropout|pdrop|layerdrop|drop_path|drop_prob|jitter|noise")
"""In the name of a probability or an amplitude, in a configuration or a layer."""

PASSES = 3
SAME = 1e-5
"""Two passes without randomness may differ by so much, relative to the largest state: a GPU adds in any order."""


def is_random(name: str, value: Any) -> bool:
    """Whether a number of that name makes training mode draw at random."""
    return isinstance(value, float) and value > 0.0 and RANDOM_NAME.search(name) is not None


def silence(trunk: nn.Module, compute: Callable[[], Tensor]) -> list[str]:
    """Turn off what training mode draws at random, where two passes show that it draws.

    Args:
        trunk: the model; in evaluation mode nothing is done.
        compute: a pass over a rollout, its states, without gradients.

    Returns:
        The names of what was set to 0, as in "self_attn.attention_dropout".

    Raises:
        ModelError: it still draws.
    """
    if not trunk.training or _repeats(compute) or not _repeats_in_evaluation(trunk, compute):
        return []
    names = set()
    for path, module in trunk.named_modules():
        dropout = isinstance(module, nn.modules.dropout._DropoutNd)
        for name, value in list(vars(module).items()):
            if is_random(name, value) or (dropout and name == "p" and value > 0.0):
                setattr(module, name, 0.0)
                names.add(re.sub(r"(^|\.)\d+(?=\.)", "", f"{path}.{name}").lstrip("."))
    if _repeats(compute):
        return sorted(names)
    kind: Any = getattr(trunk, "config", None)
    raise ModelError(
        f"{kind.model_type} draws at random in training mode, in {_first_that_draws(trunk, compute)}, "
        "and no number that turns it off is known",
        hint="a critic is trained without dropout: set its probability to 0 in config.json",
    )


def _repeats(compute: Callable[[], Tensor]) -> bool:
    first = compute()
    return all(_same(compute(), first) for _ in range(PASSES - 1))


def _same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= SAME * other.abs().max())


def _repeats_in_evaluation(trunk: nn.Module, compute: Callable[[], Tensor]) -> bool:
    trunk.eval()
    try:
        return _repeats(compute)
    finally:
        trunk.train()


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
