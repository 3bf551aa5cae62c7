"""Configurations of trunks: config.json of a model directory, checked; and presets to train from scratch.

A model directory can come from anywhere. Weights and configurations are data here: nothing in them names code that is
run, a kernel that is fetched, or a file elsewhere that is copied; and what config.json claims is compared with the
weights before anything is allocated for it.
"""

import math
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, LlamaConfig, PreTrainedConfig, PreTrainedModel

from critic_train.errors import ModelError, first_line
from critic_train.jsonio import read_json_object
from critic_train.model_files.randomness import is_dropout
from critic_train.model_files.tensor_file import FLOATING, StoredTensor
from critic_train.settings import Preset

CLASSIFIER_DROPOUTS = ("classifier_dropout", "hidden_dropout", "summary_dropout_prob")
"""These are set even where a configuration lacks them: transformers' classification classes have defaults above 0."""

QUANTIZED = "a critic is trained from weights that are not quantized; save the model in bfloat16 without quantization"
OF_ANOTHER_MODEL = "the directory is incomplete, or its config.json belongs to another model"
SIZE_NAME = re.compile(r"(?!max_).*(size|dim|width|rank|heads|experts|n_embd|n_head|n_inner|channels)")
LAYERS_NAME = re.compile(r"num_(hidden_|decoder_|encoder_)?layers|n_layers?|depth")
MISSING_SHARE, MISSING_FEW = 2, 2**20
"""A configuration may describe so many times the weights that are there, and so many numbers more: tensors that are
missing are reported by name when the weights are loaded."""
MOST_COPIED_BYTES = 2**28


