"""Small configurations of the architectures that people train, with the switches that their real ones have.

`TEXT` are decoders of text, `MULTIMODAL` models around one. Each has two layers of width 64. docs/models.md is a table
about all of them.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from support import VOCABULARY
from transformers import PreTrainedConfig, PreTrainedModel

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
    "original_max_position_embeddings": 2048,
}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    **EXPERTS,
}
WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GATED_DELTA = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25},
}
GATED_DELTA_MROPE = {
    **GATED_DELTA,
    "rope_parameters": {
        **ROPE,
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_d_conv": 4}

TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2, 3": ("llama", {"rope_parameters": LLAMA3}),
    "Llama 4 (text)": (
        "llama4_text",
        {"intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1, "attention_chunk_size": 32},
    ),
    "Qwen2, Qwen2.5": ("qwen2", {}),
    "Qwen2-MoE": ("qwen2_moe", {"num_experts": 4, "shared_expert_intermediate_size": 32, **EXPERTS}),
    "Qwen3": ("qwen3", {}),
    "Qwen3 with YaRN": ("qwen3", {"rope_parameters": YARN}),
    "Qwen3-MoE": ("qwen3_moe", {"num_experts": 4, "decoder_sparse_step": 1, **EXPERTS}),
    "Qwen3-Next": (
        "qwen3_next",
        {"num_experts": 4, "shared_expert_intermediate_size": 32, **EXPERTS, **GATED_DELTA},
    ),
    "Qwen3.5 (text)": ("qwen3_5_text", GATED_DELTA_MROPE),
    "Qwen3.5-MoE (text)": (
        "qwen3_5_moe_text",
        {"num_experts": 4, "shared_expert_intermediate_size": 32, **EXPERTS, **GATED_DELTA_MROPE},
    ),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", {"query_pre_attn_scalar": 16, **WINDOWED}),
    "Gemma 3 (text)": ("gemma3_text", {"query_pre_attn_scalar": 16, **WINDOWED}),
    "Gemma 4 (text)": (
        "gemma4_text",
        {"hidden_size_per_layer_input": 0, "global_head_dim": 32, "num_global_key_value_heads": 1, **WINDOWED},
    ),
    "Mistral": ("mistral", {"sliding_window": 8}),
    "Ministral": ("ministral", WINDOWED),
    "Ministral 3 (text)": ("ministral3", {}),
    "Mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Phi-3, Phi-4": ("phi3", {}),
    "Phi-3.5, Phi-4-mini (longrope)": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 2048}),
    "Phi-3.5-MoE": ("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "input_jitter_noise": 0.01}),
    "GPT-OSS": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, **WINDOWED}),
    "DeepSeek-V2": ("deepseek_v2", LATENT),
    "DeepSeek-V3, Kimi-K2, Moonlight": ("deepseek_v3", LATENT),
    "GLM-4": ("glm4", {}),
    "GLM-4.5": ("glm4_moe", {k: v for k, v in LATENT.items() if "head_dim" not in k and "lora" not in k}),
    "GLM-4.7-Flash": ("glm4_moe_lite", LATENT),
    "MiniMax-M1": (
        "minimax",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "block_size": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", WINDOWED),
    "OLMoE": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "Granite": ("granite", {}),
    "Granite 4 hybrid": (
        "granitemoehybrid",
        {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 96,
            "mamba_expand": 2,
            "mamba_chunk_size": 8,
            **MAMBA,
        },
    ),
    "Bamba": ("bamba", {"attn_layer_indices": [1], "mamba_expand": 2, "mamba_chunk_size": 8, **MAMBA}),
    "Falcon-H1": (
        "falcon_h1",
        {"mamba_d_ssm": 128, "mamba_expand": 2, "mamba_chunk_size": 8, **MAMBA},
    ),
    "LFM2": ("lfm2", {"conv_L_cache": 3, "layer_types": ["conv", "full_attention"]}),
    "Command-R7B": ("cohere2", WINDOWED),
    "EXAONE 4": ("exaone4", WINDOWED),
    "SmolLM3": ("smollm3", {}),
    "Seed-OSS": ("seed_oss", {"residual_dropout": 0.1, "attention_dropout": 0.1}),
    "ERNIE 4.5": ("ernie4_5", {}),
    "Hunyuan": ("hunyuan_v1_dense", {}),
    "StableLM": ("stablelm", {}),
    "StarCoder2": ("starcoder2", {"residual_dropout": 0.1}),
    "GPT-NeoX, Pythia": ("gpt_neox", {}),
    "GPT-2": ("gpt2", {"n_inner": 96, "n_positions": 512}),
    "OPT": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "Mamba-2": ("mamba2", {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 8}),
}
"""Name -> (model_type, what differs from COMMON)."""
ROWS_ALONE = {"StableLM"}
"""Those whose attention no layout of a tree reaches (docs/models.md)."""

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
PLACEHOLDER_IDS = (120, 121)
QWEN_IDS = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}

MULTIMODAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen2.5-VL": (
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
        {
            "text_config": {"model_type": "qwen2_5_vl_text", "rope_parameters": MROPE},
            "vision_config": {**QWEN_VISION, "fullatt_block_indexes": [0]},
            **QWEN_IDS,
        },
    ),
    "Qwen3-VL": (
        "Qwen3VLForConditionalGeneration",
        "qwen3_vl",
        {
            "text_config": {"model_type": "qwen3_vl_text", "rope_parameters": {**MROPE, "mrope_interleaved": True}},
            "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            **QWEN_IDS,
        },
    ),
    "Qwen3.5": (
        "Qwen3_5ForConditionalGeneration",
        "qwen3_5",
        {
            "text_config": {"model_type": "qwen3_5_text", **GATED_DELTA_MROPE},
            "vision_config": {**QWEN_VISION, "num_position_embeddings": 16},
            **QWEN_IDS,
        },
    ),
    "Qwen3.5-MoE": (
        "Qwen3_5MoeForConditionalGeneration",
        "qwen3_5_moe",
        {
            "text_config": {
                "model_type": "qwen3_5_moe_text",
                "num_experts": 4,
                "shared_expert_intermediate_size": 32,
                **EXPERTS,
                **GATED_DELTA_MROPE,
            },
            "vision_config": {**QWEN_VISION, "num_position_embeddings": 16},
            **QWEN_IDS,
        },
    ),
    "Gemma 3": (
        "Gemma3ForConditionalGeneration",
        "gemma3",
        {
            "text_config": {"model_type": "gemma3_text", "query_pre_attn_scalar": 16, **WINDOWED},
            "vision_config": {"model_type": "siglip_vision_model", **VISION},
            "mm_tokens_per_image": 4,
            "image_token_index": 120,
        },
    ),
    "Mistral-Small 3": (
        "Mistral3ForConditionalGeneration",
        "mistral3",
        {
            "text_config": {"model_type": "mistral", "sliding_window": None},
            "vision_config": {"model_type": "pixtral", **VISION},
            "image_token_index": 120,
        },
    ),
    "Llama 4": (
        "Llama4ForConditionalGeneration",
        "llama4",
        {
            "text_config": {
                "model_type": "llama4_text",
                "intermediate_size_mlp": 96,
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "attention_chunk_size": 32,
            },
            "vision_config": {**VISION, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64},
            "image_token_index": 120,
        },
    ),
    "InternVL 3": (
        "InternVLForConditionalGeneration",
        "internvl",
        {
            "text_config": {"model_type": "qwen2"},
            "vision_config": {**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
            "image_token_id": 120,
        },
    ),
    "LLaVA-OneVision": (
        "LlavaOnevisionForConditionalGeneration",
        "llava_onevision",
        {
            "text_config": {"model_type": "qwen2"},
            "vision_config": {"model_type": "siglip_vision_model", **VISION},
            "image_token_index": 120,
            "video_token_index": 121,
        },
    ),
    "SmolVLM": (
        "SmolVLMForConditionalGeneration",
        "smolvlm",
        {
            "text_config": {"model_type": "llama"},
            "vision_config": {**VISION, "patch_size": 14},
            "image_token_id": 120,
            "scale_factor": 2,
        },
    ),
}
"""Name -> (class, model_type, configuration without what COMMON gives its text trunk)."""


def text_config(name: str, **more: object) -> PreTrainedConfig:
    """The configuration of an entry of TEXT, with further changes."""
    model_type, changes = TEXT[name]
    return transformers.AutoConfig.for_model(model_type, **{**COMMON, **changes, **more})


def multimodal_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A model of an entry of MULTIMODAL with random weights in bfloat16, as published ones have."""
    architecture, model_type, raw = MULTIMODAL[name]
    raw = json.loads(json.dumps(raw))
    raw["text_config"] = {**COMMON, **raw["text_config"]}
    config = transformers.AutoConfig.for_model(model_type, tie_word_embeddings=False, **raw)
    torch.manual_seed(seed)
    return getattr(transformers, architecture)(config).to(torch.bfloat16)


def save_multimodal(name: str, path: Path) -> Path:
    """Write an entry of MULTIMODAL as it is published; returns the directory."""
    multimodal_model(name).save_pretrained(path)
    return path
