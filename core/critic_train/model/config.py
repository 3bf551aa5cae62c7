"""What a model directory may ask for, and may not: it can come from anywhere.

Weights and configurations are data here. Nothing in them names code to run, a kernel to fetch or a file to copy from
elsewhere, and what config.json claims is held against the weights before anything is allocated for it.

Transformers to train from scratch, for when there is no model to start from.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, LlamaConfig, PreTrainedConfig

from critic_train.errors import ModelError, first_line
from critic_train.settings import Preset

OF_ANOTHER_MODEL = "the directory is incomplete, or its config.json belongs to another model"
SIZE_NAME = re.compile(r"(?!max_).*(size|dim|width|rank|heads|experts|n_embd|n_head|n_inner|channels)")
LAYERS_NAME = re.compile(r"num_(hidden_|decoder_|encoder_)?layers|n_layers?")
MISSING_SHARE, MISSING_FEW = 2, 2**20
"""Incomplete weights are told tensor by tensor when they are loaded: up to half of them may be missing."""
MOST_COPIED_BYTES = 2**28


def clear_implementations(config: PreTrainedConfig) -> PreTrainedConfig:
    """Forget the implementations that a config.json names: transformers would fetch such a kernel and run it."""
    for name in [name for name in vars(config) if name.endswith(("_implementation", "_implementation_internal"))]:
        setattr(config, name, None)
    return config


def refuse_unsafe_config(path: Path, raw: Mapping[str, Any], config: PreTrainedConfig) -> None:
    """Raise where a config.json asks for what is never done, or lacks what must be there."""
    if raw.get("quantization_config"):
        raise ModelError(
            f"{path}/config.json: its weights are quantized",
            hint="a critic is trained from whole weights; save them so",
        )
    for name in ("vocab_size", "hidden_size"):
        found = getattr(config, name, None)
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise ModelError(f"{path}/config.json: found {name} {found!r}, expected a whole number above 0")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and (not isinstance(positions, int) or positions < 2):
        raise ModelError(f"{path}/config.json: found max_position_embeddings {positions!r}, expected a whole number")


def check_config_against_weights(path: Path, config: PreTrainedConfig, shapes: Mapping[str, list[int]]) -> None:
    """Raise where the configuration describes a larger model than the weights are. Nothing is allocated to find out.

    Args:
        path: the directory, for the message.
        config: its configuration.
        shapes: of every tensor in its weights, from the headers alone.
    """
    elements = sum(math.prod(shape) for shape in shapes.values())
    for name, value in sorted(config.to_dict().items()):
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if SIZE_NAME.fullmatch(name) and value > elements:
            raise _too_large(path, f"{name} {value:,}", f"{elements:,} numbers")
        if LAYERS_NAME.fullmatch(name) and value > MISSING_SHARE * len(shapes):
            raise _too_large(path, f"{name} {value:,}", f"{len(shapes):,} tensors")
    try:
        with torch.device("meta"):
            trunk = AutoModel.from_config(config)
    except Exception as error:  # transformers raises many kinds for a configuration that makes no model
        first = first_line(error)
        raise ModelError(f"{path}/config.json makes no model: {first}", hint=OF_ANOTHER_MODEL) from error
    described = sum(parameter.numel() for parameter in trunk.parameters())
    if described > MISSING_SHARE * elements + MISSING_FEW:
        raise _too_large(path, f"a model of {described:,} numbers", f"{elements:,}")


def may_be_copied(file: Path) -> bool:
    """Whether a file of a model directory is one of its own, to be copied into a checkpoint that is handed on.

    A link may lead within the directory, or to `blobs` beside `snapshots` as in the hub's cache; not to other files of
    this machine.
    """
    if not file.is_file() or file.stat().st_size > MOST_COPIED_BYTES:
        return False
    real, folder = file.resolve(), file.parent.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    return real.parent in (folder, blobs)


def _too_large(path: Path, claimed: str, found: str) -> ModelError:
    return ModelError(f"{path}/config.json describes {claimed}, its weights hold {found}", hint=OF_ANOTHER_MODEL)


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
