"""Load critics that are sharded over ranks; no process ever holds all weights.

A safetensors file can be read row by row, and FSDP2 cuts weights by rows, so each rank reads its own rows only. Where
the names in the files are not those of the trunk (a mixture of experts that transformers keeps in another form), rank 0
loads the directory in host memory and the shards are sent from there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import AutoModel

from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.fsdp import shard
from critic_train.model_files.tensor_file import StoredTensor, copy_rows, read_rows
from critic_train.settings import offloads
from critic_train.weights.loading import ModelSource, load_critic, refuse_not_finite, use_tree_attention
from critic_train.weights.lora import name_without_adapter


def load_critic_on_ranks(
    source: ModelSource, compute: Compute, adapt: Callable[[Critic], None] | None = None
) -> Critic:
    """The critic of a directory, sharded where the ranks of `compute` shard models. All ranks call it.

    Args:
        source: from `read_model`.
        compute: device and ranks; a critic that is not sharded is loaded to the CPU.
        adapt: puts adapters into the critic; before it is sharded, when its weights are on "meta". They are drawn in
            full on every rank from the same seed: they are small, and those of one process.

    Raises:
        ModelError: as `load_critic`.
    """
    if not compute.ranks.sharded:
        return load_critic(source, adapt)
    with parameters_on_meta():
        trunk = AutoModel.from_config(source.config, dtype=torch.float32)
        head = source.empty_head()
    critic = use_tree_attention(Critic(trunk, head, source.multimodal))
    locations = _locations(critic, source)
    if adapt is not None:
        adapt(critic)
    _allocate(shard(critic, compute), compute)
    if locations is None:
        _load_from_rank_0(critic, source, compute, adapt)
        return critic
    full_head = source.empty_head()
    if source.stored_head is not None:
        source.stored_head.fill(full_head)
    for name, parameter in critic.head.named_parameters():
        copy_rows(full_head.get_parameter(name), parameter)
    for name, parameter in critic.named_parameters():
        location = locations.get(name_without_adapter(name))
        if location is not None:
            read_rows(location.file, location.name, parameter)
    refuse_not_finite(critic, source.path)
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


def _locations(critic: Critic, source: ModelSource) -> dict[str, StoredTensor] | None:
    """Critic's name of a parameter -> where it is stored; None where they do not correspond one to one."""
    placement = source.placement
    names = [name for name, _ in critic.trunk.named_parameters()]
    if any(f"{placement.prefix}{name}" not in placement.direct for name in names):
        return None
    return {f"trunk.{name}": placement.trunk[name][0] for name in names}


def _allocate(critic: Critic, compute: Compute) -> None:
    """Give every rank memory for its shards, not yet filled, and move buffers and adapters to the device."""
    drawn = {name: part for name, part in critic.state_dict().items() if ".lora_" in name}
    buffers = [
        (module, name, buffer) for module in critic.modules() for name, buffer in module.named_buffers(recurse=False)
    ]
    critic.to_empty(device="cpu" if offloads(compute.offload, "all") else compute.device)
    if drawn:
        critic.load_state_dict(drawn, strict=False)
    for module, name, buffer in buffers:
        setattr(module, name, buffer.to(compute.device))


def _load_from_rank_0(
    critic: Critic, source: ModelSource, compute: Compute, adapt: Callable[[Critic], None] | None
) -> None:
    """Rank 0 loads as one process does; the others get their shards tensor by tensor."""
    state: dict[str, Any] = {}
    if compute.ranks.is_main:
        state = load_critic(source, adapt).state_dict()
    compute.ranks.broadcast(True)  # without a time limit: loading may take longer than a collective may
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(critic, state, options=options)
