"""Transformers to train from scratch, for when there is no model to start from."""

from transformers import LlamaConfig

from critic_train.settings import Preset

SHAPES: dict[Preset, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 176},
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 704},
    "base": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
    },
}

LEARNING_RATES: dict[Preset, float] = {"tiny": 2e-3, "small": 1e-3, "base": 3e-4}
"""Peak learning rates that train each well from scratch (tiny and small: seen on the sample and known-value data)."""

SMALLEST_CONTEXT = 8192


def preset_config(preset: Preset, *, max_token_id: int, max_length: int) -> LlamaConfig:
    """The configuration of a Llama-shaped trunk for the data at hand.

    Args:
        preset: its size.
        max_token_id: the largest id in the data; the vocabulary is the next multiple of 64 above it.
        max_length: tokens of the longest rollout; the context is the next power of two, at least 8192.
    """
    return LlamaConfig(
        vocab_size=(max_token_id // 64 + 1) * 64,
        max_position_embeddings=max(SMALLEST_CONTEXT, 1 << (max_length - 1).bit_length()),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **SHAPES[preset],
    )
