"""Let the last layer compute only the positions that are read.

Keys and values of the last layer are needed everywhere, but its queries, its MLP and the final norm only at positions
whose hidden state becomes a value: not in prompts, not in observations. The layer is transformers' own; its forward is
replaced where it is built as Llama's is, and the self-check decides whether the replacement computes the same.

Shapes: S positions of the layout, Q <= S of them that the last layer computes.
"""

import sys
from functools import partial
from typing import Any

from torch import Tensor, nn

from critic_train.layers.attention import TREE_ATTENTION, TreeAttentionPlan, tree_attention

# The submodules of a decoder layer that is built as Llama's is, and of its attention; Qwen3 has the head norms.
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}


def skip_unread_positions(trunk: nn.Module) -> bool:
    """Replace the last layer's forward by one that computes only the positions that its plan asks for.

    Returns:
        Whether it is replaced: only a layer that is built as Llama's is.
    """
    layer = _last_layer(trunk)
    if layer is None or "forward" in vars(layer):
        return layer is not None
    attention = getattr(layer, "self_attn", None)
    supported = (
        _children(layer) == LAYER
        and isinstance(attention, nn.Module)
        and _children(attention) in (ATTENTION, ATTENTION | HEAD_NORMS)
        and hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb")
        and hasattr(attention, "head_dim")
    )
    if supported:
        layer.forward = partial(_forward, layer, layer.forward)
    return supported


def restore_last_layer(trunk: nn.Module) -> None:
    """Undo `skip_unread_positions`."""
    layer = _last_layer(trunk)
    if layer is not None:
        vars(layer).pop("forward", None)


def _last_layer(trunk: nn.Module) -> Any:
    layers = getattr(trunk, "layers", None)
    return layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _forward(layer: Any, full_forward: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """[1, S, hidden_size] -> [1, Q, hidden_size], or the layer's own forward where all positions are needed."""
    plan: TreeAttentionPlan | None = kwargs.get("tree_plan")
    if plan is None or plan.needed is None or layer.self_attn.config._attn_implementation != TREE_ATTENTION:
        return full_forward(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
    residual = hidden_states[:, plan.needed]
    attended = _attention(layer.self_attn, layer.input_layernorm(hidden_states), plan, kwargs["position_embeddings"])
    residual = residual + attended
    return residual + layer.mlp(layer.post_attention_layernorm(residual))  # type: ignore[no-any-return]


def _attention(attention: Any, states: Tensor, plan: TreeAttentionPlan, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The layer's attention, states [1, S, hidden_size] -> [1, Q, hidden_size]: all keys, the needed queries."""
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    # Mistral's layers read the window from the configuration.
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    cos, sin = rotary  # [1, S, head_dim]
    query = _split_heads(attention.q_proj(states[:, plan.needed]), attention, "q_norm")
    key = _split_heads(attention.k_proj(states), attention, "k_norm")
    value = _split_heads(attention.v_proj(states), attention, None)
    # apply_rotary_pos_emb rotates queries and keys at the same positions. Here they are at different ones, so each
    # is rotated by a call of its own, in which the other side has 0 heads.
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


def _split_heads(projected: Tensor, attention: Any, norm: str | None) -> Tensor:
    """[1, Q, heads * head_dim] -> [1, heads, Q, head_dim], through the norm of that name where there is one."""
    heads: Tensor = projected.unflatten(-1, (-1, attention.head_dim))
    if norm is not None and hasattr(attention, norm):
        heads = getattr(attention, norm)(heads)
    return heads.transpose(1, 2)
