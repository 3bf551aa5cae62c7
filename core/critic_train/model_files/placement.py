"""Where each tensor of a directory's files belongs in a model, by names, types and shapes: no weights are read.

Names go through the same steps as when transformers loads them, so that old names, a prefix and experts that are stored
one by one are understood. What neither the model nor a vocabulary head nor multi-token prediction takes is left over:
a value head, or a sign that the files are not what config.json says.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from critic_train.errors import ModelError
from critic_train.model_files.config import OF_ANOTHER_MODEL, QUANTIZED, quantized
from critic_train.model_files.tensor_file import FLOATING, StoredTensor

SCALES = re.compile(
    r"(scales?|scale_inv|scale_2|qweight|qzeros|g_idx|absmax|packed|SCB|\.biases|zero_point)$|quant_(map|state)"
)
VOCABULARY_HEADS = ("lm_head", "embed_out", "output_layer", "output")
PREDICTED_AHEAD = re.compile(r"(^|\.)mtp(\.|_|\d)")
"""Layers that predict tokens beyond the next one, as Qwen3.5 and MiMo name them."""
PREDICTED_AHEAD_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_num_hidden_layers")
"""How many layers of that kind follow the last one, as in DeepSeek-V3, whose names go on counting."""
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"attn\.(masked_)?bias$", r"attention\.(masked_)?bias$")
"""Constants that older versions of transformers stored beside the weights."""
SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where stored tensors belong.

    Attributes:
        prefix: what stands before the trunk's names in the model that is loaded: "" or, in a multimodal one, for
            example "language_model.".
        trunk: name in the trunk -> what it is made of.
        rest: name in the model -> what it is made of, for the other parts of a multimodal one.
        direct: names in the model whose tensor is stored as it is in memory.
        left_over: name in a file -> a tensor that nothing takes.
        of_trunk: those names in `left_over` that name a part of the trunk.
    """

    prefix: str
    trunk: dict[str, list[StoredTensor]]
    rest: dict[str, list[StoredTensor]]
    direct: frozenset[str]
    left_over: dict[str, StoredTensor]
    of_trunk: frozenset[str]

    @property
    def loaded(self) -> Iterable[StoredTensor]:
        """All tensors that the model takes."""
        return (part for parts in (*self.trunk.values(), *self.rest.values()) for part in parts)


def trunk_prefix(model: PreTrainedModel, text_config: PreTrainedConfig) -> str | None:
    """What stands before the names of the text trunk in a model; "" where it is the model, None where it has none.

    Args:
        model: as AutoModel makes it.
        text_config: of the text trunk, as `get_text_config` gives it.
    """
    kind = AutoModel._model_mapping.get(type(text_config), None)
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and kind is not None and type(module) is kind:
            return f"{name}." if name else ""
    return None


def place_tensors(
    path: Path, model: PreTrainedModel, prefix: str, config: PreTrainedConfig, stored: Mapping[str, StoredTensor]
) -> Placement:
    """Find where every tensor belongs.

    Args:
        path: the directory, for messages.
        model: on "meta", the one through which the weights are loaded.
        prefix: of its text trunk, see `trunk_prefix`.
        config: of the text trunk.
        stored: from `read_headers`.

    Raises:
        ModelError: weights are missing, quantized, or of another shape than config.json says.
    """
    in_memory = model.state_dict()
    parts: dict[str, list[StoredTensor]] = {}
    converted: set[str] = set()
    unplaced: dict[str, str] = {}
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    for name in sorted(stored, key=dot_natural_key):
        named, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, in_memory)
        if named not in in_memory and name in in_memory:
            named, pattern = rename_source_key(name, [], [], model.base_model_prefix, in_memory)
        targets = [named]
        if pattern is not None:
            made = by_pattern[pattern].target_patterns
            targets = [named.replace(made[0], target) for target in made]
            converted.update(targets)
        if named not in in_memory:
            unplaced[name] = named
            continue
        for target in targets:
            parts.setdefault(target, []).append(stored[name])
    _refuse_types(path, parts, in_memory)
    as_stored = {name: parts[name][0] for name in parts.keys() - converted if len(parts[name]) == 1}
    _refuse_shapes(path, as_stored, in_memory, config)
    left_over = _left_over(model, prefix, config, {stored[name]: named for name, named in unplaced.items()})
    missing = [name for name, _ in model.named_parameters() if name.startswith(prefix) and name not in parts]
    placed = any(name.startswith(prefix) for name in parts)
    _refuse_missing(path, missing, prefix, left_over, model, placed=placed)
    children = {name for name, _ in model.get_submodule(prefix.removesuffix(".")).named_children()}
    plain = {tensor.name: named.removeprefix(f"{model.base_model_prefix}.") for tensor, named in left_over.items()}
    return Placement(
        prefix=prefix,
        trunk={name.removeprefix(prefix): made for name, made in parts.items() if name.startswith(prefix)},
        rest={name: made for name, made in parts.items() if not name.startswith(prefix)},
        direct=frozenset(as_stored),
        left_over={tensor.name: tensor for tensor in left_over},
        of_trunk=frozenset(
            name for name, named in plain.items() if named.removeprefix(prefix).split(".")[0] in children
        ),
    )


def _refuse_types(path: Path, parts: Mapping[str, list[StoredTensor]], in_memory: Mapping[str, Tensor]) -> None:
    """Refuse numbers that mean nothing without scales: float8 and integers where the model has floating weights."""
    for name, made in parts.items():
        odd = next((part for part in made if part.dtype not in FLOATING), None)
        if odd is not None and name in in_memory and in_memory[name].is_floating_point():
            raise quantized(path, odd)