def prepare_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Set what a critic needs: one label, no dropout, no tied embeddings. Changes and returns `config`."""
    config.num_labels = 1
    dropouts = [name for name, value in vars(config).items() if is_dropout(name, value)]
    for name in (*CLASSIFIER_DROPOUTS, *dropouts):
        setattr(config, name, 0.0)
    config.tie_word_embeddings = False
    config.use_cache = False
    return config


def read_raw_config(path: Path) -> dict[str, Any]:
    """The JSON object in a model directory's config.json.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    file = path / "config.json"
    try:
        return read_json_object(file)
    except FileNotFoundError:
        raise ModelError(
            f"{path} has no config.json",
            hint="--model takes a run, a checkpoint or a Hugging Face directory with safetensors weights",
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {first_line(error)}") from error


def parse_config(path: Path, raw: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a model directory that a critic can be made of; of a multimodal one, with all its parts.

    Args:
        path: the directory.
        raw: from `read_raw_config`.

    Raises:
        ModelError: transformers does not know it, it is no decoder of text, it asks for what is never done (code of
            its own, quantized weights), or its sizes are no numbers.
    """
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        text = text_config_of(config)
        for part in (config, text):
            clear_implementations(part)
    except Exception as error:  # transformers raises many kinds for a configuration it does not know
        reason = "it asks for code of its own, which is never run" if raw.get("auto_map") else first_line(error)
        raise ModelError(f"{path}/config.json (model_type {raw.get('model_type')!r}): {reason}") from error
    if config.is_encoder_decoder:
        raise ModelError(
            f"{path}: model_type {config.model_type!r} is an encoder and a decoder",
            hint="a critic reads token ids from left to right: take a decoder",
        )
    parts = (raw, raw.get("text_config"))
    if any(isinstance(part, dict) and part.get("quantization_config") for part in parts):
        raise ModelError(
            f"{path}/config.json: its weights are quantized",
            hint=QUANTIZED,
        )
    for name in ("vocab_size", "hidden_size"):
        size = getattr(text, name, None)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ModelError(f"{path}/config.json: found {name} {size!r}, expected a whole number above 0")
    for part, read in ((raw, config), (raw.get("text_config"), text)):
        _require_rotary_base(path, part, read)
    if getattr(text, "word_embed_proj_dim", text.hidden_size) != text.hidden_size:
        raise ModelError(f"{path}: its hidden states are not hidden_size wide (word_embed_proj_dim)")
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and (not isinstance(positions, int) or positions < 2):
        raise ModelError(f"{path}/config.json: found max_position_embeddings {positions!r}, expected a whole number")
    return config


def _require_rotary_base(path: Path, raw: Any, read: PreTrainedConfig) -> None:
    """Refuse a rotary base that `rope_scaling` has put out of force (findings/rope-scaling-loses-base.sh).

    transformers 5 takes a `rope_scaling` that was added to config.json, as model cards say, for all of the
    `rope_parameters` there; a base that only these have gives way to 10000.
    """
    if not isinstance(raw, dict) or not isinstance(raw.get("rope_scaling"), dict):
        return
    stated, in_force = (
        _rotary_bases(rope) for rope in (raw.get("rope_parameters"), getattr(read, "rope_parameters", {}))
    )
    if stated and stated != in_force:
        bases = ", ".join(f"{base:g}" for base in sorted(stated))
        raise ModelError(
            f"{path}/config.json: rope_scaling beside rope_parameters has transformers pass over rope_theta {bases}",
            hint="put what rope_scaling says into rope_parameters, beside rope_theta, and remove rope_scaling",
        )


def _rotary_bases(rope: Any) -> set[float]:
    """Every `rope_theta` of `rope_parameters`, which may have one for each kind of layer."""
    if not isinstance(rope, dict):
        return set()
    parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
    return {part["rope_theta"] for part in parts if isinstance(part.get("rope_theta"), int | float)}


def config_size(config: Any, name: str) -> int:
    """A size that a configuration may have, as in "head_dim"; 0 where it has none.

    Where layers differ it is the largest: as a list of all layers (Gemma 3n), or in configurations of single layers,
    whose common one refuses to name a size that they do not share (Gemma 4).
    """
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    values = [getattr(layer, name, None) for layer in layers]
    sizes = chain.from_iterable(value if isinstance(value, list) else [value] for value in values)
    return max((int(size) for size in sizes if size), default=0)


def head_size(config: Any) -> int:
    """Numbers of a head of attention and a position; of a model without attention, its width."""
    return config_size(config, "head_dim") or int(config.hidden_size) // max(
        1, config_size(config, "num_attention_heads")
    )


def attention_width(config: Any) -> int:
    """Heads of attention times their size; 0 of a model without attention."""
    return config_size(config, "num_attention_heads") * head_size(config)


def text_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a multimodal model's text trunk; of a text-only model, its own."""
    text: PreTrainedConfig = config.get_text_config(decoder=True)
    return text


def clear_implementations(config: PreTrainedConfig) -> None:
    """Remove the implementations that a config.json names: transformers would fetch such a kernel and run it."""
    for name in [name for name in vars(config) if name.endswith(("_implementation", "_implementation_internal"))]:
        setattr(config, name, None)


def outline_model(path: Path, config: PreTrainedConfig, stored: Mapping[str, StoredTensor]) -> PreTrainedModel:
    """The model that a configuration describes, on "meta"; refused where it is larger than the weights are.

    Args:
        path: the directory, for the message.
        config: from `parse_config`.
        stored: every tensor of its weights, by the headers alone.

    Raises:
        ModelError: it describes a larger model, or transformers cannot make a model of it.
    """
    elements = sum(math.prod(tensor.shape) for tensor in stored.values())
    for name, value in _numbers(config.to_dict()):
        if SIZE_NAME.fullmatch(name) and value > elements:
            raise _too_large(path, f"{name} {value:,}", f"{elements:,} numbers", stored)
        if LAYERS_NAME.fullmatch(name) and value > MISSING_SHARE * len(stored):
            raise _too_large(path, f"{name} {value:,}", f"{len(stored):,} tensors", stored)
    try:
        with torch.device("meta"):
            model = _make_model(config)
    except Exception as error:  # transformers raises many kinds for a configuration that makes no model
        reason = first_line(error)
        raise ModelError(f"{path}/config.json makes no model: {reason}", hint=OF_ANOTHER_MODEL) from error
    described = sum(parameter.numel() for parameter in model.parameters())
    if described > MISSING_SHARE * elements + MISSING_FEW:
        raise _too_large(path, f"a model of {described:,} numbers", f"{elements:,}", stored)
    return model


def _make_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model without a vocabulary head; a few multimodal ones are known only by the class that config.json names."""
    named = config.architectures[0] if isinstance(config.architectures, list) and config.architectures else None
    kind: Any = getattr(transformers, named, None) if isinstance(named, str) else None
    is_class = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
    make: Any = (
        kind._from_config if is_class and type(config) not in AutoModel._model_mapping else AutoModel.from_config
    )
    model: PreTrainedModel = make(config)
    return model


def _numbers(described: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(name, value) of every whole number in a configuration and in those of its parts."""
    for name, value in sorted(described.items(), key=lambda item: str(item[0])):
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield str(name), value


def _too_large(path: Path, described: str, held: str, stored: Mapping[str, StoredTensor]) -> ModelError:
    packed = next((t for t in stored.values() if t.dtype not in FLOATING and len(t.shape) > 1), None)
    if packed is not None:  # several weights in one number, so that there are fewer of them
        return quantized(path, packed)
    return ModelError(f"{path}/config.json describes {described}, its weights hold {held}", hint=OF_ANOTHER_MODEL)


def quantized(path: Path, tensor: StoredTensor) -> ModelError:
    """The refusal of a directory one of whose weights is float8 or an integer."""
    return ModelError(f"{path}: its weights are quantized: {tensor.name} is stored as {tensor.dtype}", hint=QUANTIZED)


def may_be_copied(file: Path) -> bool:
    """Whether a file of a model directory is its own, and may be copied into a checkpoint.

    A link may point into the directory, or to `blobs` beside `snapshots` as in the hub's cache; not to other files of
    the machine.
    """
    if not file.is_file() or file.stat().st_size > MOST_COPIED_BYTES:
        return False
    real, folder = file.resolve(), file.parent.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    return real.parent in (folder, blobs)


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
"""Peak learning rates for training from scratch; tiny and small were tried on the sample and known-value data."""

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
