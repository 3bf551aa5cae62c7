"""Save critics that are sharded over ranks, as the directory that one process writes; no process holds all weights.

Rank 0 writes one full tensor at a time, which all ranks gather. Where transformers stores an architecture in another
form than it has in memory, it is one layer at a time: a mixture of experts, for example, has all experts of a layer in
one tensor and stores each expert by itself.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from critic_train.model.critic import Critic
from critic_train.model_files.gather import Gather, full_tensor
from critic_train.model_files.tensor_file import write_tensors
from critic_train.run.storage import library_writes, write_file
from critic_train.weights.lora import has_adapters, merge_adapter, mergeable_tensors, save_adapters, trained_parameters
from critic_train.weights.saving import (
    MAX_SHARD_BYTES,
    MAX_SHARD_SIZE,
    add_old_rope_entries,
    as_token_classifier,
    copy_tokenizer,
    describe_head,
    loads_for_token_classification,
    passed_through,
)

UP_TO_THE_FIRST_NUMBER = re.compile(r"(.*?\.\d+)\.")


class StoredForm:
    """The tensors that a checkpoint of a sharded model holds.

    Attributes:
        tensors: name in the file -> shape and dtype, on "meta", in transformers' order.

    Args:
        model: the class that is written; transformers looks up how it converts its weights.
        in_memory: name in memory -> tensor, with the shape of the full one.
        full: the full tensor of a name in memory; all ranks call it together.
        is_main: whether this rank needs what comes out.
    """

    def __init__(
        self, model: Any, in_memory: dict[str, Tensor], full: Callable[[str], Tensor], *, is_main: bool
    ) -> None:
        self._model, self._full, self._is_main = model, full, is_main
        outlines = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in in_memory.items()}
        self.tensors: dict[str, Tensor] = revert_weight_conversion(model, outlines)
        self._members: dict[str, list[str]] = defaultdict(list)
        for name in in_memory:
            self._members[_layer_of(name)].append(name)
        self._source: dict[str, str] = {}
        self._by_layer: dict[str, Tensor] = {}
        for layer, names in self._members.items():
            converted = revert_weight_conversion(model, {name: outlines[name] for name in names})
            self._source |= dict.fromkeys(converted, layer)
            self._by_layer |= converted
        self._layer = ""
        self._converted: dict[str, Tensor] = {}

    @property
    def layer_by_layer(self) -> bool:
        """Whether converting layer by layer gives the same tensors as converting all together."""
        shapes = [{name: (t.shape, t.dtype) for name, t in form.items()} for form in (self.tensors, self._by_layer)]
        return shapes[0] == shapes[1]

    def tensor(self, name: str) -> Tensor:
        """A stored tensor; all ranks ask for the same. Ranks other than 0 get its shape and dtype, on "meta".

        Its layer is held until a tensor of another one is asked for.
        """
        layer = self._source[name]
        if layer != self._layer:
            self._converted = {}
            self._layer = layer
            gathered: dict[str, Tensor] = {}
            for member in self._members[layer]:
                tensor = self._full(member)
                if self._is_main:
                    gathered[member] = tensor.detach().cpu()
            self._converted = revert_weight_conversion(self._model, gathered) if self._is_main else {}
        return self._converted[name] if self._is_main else self.tensors[name]


def _layer_of(name: str) -> str:
    """What a tensor in memory is converted with: its layer, or where it is in none, itself."""
    layer = UP_TO_THE_FIRST_NUMBER.match(name)
    return name if layer is None else layer[1]


class ShardedCritic:
    """A sharded critic as the files of a checkpoint: the directory that `save_critic` writes on one process.

    It is made between passes, when all weights are sharded, and refers to the shards. So it can be saved even while a
    pass holds layers gathered.

    Args:
        critic: sharded.
    """

    def __init__(self, critic: Critic) -> None:
        classifies = loads_for_token_classification(critic)
        self._model: Any = as_token_classifier(critic) if classifies else critic.trunk
        self._parts = mergeable_tensors(self._model)
        self._passed = passed_through(critic)
        self._parts |= {name: (stored.on_meta(), None) for name, stored in self._passed.items()}
        if not classifies:
            describe_head(self._model.config, critic, "score")
            self._parts |= {f"score.{name}": (value, None) for name, value in critic.head.state_dict().items()}
        self._outline = self._model if classifies else _outline_of(critic)
        self._adapters = trained_parameters(critic) if has_adapters(critic.trunk) else {}
        self._num_parameters = int(self._model.num_parameters())

    def save_to(self, directory: Path | None, tokenizer_from: Path | None, gather: Gather = full_tensor) -> None:
        """Write weights, config.json, adapters and the tokenizer's files. All ranks call it; rank 0 writes.

        Args:
            directory: an existing, empty directory; None on all ranks but 0.
            tokenizer_from: the model directory whose tokenizer files are copied, if any.
            gather: how full tensors are made.

        Raises:
            OSError: the disk is full or not writable.
        """
        failure: OSError | None = None
        for write in self._writes(gather, is_main=directory is not None):
            try:
                write(directory if failure is None else None)
            except OSError as error:
                failure = error  # the other ranks go through the remaining files, and so must this one
        if failure is not None:
            raise failure
        if directory is not None:
            add_old_rope_entries(directory)
            copy_tokenizer(tokenizer_from, directory, processor=bool(self._passed))

    def _writes(self, gather: Gather, *, is_main: bool) -> list[Callable[[Path | None], None]]:
        """What is to be done, given the directory on the rank that writes and None on those that only help."""
        writes: list[Callable[[Path | None], None]] = []
        tensors = {name: tensor for name, (tensor, _) in self._parts.items()}

        def full(name: str) -> Tensor:
            if name in self._passed:  # of which every rank has the file, and rank 0 alone needs it
                return self._passed[name].load() if is_main else tensors[name]
            return merge_adapter(*self._parts[name], gather)

        stored: StoredForm | None = None
        if _is_stored_otherwise(self._outline):
            stored = StoredForm(self._outline, tensors, full, is_main=is_main)
        if stored is not None and not stored.layer_by_layer:
            writes.append(partial(self._save_gathered, full))
        else:
            written, give = (tensors, full) if stored is None else (stored.tensors, stored.tensor)
            files = split(written)
            writes += [
                partial(_write_file, name, {key: written[key] for key in keys}, give) for name, keys in files.items()
            ]
            writes.append(partial(self._describe, files, written))
        if self._adapters:
            writes.append(partial(save_adapters, self._adapters, gather=gather))
        return writes

    def _save_gathered(self, full: Callable[[str], Tensor], directory: Path | None) -> None:
        """Gather all in rank 0's host memory and let transformers convert and write it."""
        gathered: dict[str, Tensor] = {}
        for name in self._parts:
            tensor = full(name)
            if directory is not None:
                gathered[name] = tensor.cpu()
        if directory is not None:
            with library_writes(directory):
                self._outline.save_pretrained(directory, state_dict=gathered, max_shard_size=MAX_SHARD_SIZE)

    def _describe(self, files: dict[str, list[str]], tensors: dict[str, Tensor], directory: Path | None) -> None:
        """Write config.json as `save_pretrained` does, and where each tensor is if there are several files."""
        if directory is None:
            return
        config = self._model.config
        config.dtype = "float32"
        config.architectures = [type(self._model).__name__.removeprefix("FSDP")]
        with library_writes(directory):
            config.save_pretrained(directory)
        if len(files) == 1:
            return
        index = {
            "metadata": {
                "total_parameters": self._num_parameters,
                "total_size": sum(t.numel() * t.dtype.itemsize for t in tensors.values()),
            },
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        write_file(directory / "model.safetensors.index.json", text.encode())


def _write_file(name: str, tensors: dict[str, Tensor], full: Callable[[str], Tensor], directory: Path | None) -> None:
    write_tensors(None if directory is None else directory / name, tensors, full, {"format": "pt"})


def split(tensors: dict[str, Tensor]) -> dict[str, list[str]]:
    """File name -> tensors, in their order, none above MAX_SHARD_BYTES; named as transformers names them."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        tensor_bytes = tensor.numel() * tensor.dtype.itemsize
        if groups[-1] and size + tensor_bytes > MAX_SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": names for n, names in enumerate(groups, start=1)}


def _outline_of(critic: Critic) -> Any:
    """The trunk as transformers makes it, on "meta": it does not look up conversions for the classes of FSDP2."""
    with torch.device("meta"):
        return AutoModel.from_config(critic.trunk.config)


def _is_stored_otherwise(model: Any) -> bool:
    """Whether transformers keeps this architecture's weights in another form in files than in memory."""
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    return any(not isinstance(conversion, PrefixChange) for conversion in conversions)
