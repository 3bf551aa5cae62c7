"""Let the last layer compute only the positions that are read.

Keys and values of the last layer are needed everywhere, but its queries, its MLP and the final norm only at positions
whose hidden state becomes a value: not in prompts, not in observations. The layer is transformers' own, whatever it is
made of. It runs twice: on all positions as far as its attention, for keys and values; and on the positions that are
needed, with those keys and values. The self-check decides whether that computes the same.

Shapes: S positions of the layout, Q <= S of them that the last layer computes.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from critic_train.layers.attention import TREE_ATTENTION, KeysAndValues, TreeAttentionPlan

# Linear parts of an attention layer whose product is used for the queries alone, or for keys and values alone. They are
# computed once; a layer that names its parts otherwise is right as well, and a little slower.
FOR_QUERIES = ("q_proj", "q_b_proj")
FOR_KEYS_AND_VALUES = ("k_proj", "v_proj", "kv_b_proj")


def skip_unread_positions(trunk: PreTrainedModel) -> bool:
    """Have the last layer compute only the positions that its plan asks for.

    Returns:
        Whether the trunk has a list of layers, so that there is a last one.
    """
    layer = _last_layer(trunk)
    if layer is not None and "forward" not in vars(layer):
        layer.forward = partial(_forward, layer, layer.forward)
    return layer is not None


def restore_last_layer(trunk: PreTrainedModel) -> None:
    """Undo `skip_unread_positions`."""
    layer = _last_layer(trunk)
    if layer is not None:
        vars(layer).pop("forward", None)


def _last_layer(trunk: PreTrainedModel) -> Any:
    count = getattr(trunk.config, "num_hidden_layers", None)
    lists = (module for module in trunk.modules() if isinstance(module, nn.ModuleList))
    return next((layers[-1] for layers in lists if len(layers) and len(layers) == count), None)


def _forward(layer: nn.Module, full_forward: Any, *args: Any, **kwargs: Any) -> Any:
    """The layer's own output, [1, Q, hidden_size] in place of [1, S, hidden_size] where not all are needed."""
    plan: TreeAttentionPlan | None = kwargs.get("tree_plan")
    if plan is None or plan.needed is None or TREE_ATTENTION not in _implementations(layer):
        return full_forward(*args, **kwargs)
    narrow = partial(_at_needed, needed=plan.needed, positions=len(plan.depth))
    narrow_args, narrow_kwargs = tuple(map(narrow, args)), {name: narrow(given) for name, given in kwargs.items()}
    queries: list[Tensor] = []
    with _not_checkpointed(layer):
        # In this run the products for queries are computed at the needed positions only.
        with _replaced(layer, FOR_QUERIES, lambda own, states: _computed_aside(own, states, narrow, queries)):
            plan.keys_and_values = _keys_and_values(full_forward, plan, args, kwargs)
        if plan.keys_and_values is None:  # it does not call attention: it is computed whole, and from now on once
            vars(layer).pop("forward", None)
            return full_forward(*args, **kwargs)
        try:
            with (
                _replaced(layer, FOR_QUERIES, lambda own, states: queries.pop(0)),
                _replaced(layer, FOR_KEYS_AND_VALUES, _zeros),
            ):
                output = full_forward(*narrow_args, **narrow_kwargs)
        finally:
            plan.keys_and_values = None
    plan.narrowed = True
    return output


@contextlib.contextmanager
def _not_checkpointed(layer: Any) -> Iterator[None]:
    """Inside, the layer keeps its activations: computed again, it would not find what the plan holds meanwhile."""
    checkpointing = getattr(layer, "gradient_checkpointing", False)
    if checkpointing:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        if checkpointing:
            layer.gradient_checkpointing = True


def _implementations(layer: nn.Module) -> set[str]:
    configs = (getattr(module, "config", None) for module in layer.modules())
    return {getattr(config, "_attn_implementation", "") for config in configs}


def _keys_and_values(
    full_forward: Any, plan: TreeAttentionPlan, args: Any, kwargs: Any
) -> tuple[Tensor, Tensor] | None:
    """What the layer calls attention with at all positions; None where it does not call it."""
    plan.capture = True
    try:
        full_forward(*args, **kwargs)
    except KeysAndValues as captured:
        return captured.key, captured.value
    finally:
        plan.capture = False
    return None


@contextlib.contextmanager
def _replaced(layer: nn.Module, names: tuple[str, ...], compute: Callable[[Any, Tensor], Tensor]) -> Iterator[None]:
    """Inside, the linear parts of those names give what `compute` makes of (part, states)."""
    parts = [module for path, module in layer.named_modules() if path.rpartition(".")[2] in names]
    parts = [module for module in parts if hasattr(module, "out_features") and "forward" not in vars(module)]
    for module in parts:
        module.forward = partial(compute, module)
    try:
        yield
    finally:
        for module in parts:
            vars(module).pop("forward", None)


def _computed_aside(part: Any, states: Tensor, narrow: Callable[[Tensor], Tensor], products: list[Tensor]) -> Tensor:
    products.append(type(part).forward(part, narrow(states)))
    return _zeros(part, states)


def _zeros(part: Any, states: Tensor) -> Tensor:
    return states.new_zeros(*states.shape[:-1], int(part.out_features))


def _at_needed(argument: Any, *, needed: Tensor, positions: int) -> Any:
    """An argument of the layer at the needed positions: the last but one dimension of a tensor, or the last."""
    narrow = partial(_at_needed, needed=needed, positions=positions)
    if isinstance(argument, Tensor):
        for dim in (-2, -1):
            if argument.dim() >= -dim and argument.shape[dim] == positions:
                return argument.index_select(dim, needed)
        return argument
    if isinstance(argument, dict):
        return {name: narrow(part) for name, part in argument.items()}
    if type(argument) in (tuple, list):
        return type(argument)(map(narrow, argument))
    return argument
