"""Write a critic as a directory that transformers, verl and OpenRLHF load.

The target is `AutoModelForTokenClassification` with one label: trunk, `score.weight` [1, H], `score.bias` [1]. Where
transformers has no such class for an architecture, the trunk's own class is written with the same two tensors
beside it: critic-train loads it, and `AutoModel` loads its trunk. Where it has one for a multimodal model and none for
that model's text trunk, the multimodal model is written, its other parts as they were.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

from critic_train.jsonio import read_json_object
from critic_train.model.critic import HEAD_OUTPUTS, Critic
from critic_train.model_files.config import may_be_copied
from critic_train.model_files.tensor_file import StoredTensor
from critic_train.run.storage import copy_file, library_writes, replace_file
from critic_train.weights.lora import has_adapters, merged_tensors, save_adapters, trained_parameters
from critic_train.weights.value_heads import INPUTS_KEY

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "generation_config.json",
)
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
"""What else belongs to a multimodal model."""

MAX_SHARD_SIZE = "5GB"
MAX_SHARD_BYTES = 5 * 10**9


def written_config(critic: Critic) -> PreTrainedConfig:
    """The configuration that a checkpoint of this critic is written with: its trunk's, or the multimodal one's."""
    multimodal = critic.multimodal
    config: PreTrainedConfig = critic.trunk.config
    return multimodal.config if multimodal is not None and multimodal.passes_through else config


def exported_class(critic: Critic) -> str:
    """The class a checkpoint of this critic will name, as in "LlamaForTokenClassification"."""
    kind = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING.get(type(written_config(critic)), None)
    # FSDP2 puts its name before a sharded module's class.
    return type(critic.trunk).__name__.removeprefix("FSDP") if kind is None else str(kind.__name__)


def loads_for_token_classification(critic: Critic) -> bool:
    """Whether `AutoModelForTokenClassification` (and so verl) will load this critic's checkpoints."""
    return type(written_config(critic)) in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING


def checkpoint_bytes(critic: Critic, *, averaged: bool = False) -> int:
    """About what a checkpoint of a run weighs: weights and both moments in float32, and a megabyte of small files.

    Where the weights are `averaged`, those that training goes on with are there too.
    """
    trained = sum(p.numel() for p in critic.parameters() if p.requires_grad)
    return 4 * sum(p.numel() for p in critic.parameters()) + (12 if averaged else 8) * trained + 2**20


def describe_head(config: PreTrainedConfig, critic: Critic, prefix: str) -> None:
    """Say in a configuration what a checkpoint's value head is called, and what it reads where that is more.

    A head of two rows then loads as a token classifier with two scores, and is refused where one is expected.
    """
    inputs = critic.head.inputs
    config.value_head_prefix = prefix
    config.num_labels = HEAD_OUTPUTS[inputs]
    if inputs != "last":
        setattr(config, INPUTS_KEY, inputs)
    elif hasattr(config, INPUTS_KEY):
        delattr(config, INPUTS_KEY)


def save_critic(critic: Critic, directory: Path, tokenizer_from: Path | None) -> None:
    """Write weights (safetensors, several files when large), config.json and the tokenizer's files.

    Args:
        critic: not sharded; see `sharded_checkpoint.ShardedCritic` for one that is.
        directory: an existing, empty directory.
        tokenizer_from: the model directory whose tokenizer files are copied, if any.

    Raises:
        OSError: the disk is full or not writable.
    """
    describe_head(critic.trunk.config, critic, "score")
    with library_writes(directory):
        if loads_for_token_classification(critic):
            model = as_token_classifier(critic)
            others = passed_through(critic)
            tensors = merged_tensors(model) if others or has_adapters(model) else None
            if tensors is not None:
                tensors |= {name: stored.load() for name, stored in others.items()}
            model.save_pretrained(directory, state_dict=tensors, max_shard_size=MAX_SHARD_SIZE)
        else:
            tensors = merged_tensors(critic.trunk)
            tensors |= {"score.weight": critic.head.weight.detach(), "score.bias": critic.head.bias.detach()}
            critic.trunk.save_pretrained(directory, state_dict=tensors, max_shard_size=MAX_SHARD_SIZE)
    if has_adapters(critic.trunk):
        save_adapters(trained_parameters(critic), directory)
    add_old_rope_entries(directory)
    copy_tokenizer(tokenizer_from, directory, processor=bool(passed_through(critic)))


