"""Give every rank its part of a model directory's weights, read from the files by itself.

A safetensors file can be read row by row, and FSDP2 cuts weights by rows: so each rank reads its own rows and no
others, and no process ever holds the whole model. Where the names in the files are not those of the trunk (a
mixture of experts that transformers keeps in another form), rank 0 loads the directory whole in host memory and
hands the parts out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import AutoModel

from critic_train.distributed.sharding import shard
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic, ValueHead
from critic_train.model.loading import ModelSource, load_critic, weight_files, with_forest_attention
from critic_train.model.lora import name_without_adapter
from critic_train.model.tensor_file import read_rows

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
    critic = with_forest_attention(Critic(trunk, head))
    places = _places(critic, source)
    if adapt is not None:
        adapt(critic)
    _materialise(shard(critic, compute), compute)
    if places is None:
        _from_rank_0(critic, source, compute, adapt)
        return critic
    critic.head.start_at(0.0)
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
