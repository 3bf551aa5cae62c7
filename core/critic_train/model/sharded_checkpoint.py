"""Weights in the form in which transformers stores them, where that is another than in memory, a layer at a time.

A mixture of experts, for example, holds all experts of a layer in one tensor and stores each expert by itself. What
turns one form into the other looks at one layer at a time, so that no process needs the whole model for it.

Give every rank its part of a model directory's weights, read from the files by itself.

A safetensors file can be read row by row, and FSDP2 cuts weights by rows: so each rank reads its own rows and no
others, and no process ever holds the whole model. Where the names in the files are not those of the trunk (a
mixture of experts that transformers keeps in another form), rank 0 loads the directory whole in host memory and
hands the parts out.

Write a sharded critic and its moments as one process writes them, holding one whole tensor at a time.

Where transformers stores an architecture in another form than it holds in memory, that is one layer at a time.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from critic_train.model.compute import Compute
from critic_train.model.critic import Critic, ValueHead
from critic_train.model.fsdp import shard
from critic_train.model.loading import ModelSource, load_critic, use_tree_attention, weight_files
from critic_train.model.lora import has_adapters, merge_adapter, mergeable_tensors, name_without_adapter, save_adapters
from critic_train.model.saving import (
    MAX_SHARD_BYTES,
    MAX_SHARD_SIZE,
    as_token_classifier,
    copy_tokenizer,
    loads_for_token_classification,
)
from critic_train.model.tensor_file import read_rows, write_tensors
from critic_train.run.storage import library_writes, write_file

UP_TO_THE_FIRST_NUMBER = re.compile(r"(.*?\.\d+)\.")


class StoredForm:
    """The tensors that a checkpoint of a sharded model holds.

    Attributes:
        tensors: name in the file -> shape and dtype, on "meta", in transformers' order.

    Args:
        model: the class that is written; transformers looks up what it does to its weights.
        held: name in memory -> tensor, of the whole's shape.
        whole: the whole of a tensor in memory, by name; all ranks call it together.
        leads: whether this rank needs what comes out.
    """

    def __init__(self, model: Any, held: dict[str, Tensor], whole: Callable[[str], Tensor], *, leads: bool) -> None:
        self._model, self._whole, self._leads = model, whole, leads
        outlines = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in held.items()}
        self.tensors: dict[str, Tensor] = revert_weight_conversion(model, outlines)
        self._members: dict[str, list[str]] = defaultdict(list)
        for name in held:
            self._members[_group_of(name)].append(name)
        self._source: dict[str, str] = {}
        self._parted: dict[str, Tensor] = {}
        for group, names in self._members.items():
            made = revert_weight_conversion(model, {name: outlines[name] for name in names})
            self._source |= dict.fromkeys(made, group)
            self._parted |= made
        self._group = ""
        self._here: dict[str, Tensor] = {}

    @property
    def layer_by_layer(self) -> bool:
        """Whether the layers by themselves come to what all of them together do."""
        shapes = [{name: (t.shape, t.dtype) for name, t in made.items()} for made in (self.tensors, self._parted)]
        return shapes[0] == shapes[1]

    def tensor(self, name: str) -> Tensor:
        """A stored tensor; all ranks ask for the same. Those that do not lead get its outline.

        Its layer is held until another one is asked for.
        """
        group = self._source[name]
        if group != self._group:
            self._here = {}
            self._group = group
            found: dict[str, Tensor] = {}
            for member in self._members[group]:
                tensor = self._whole(member)
                if self._leads:
                    found[member] = tensor.detach().cpu()
            self._here = revert_weight_conversion(self._model, found) if self._leads else {}
        return self._here[name] if self._leads else self.tensors[name]


def _group_of(name: str) -> str:
    """What a tensor in memory is converted with: its layer, or where it is in none, itself."""
    layer = UP_TO_THE_FIRST_NUMBER.match(name)
    return name if layer is None else layer[1]


PREFIXES = ("", "model.", "transformer.")
"""What may stand before a trunk's own names in a file, besides its class's `base_model_prefix`."""


def load_sharded(source: ModelSource, compute: Compute, adapt: Callable[[Critic], None] | None = None) -> Critic:
    """The critic of a directory, spread over the ranks of `compute`. All ranks call it.

    Adapters are drawn whole on every rank, by the same seed, and then cut: they are small, and those of one process.

    Raises:
        ModelError: as `load_critic`.
    """
    with parameters_on_meta():
        trunk = AutoModel.from_config(source.config, dtype=torch.float32)
        head = ValueHead(int(source.config.hidden_size))
    critic = use_tree_attention(Critic(trunk, head))
    places = _places(critic, source)
    if adapt is not None:
        adapt(critic)
    _materialise(shard(critic, compute), compute)
    if places is None:
        _from_rank_0(critic, source, compute, adapt)
        return critic
    critic.head.set_constant(0.0)
    for name, parameter in critic.named_parameters():
        place = places.get(name_without_adapter(name))
        if place is not None:
            read_rows(*place, parameter)
    return critic


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have their parameters on "meta", which takes no memory, and their buffers as they are."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _places(critic: Critic, source: ModelSource) -> dict[str, tuple[Path, str]] | None:
    """Critic's name of a parameter -> (file, name in it); None where they do not correspond one to one."""
    stored: dict[str, tuple[Path, list[int]]] = {}
    for file in weight_files(source.path):
        with safe_open(file, framework="pt") as tensors:
            stored |= {name: (file, tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    found: dict[str, tuple[Path, str]] = {}
    for name, parameter in critic.trunk.named_parameters():
        prefixes = (f"{critic.trunk.base_model_prefix}.", *PREFIXES)
        named = next((prefix + name for prefix in prefixes if prefix + name in stored), None)
        if named is None or stored[named][1] != list(parameter.shape):
            return None
        found[f"trunk.{name}"] = (stored[named][0], named)
    for part, parameter in critic.head.named_parameters() if source.head is not None else ():
        named = f"{source.head}.{part}"
        if named in stored:
            if stored[named][1] != list(parameter.shape):
                return None
            found[f"head.{part}"] = (stored[named][0], named)
    return found


def _materialise(critic: Critic, compute: Compute) -> None:
    """Give every rank memory for its parts, not yet filled, and bring buffers and adapters over."""
    drawn = {name: part for name, part in critic.state_dict().items() if ".lora_" in name}
    buffers = [
        (module, name, buffer) for module in critic.modules() for name, buffer in module.named_buffers(recurse=False)
    ]
    critic.to_empty(device="cpu" if compute.offload == "all" else compute.device)
    if drawn:
        critic.load_state_dict(drawn, strict=False)
    for module, name, buffer in buffers:
        setattr(module, name, buffer.to(compute.device))


def _from_rank_0(critic: Critic, source: ModelSource, compute: Compute, adapt: Callable[[Critic], None] | None) -> None:
    """Rank 0 loads as one process does; the others get their parts tensor by tensor."""
    whole: dict[str, Any] = {}
    if compute.ranks.leads:
        whole = load_critic(source, adapt=adapt).state_dict()
    compute.ranks.told(True)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(critic, whole, options=options)


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
    parts = mergeable_tensors(model)
    if not classifies:
        parts |= {f"score.{name}": (value, None) for name, value in critic.head.state_dict().items()}

    def whole_and_folded(name: str) -> Tensor:
        return merge_adapter(*parts[name], whole)

    tensors = {name: tensor for name, (tensor, _) in parts.items()}
    writes = _writes(model, tensors, whole_and_folded, leads=directory is not None)
    if has_adapters(critic.trunk):
        writes.append(partial(save_adapters, critic, gather=whole))
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