def _refuse_shapes(
    path: Path, as_stored: Mapping[str, StoredTensor], in_memory: Mapping[str, Tensor], config: PreTrainedConfig
) -> None:
    lines = []
    for name, tensor in sorted(as_stored.items()):
        expected = list(in_memory[name].shape)
        if list(tensor.shape) != expected:
            of_vocabulary = expected[:1] == [config.vocab_size] and list(tensor.shape[1:]) == expected[1:]
            rows = f" (vocab_size {config.vocab_size})" if of_vocabulary else ""
            lines.append(f"{tensor.name} has {list(tensor.shape)}, config.json says {expected}{rows}")
    if lines:
        hint = OF_ANOTHER_MODEL
        if all("vocab_size" in line for line in lines):
            hint = "set vocab_size in config.json to the rows that are stored, or save the model again after resizing"
        raise _do_not_fit(path, lines, hint)


def _refuse_missing(
    path: Path,
    names: list[str],
    prefix: str,
    left_over: Mapping[StoredTensor, str],
    model: PreTrainedModel,
    *,
    placed: bool,
) -> None:
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    names = sorted(name for name in names if not any(re.search(pattern, name) for pattern in ignored))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    names = [name for name in names if name not in tied]
    if not names:
        return
    lines = [f"{name.removeprefix(prefix)}: missing" for name in names]
    stored = {tensor.name for tensor in left_over}
    added = {name.split(".")[0] for name in stored if any(name.endswith(f".{missing}") for missing in names)}
    hint = OF_ANOTHER_MODEL
    if any(".lora_" in tensor.name or ".base_layer." in tensor.name for tensor in left_over):
        hint = "the weights hold LoRA adapters that are not merged: merge them (merge_and_unload) and save the model"
    elif any(SCALES.search(tensor.name) for tensor in left_over):
        hint = QUANTIZED
    elif len(added) == 1 and not placed:
        hint = f"the names in its files begin with {added.pop()!r}: save the model without that, by save_pretrained"
    raise _do_not_fit(path, lines, hint)


def _do_not_fit(path: Path, lines: list[str], hint: str) -> ModelError:
    shown = "\n".join(f"  {line}" for line in lines[:SHOWN])
    count = "1 weight does" if len(lines) == 1 else f"{len(lines)} weights do"
    return ModelError(f"{path}: {count} not fit the configuration\n{shown}", hint=hint)


def _left_over(
    model: PreTrainedModel, prefix: str, config: Any, unplaced: Mapping[StoredTensor, str]
) -> dict[StoredTensor, str]:
    """The tensors that nothing takes -> the name they would have in the model."""
    trunk: Any = model.get_submodule(prefix.removesuffix("."))
    ignored = [*BUFFERS]
    for part in (model, trunk):
        ignored += getattr(part, "_keys_to_ignore_on_load_unexpected", None) or ()
    never = re.compile("|".join(f"({pattern})" for pattern in ignored))
    layers = getattr(config, "num_hidden_layers", 0)
    layers = layers if isinstance(layers, int) else 0
    counts = (getattr(config, name, 0) for name in PREDICTED_AHEAD_COUNTS)
    ahead = max(count if isinstance(count, int) else 0 for count in counts)
    heads = {t.name.removesuffix(".weight") for t in unplaced if _is_vocabulary_head(t, int(config.vocab_size))}

    def is_taken(tensor: StoredTensor, named: str) -> bool:
        layer = LAYER.search(named)
        return (
            never.search(named) is not None
            or PREDICTED_AHEAD.search(named) is not None
            or (layer is not None and layers <= int(layer[1]) < layers + ahead)
            or tensor.name.rpartition(".")[0] in heads
            or tensor.name in heads
        )

    return {tensor: named for tensor, named in unplaced.items() if not is_taken(tensor, named)}


def _is_vocabulary_head(tensor: StoredTensor, rows: int) -> bool:
    """Whether a tensor turns hidden states into logits over the vocabulary."""
    if len(tensor.shape) != 2 or tensor.dtype not in FLOATING:
        return False
    parent = tensor.name.removesuffix(".weight").rpartition(".")[2]
    by_shape = tensor.shape[0] == rows and not parent.isdigit()  # a number names a layer of a deeper head
    return by_shape or (parent in VOCABULARY_HEADS and tensor.shape[0] > 1)


def refuse_left_over(path: Path, placement: Placement, names: Iterable[str], model_type: str) -> None:
    """Refuse a directory some of whose tensors nothing takes.

    Args:
        path: the directory.
        placement: of its tensors.
        names: those in `left_over` that are no value head.
        model_type: for the message.

    Raises:
        ModelError: there are some.
    """
    names = sorted(names, key=dot_natural_key)
    if not names:
        return
    shown = ", ".join(placement.left_over[name].outline for name in names[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if names[SHOWN:] else ""
    of_trunk = [name for name in names if name in placement.of_trunk]
    if any(SCALES.search(name) for name in of_trunk):
        what, hint = "its weights are quantized, with scales beside them", QUANTIZED
    elif any(".lora_" in name for name in names):
        what = "it holds LoRA adapters that are not merged"
        hint = "merge them (merge_and_unload) and save the model"
    elif of_trunk:
        what, hint = f"{model_type} as config.json describes it has no such part", OF_ANOTHER_MODEL
    else:
        what = "they make no linear value head of one row"
        hint = "critic-train fit --head-init exact leaves them out: it starts from the trunk, with a new value head"
    count = "1 tensor belongs" if len(names) == 1 else f"{len(names)} tensors belong"
    raise ModelError(f"{path}: {count} to no part of the model: {shown}{more}; {what}", hint=hint)
