"""The models whose steps are measured, of any width: heads of 64, random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import GptOssConfig, GraniteMoeHybridConfig, LlamaConfig, PreTrainedConfig, Qwen3_5TextConfig

from bench.drawing import VOCABULARY

LAYERS = 4


@dataclass(frozen=True, kw_only=True)
class Model:
    """A shape of model.

    Attributes:
        config: hidden size -> its configuration.
        goals: the ratio that is asked for on each of `step.SHAPES`; None where none is.
        classifier: transformers has a token classifier for it: what a user would write without this program.
    """

    config: Callable[[int], PreTrainedConfig]
    goals: tuple[float | None, ...]
    classifier: bool


def shared(hidden: int) -> dict[str, Any]:
    """What all have in common."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "intermediate_size": int(hidden * 2.75) // 64 * 64,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
    }


def llama(hidden: int) -> LlamaConfig:
    """Plain attention."""
    return LlamaConfig(**shared(hidden))


def qwen3_5(hidden: int) -> Qwen3_5TextConfig:
    """Three layers of the gated delta rule to one of attention."""
    return Qwen3_5TextConfig(
        **shared(hidden),
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=hidden // 8,
        linear_value_head_dim=hidden // 8,
        layer_types=["linear_attention"] * (LAYERS - 1) + ["full_attention"],
        tie_word_embeddings=False,
    )


def granite_4_h(hidden: int) -> GraniteMoeHybridConfig:
    """Three layers of Mamba-2 to one of attention, without experts."""
    return GraniteMoeHybridConfig(
        **shared(hidden),
        shared_intermediate_size=int(hidden * 2.75) // 64 * 64,
        num_local_experts=0,
        num_experts_per_tok=0,
        layer_types=["mamba"] * (LAYERS - 1) + ["attention"],
        mamba_expand=2,
        mamba_n_heads=hidden // 32,
        mamba_d_head=64,
        mamba_d_state=128,
        mamba_n_groups=1,
        position_embedding_type="nope",
    )


def gpt_oss(hidden: int) -> GptOssConfig:
    """Attention sinks, a window in every other layer, and experts."""
    return GptOssConfig(
        **(shared(hidden) | {"intermediate_size": hidden}),
        head_dim=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
    )


MODELS = {
    "Llama": Model(config=llama, goals=(2.3, 2.9, 3.7, 1.7), classifier=True),
    "Qwen3.5": Model(config=qwen3_5, goals=(2.6, 3.4, 3.4, 1.5), classifier=False),
    "Mamba-2 (Granite-4-h)": Model(config=granite_4_h, goals=(2.2, 3.0, 2.8, None), classifier=False),
    "GPT-OSS": Model(config=gpt_oss, goals=(2.2, 3.0, 2.8, None), classifier=False),
}
