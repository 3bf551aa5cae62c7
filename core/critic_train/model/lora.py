"""LoRA adapters on every linear layer of a trunk (Hu et al. 2021, arXiv 2106.09685), through peft.

The head is trained in full beside them. A checkpoint holds the folded weights, which load anywhere, and the adapters by
themselves, from which a run goes on: folded ones cannot be taken apart again.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from critic_train.errors import ConfigError, ModelError
from critic_train.model.critic import Critic
from critic_train.run.storage import library_writes

ADAPTER_FILE = "adapter.safetensors"
ADAPTER = "default"
"""peft's name for the only adapter there is."""
BASE = ".base_layer"


def add_adapters(critic: Critic, *, rank: int, alpha: float, seed: int) -> None:
    """Put adapters beside the trunk's linear layers and freeze everything else of it.

    Args:
        critic: on the CPU; its values do not change, for an adapter starts at 0.
        rank: of each adapter's product.
        alpha: the product counts alpha / rank.
        seed: of the adapters' first matrices; the global generator is left alone.

    Raises:
        ConfigError: peft is not installed.
        ModelError: the trunk has no linear layers that peft knows.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError(
            "--train lora: the package peft is not installed", hint="pip install 'critic-train[lora]'"
        ) from None
    # peft takes a whole number there; the factor is set below.
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", lora_dropout=0.0, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, critic.trunk)
        except ValueError as error:
            raise ModelError(f"{critic.trunk.config.model_type} takes no LoRA adapters: {error}") from error
    for name, parameter in critic.trunk.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    for layer in _adapted(critic.trunk).values():
        layer.scaling[ADAPTER] = alpha / rank


def is_adapted(module: nn.Module) -> bool:
    """Whether there are adapters in it."""
    return any(".lora_" in name for name, _ in module.named_parameters())


def folded(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module with its adapters' products added in, under the names it has without them."""
    adapted = _adapted(module)
    tensors: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        if ".lora_" in name:
            continue
        place, base, last = name.partition(BASE)
        if base and last == ".weight":
            with torch.no_grad():
                tensor = tensor + adapted[place].get_delta_weight(ADAPTER)
        tensors[place + last] = tensor
    return tensors


def save_adapters(critic: Critic, directory: Path) -> None:
    """Write what is trained, adapters and head, as it is.

    Raises:
        OSError: the disk is full or not writable.
    """
    file = directory / ADAPTER_FILE
    with library_writes(file):
        save_file({name: p.detach().contiguous() for name, p in _trained(critic).items()}, file)


def load_adapters(critic: Critic, directory: Path) -> None:
    """Put back what `save_adapters` wrote.

    Raises:
        ModelError: the file is missing, or belongs to other adapters.
    """
    file = directory / ADAPTER_FILE
    if not file.is_file():
        raise ModelError(f"{directory} has no {ADAPTER_FILE}: it was not trained with --train lora")
    tensors, trained = load_file(file), _trained(critic)
    if {name: t.shape for name, t in tensors.items()} != {name: p.shape for name, p in trained.items()}:
        raise ModelError(f"{file} belongs to other adapters")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])


def _trained(critic: Critic) -> dict[str, nn.Parameter]:
    return {name: p for name, p in critic.named_parameters() if p.requires_grad}


def _adapted(module: nn.Module) -> dict[str, Any]:
    """Name -> layer, of the layers that have an adapter."""
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, "get_delta_weight")}
