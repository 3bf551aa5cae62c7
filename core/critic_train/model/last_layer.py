"""Have the last layer compute only what the loss reads.

The last layer's keys and values are needed everywhere, but its queries, its MLP and the final norm only at positions
that predict a response token: not in the prompt, not in observations. The layer is transformers' own; only its forward
is replaced, for layers built like Llama's, and the self-check decides whether the replacement is right.
"""

import sys
from functools import partial
from typing import Any

from torch import Tensor, nn

from critic_train.model.attention import TREE_ATTENTION, TreeAttentionPlan, tree_attention

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}


def skip_unread_positions(trunk: nn.Module) -> bool:
    """Replace the last layer's forward where it is built like Llama's; returns whether it was."""
    layer = _last_layer(trunk)
    if layer is None or "forward" in vars(layer):
        return layer is not None
    attention = getattr(layer, "self_attn", None)
    known = (
        {name for name, _ in layer.named_children()} == LAYER
        and isinstance(attention, nn.Module)
        and {name for name, _ in attention.named_children()} in (ATTENTION, ATTENTION | HEAD_NORMS)
        and hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb")
        and hasattr(attention, "head_dim")
    )
    if known:
        layer.forward = partial(_forward, layer, layer.forward)
    return known


def restore_last_layer(trunk: nn.Module) -> None:
    """Give the last layer its own forward back."""
    layer = _last_layer(trunk)
    if layer is not None:
        vars(layer).pop("forward", None)


def _last_layer(trunk: nn.Module) -> Any:
    layers = getattr(trunk, "layers", None)
    return layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None


def _forward(layer: Any, whole: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """[1, S, hidden_size] -> [1, Q, hidden_size] where the plan says that Q < S positions are enough."""
    plan: TreeAttentionPlan | None = kwargs.get("tree_plan")
    if plan is None or plan.needed is None or layer.self_attn.config._attn_implementation != TREE_ATTENTION:
        return whole(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
    narrow = hidden_states[:, plan.needed]
    attended = _attention(layer.self_attn, layer.input_layernorm(hidden_states), plan, kwargs["position_embeddings"])
    narrow = narrow + attended
    return narrow + layer.mlp(layer.post_attention_layernorm(narrow))  # type: ignore[no-any-return]


def _attention(attention: Any, states: Tensor, plan: TreeAttentionPlan, angles: tuple[Tensor, Tensor]) -> Tensor:
    """The layer's attention with queries at the positions that are kept."""
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    # Mistral's layers leave the window to the configuration.
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    cos, sin = angles
    asking = states[:, plan.needed]
    query = _heads(attention.q_proj(asking), attention, "q_norm")
    key = _heads(attention.k_proj(states), attention, "k_norm")
    value = _heads(attention.v_proj(states), attention, "")
    # The model's own rotation turns queries and keys together; of each call one side has no heads.
    query, _ = rotate(query, query[:, :0], cos[:, plan.needed], sin[:, plan.needed])
    _, key = rotate(key[:, :0], key, cos, sin)
    output, _ = tree_attention(
        attention,
        query,
        key,
        value,
        None,
        tree_plan=plan,
        scaling=attention.scaling,
        sliding_window=window,
    )
    return attention.o_proj(output.flatten(2))  # type: ignore[no-any-return]


def _heads(projected: Tensor, attention: Any, norm: str) -> Tensor:
    """[1, Q, heads * head_dim] -> [1, heads, Q, head_dim]."""
    split = projected.unflatten(-1, (-1, attention.head_dim))
    return getattr(attention, norm, _unchanged)(split).transpose(1, 2) if norm else split.transpose(1, 2)


def _unchanged(states: Tensor) -> Tensor:
    return states
