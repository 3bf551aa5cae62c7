"""Write a sharded critic and its moments as one process writes them, holding one whole tensor at a time.

Where transformers stores an architecture in another form than it holds in memory, that is one layer at a time.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange

from critic_train.distributed.stored_form import StoredForm
from critic_train.model.critic import Critic
from critic_train.model.lora import fold, foldable, is_adapted, save_adapters
from critic_train.model.saving import (
    MAX_SHARD_BYTES,
    MAX_SHARD_SIZE,
    as_token_classifier,
    copy_tokenizer,
    loads_for_token_classification,
)
from critic_train.model.tensor_file import write_tensors
from critic_train.run.storage import library_writes, write_file


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which every rank holds a part; all ranks call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_rows_of(like: DTensor, part: Tensor) -> DTensor:
    """This rank's rows of a tensor that is spread as another of its shape is."""
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def end_to_end(like: DTensor, numbers: Tensor, lengths: list[int]) -> Tensor:
    """The numbers of all ranks in one row; every rank knows how many each has. All ranks call it."""
    padded = numbers.new_zeros(max(lengths))
    padded[: len(numbers)] = numbers
    rows = DTensor.from_local(padded[None], like.device_mesh, like.placements, run_check=False).full_tensor()
    return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])


def save_sharded(critic: Critic, directory: Path | None, tokenizer_from: Path | None) -> None:
    """What `save_critic` does, for a sharded critic. All ranks call it; rank 0 writes.

    Args:
        critic: sharded.
        directory: an existing, empty directory; None on all ranks but 0.
        tokenizer_from: the model directory whose tokenizer files are copied, if any.

    Raises:
        OSError: the disk is full or not writable.
    """
    classifies = loads_for_token_classification(critic)
    model = as_token_classifier(critic) if classifies else critic.trunk
    if not classifies:
        model.config.value_head_prefix = "score"
    parts = foldable(model)
    if not classifies:
        parts |= {f"score.{name}": (value, None) for name, value in critic.head.state_dict().items()}

    def whole_and_folded(name: str) -> Tensor:
        return fold(*parts[name], whole)

    tensors = {name: tensor for name, (tensor, _) in parts.items()}
    writes = _writes(model, tensors, whole_and_folded, leads=directory is not None)
    if is_adapted(critic.trunk):
        writes.append(partial(save_adapters, critic, whole=whole))
    fault: OSError | None = None
    for write in writes:
        try:
            write(directory if fault is None else None)
        except OSError as error:
            fault = error  # the other ranks go through the remaining files, and so must this one
    if fault is not None:
        raise fault
    if directory is not None:
        copy_tokenizer(tokenizer_from, directory)


def _writes(
    model: Any, tensors: dict[str, Tensor], whole: Callable[[str], Tensor], *, leads: bool
) -> list[Callable[[Path | None], None]]:
    """What is to be done, given the directory on the rank that writes and None on those that only help."""
    if _is_stored_otherwise(model):
        stored = StoredForm(model, tensors, whole, leads=leads)
        if not stored.layer_by_layer:
            return [partial(_save_gathered, model, list(tensors), whole)]
        tensors, whole = stored.tensors, stored.tensor
    files = split(tensors)

    def write(name: str, directory: Path | None) -> None:
        path = None if directory is None else directory / name
        write_tensors(path, {key: tensors[key] for key in files[name]}, whole, {"format": "pt"})

    def describe(directory: Path | None) -> None:
        if directory is not None:
            _write_config(model, directory)
            _write_index(files, tensors, model, directory)

    return [*(partial(write, name) for name in files), describe]


def split(tensors: dict[str, Tensor]) -> dict[str, list[str]]:
    """File name -> tensors, in their order, none above MAX_SHARD_BYTES; named as transformers names them."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        bytes_of_it = tensor.numel() * tensor.dtype.itemsize
        if groups[-1] and size + bytes_of_it > MAX_SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += bytes_of_it
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": names for n, names in enumerate(groups, start=1)}


def _is_stored_otherwise(model: Any) -> bool:
    """Whether transformers keeps this architecture's weights in another form in files than in memory."""
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    return any(not isinstance(conversion, PrefixChange) for conversion in conversions)


def _save_gathered(model: Any, names: list[str], whole: Callable[[str], Tensor], directory: Path | None) -> None:
    """Gather all in rank 0's host memory and let transformers convert and write it."""
    given: dict[str, Tensor] = {}
    for name in names:
        tensor = whole(name)
        if directory is not None:
            given[name] = tensor.cpu()
    if directory is not None:
        with library_writes(directory):
            model.save_pretrained(directory, state_dict=given, max_shard_size=MAX_SHARD_SIZE)


def _write_config(model: Any, directory: Path) -> None:
    """config.json as `save_pretrained` leaves it."""
    model.config.dtype = "float32"
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    with library_writes(directory):
        model.config.save_pretrained(directory)


def _write_index(files: dict[str, list[str]], tensors: dict[str, Tensor], model: Any, directory: Path) -> None:
    """Where each tensor is, where there are several files."""
    if len(files) == 1:
        return
    index = {
        "metadata": {
            "total_parameters": model.num_parameters(),
            "total_size": sum(t.numel() * t.dtype.itemsize for t in tensors.values()),
        },
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    write_file(directory / "model.safetensors.index.json", text.encode())