def add_old_rope_entries(directory: Path) -> None:
    """Add the rotary entries that transformers 4 reads to a config.json that transformers 5 wrote.

    transformers 5 writes `rope_parameters` alone. transformers 4 passes over that, takes its default base of 10000 and
    gives other values without a word (findings/rope-parameters-transformers-4.sh). Nothing is added where transformers
    5 would read something else with the entries: Gemma 4, which transformers 4 does not know, takes `rope_scaling` for
    all of `rope_parameters`.
    """
    file = directory / "config.json"
    config = read_json_object(file)
    entries = old_rope_entries(config.get("rope_parameters"))
    missing = {name: value for name, value in entries.items() if name not in config}
    if missing:
        before, rope = file.read_bytes(), _rope_parameters(directory)
        replace_file(file, f"{json.dumps(config | missing, indent=2, sort_keys=True)}\n".encode())
        if _rope_parameters(directory) != rope:
            replace_file(file, before)


def _rope_parameters(directory: Path) -> Any:
    """What transformers reads; None where it refuses them."""
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True).rope_parameters
    except Exception:  # each configuration class checks in its own way
        return None


def old_rope_entries(rope: Any) -> dict[str, Any]:
    """`rope_parameters` of transformers 5 as transformers 4 names it; empty where there is no such form.

    With other parameters for layers of sliding attention, transformers 4 has a second base for them alone.
    """
    if not isinstance(rope, dict):
        return {}
    entries: dict[str, Any] = {}
    if isinstance(rope.get("full_attention"), dict):
        sliding = rope.get("sliding_attention")
        if isinstance(sliding, dict) and "rope_theta" in sliding:
            entries["rope_local_base_freq"] = sliding["rope_theta"]
        rope = rope["full_attention"]
    entries |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if rope.get("rope_type", "default") != "default":
        entries["rope_scaling"] = {name: value for name, value in rope.items() if name not in entries}
    return entries


def copy_tokenizer(tokenizer_from: Path | None, directory: Path, *, processor: bool = False) -> None:
    """Copy a model directory's tokenizer files, where there are any; with `processor` those of images as well."""
    if tokenizer_from is None:
        return
    for name in (*TOKENIZER_FILES, *PROCESSOR_FILES) if processor else TOKENIZER_FILES:
        if may_be_copied(tokenizer_from / name):
            copy_file(tokenizer_from / name, directory / name)


def as_token_classifier(critic: Critic) -> PreTrainedModel:
    """transformers' own class around this critic's tensors, so that its own writer names and converts them.

    Of a multimodal model the other parts are on "meta"; see `passed_through`.
    """
    config = written_config(critic)
    kind = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING[type(config)]
    with torch.device("meta"):
        wrapper = kind(config)
    trunk = kind.base_model_prefix
    if config is not critic.trunk.config:
        trunk += f".{critic.multimodal.prefix.removesuffix('.')}"  # type: ignore[union-attr]
    parent, _, name = trunk.rpartition(".")
    setattr(wrapper.get_submodule(parent), name, critic.trunk)
    head = next(name for name, child in wrapper.named_children() if isinstance(child, nn.Linear))
    setattr(wrapper, head, critic.head)
    describe_head(wrapper.config, critic, head)
    return wrapper


def passed_through(critic: Critic) -> dict[str, StoredTensor]:
    """Name in `as_token_classifier` -> tensor of the directory that the critic was made of, for its other parts."""
    multimodal = critic.multimodal
    if multimodal is None or not multimodal.passes_through:
        return {}
    base = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING[type(multimodal.config)].base_model_prefix
    return {f"{base}.{name}": stored for name, stored in multimodal.rest.items()}
