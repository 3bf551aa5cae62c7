"""LoRA adapters on every linear layer of a trunk (Hu et al. 2021, arXiv 2106.09685), through peft.

The head is trained in full beside them. A checkpoint holds the merged weights, which load anywhere, and the adapters by
themselves, with which a run is resumed: merged weights cannot be taken apart again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from critic_train.errors import ConfigError, ModelError
from critic_train.model.critic import Critic
from critic_train.model.tensor_file import read_rows, write_tensors

ADAPTER_FILE = "adapter.safetensors"
ADAPTER = "default"
"""peft's name for the first adapter of a model."""
BASE = ".base_layer"
"""peft's name for the layer that an adapter wraps."""


def _identity(tensor: Tensor) -> Tensor:
    """The `gather` of one process: its tensors are not sharded."""
    return tensor


def add_adapters(critic: Critic, *, rank: int, alpha: float, seed: int) -> None:
    """Add adapters to the trunk's linear layers and freeze the rest of the trunk.

    Args:
        critic: not sharded, on the CPU or on "meta" (its adapters are on the CPU then as well, and the same); its
            values do not change, because the second matrix of an adapter starts at 0.
        rank: of each adapter's product.
        alpha: the product is scaled by alpha / rank.
        seed: of the adapters' first matrices; the global generator is left alone.

    Raises:
        ConfigError: peft is not installed.
        ModelError: the trunk has no linear layers that peft supports.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError(
            "--train lora: the package peft is not installed", hint="pip install 'critic-train[lora]'"
        ) from None
    # peft's lora_alpha is an int; the scaling is set below.
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", lora_dropout=0.0, bias="none")
    with torch.random.fork_rng(devices=[]), _meta_weights_on_cpu(critic.trunk):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, critic.trunk)
        except ValueError as error:
            raise ModelError(f"{critic.trunk.config.model_type} takes no LoRA adapters: {error}") from error
    for name, parameter in critic.trunk.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    for layer in _adapted_layers(critic.trunk).values():
        layer.scaling[ADAPTER] = alpha / rank


@contextmanager
def _meta_weights_on_cpu(trunk: nn.Module) -> Iterator[None]:
    """Inside, weights on "meta" are replaced by expanded zeros on the CPU, which take no memory.

    peft draws an adapter on the CPU and then moves it to the device of its layer: on "meta" it would be lost.
    """
    on_meta = [
        (module, name, parameter)
        for module in trunk.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    ]
    for module, name, parameter in on_meta:
        setattr(module, name, nn.Parameter(torch.zeros(()).expand(parameter.shape)))
    try:
        yield
    finally:
        for module, name, parameter in on_meta:
            setattr(module, name, parameter)


def has_adapters(module: nn.Module) -> bool:
    """Whether a module has LoRA adapters."""
    return any(".lora_" in name for name, _ in module.named_parameters())


def name_without_adapter(name: str) -> str:
    """The name that a frozen tensor has in a model without adapters."""
    return name.replace(f"{BASE}.", ".")


class Adapter(NamedTuple):
    """The matrices of one adapter, and how their product is added to a weight.

    Attributes:
        b: [out, rank].
        a: [rank, in].
        transposed: whether the weight is [in, out], as GPT-2's are.
        factor: alpha / rank.
    """

    b: Tensor
    a: Tensor
    transposed: bool
    factor: float

    @classmethod
    def of(cls, layer: Any) -> "Adapter":
        """The adapter of a peft layer."""
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        return cls(b, a, bool(layer.fan_in_fan_out), float(layer.scaling[ADAPTER]))


def mergeable_tensors(module: nn.Module) -> dict[str, tuple[Tensor, Adapter | None]]:
    """Name without adapters -> (tensor, the adapter that `merge_adapter` adds to it, if any), in the module's order."""
    adapted = _adapted_layers(module)
    pairs: dict[str, tuple[Tensor, Adapter | None]] = {}
    for name, tensor in module.state_dict().items():
        if ".lora_" not in name:
            layer, base, last = name.partition(BASE)
            pairs[layer + last] = (tensor, Adapter.of(adapted[layer]) if base and last == ".weight" else None)
    return pairs


def merge_adapter(tensor: Tensor, adapter: Adapter | None, gather: Callable[[Tensor], Tensor] = _identity) -> Tensor:
    """A tensor with its adapter added: W + alpha / rank * B A.

    Args:
        tensor: from `mergeable_tensors`.
        adapter: the one beside it there.
        gather: gives the full tensor of one that is sharded over ranks; all ranks call this function.
    """
    tensor = gather(tensor)
    if adapter is None:
        return tensor
    with torch.no_grad():
        product = gather(adapter.b) @ gather(adapter.a)
        return tensor + (product.T if adapter.transposed else product) * adapter.factor


def merged_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module with its adapters merged, under the names it has without them."""
    return {name: merge_adapter(*pair) for name, pair in mergeable_tensors(module).items()}


def save_adapters(
    trained: dict[str, nn.Parameter], directory: Path | None, gather: Callable[[Tensor], Tensor] = _identity
) -> None:
    """Write what is trained, adapters and head, without merging.

    Args:
        trained: from `trained_parameters`.
        directory: of the file; None on ranks other than 0.
        gather: as in `merge_adapter`.

    Raises:
        OSError: the disk is full or not writable.
    """
    file = None if directory is None else directory / ADAPTER_FILE
    write_tensors(file, dict(trained), lambda name: gather(trained[name].detach()))


def load_adapters(critic: Critic, directory: Path) -> None:
    """Read what `save_adapters` wrote into a critic, on any number of ranks; each reads its own rows alone.

    Raises:
        ModelError: the file is missing, or belongs to other adapters.
    """
    file = directory / ADAPTER_FILE
    if not file.is_file():
        raise ModelError(f"{directory} has no {ADAPTER_FILE}: it was not trained with --train lora")
    trained = trained_parameters(critic)
    with safe_open(file, framework="pt") as stored:
        shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    if shapes != {name: list(p.shape) for name, p in trained.items()}:
        raise ModelError(f"{file} belongs to other adapters")
    for name, parameter in trained.items():
        read_rows(file, name, parameter)


def trained_parameters(critic: Critic) -> dict[str, nn.Parameter]:
    """Name -> parameter, of those that are trained."""
    parts = {"trunk": critic.trunk, "head": critic.head}
    named = ((f"{part}.{name}", p) for part, module in parts.items() for name, p in module.named_parameters())
    return {name: p for name, p in named if p.requires_grad}


def _adapted_layers(module: nn.Module) -> dict[str, Any]:
    """Name -> layer, of the layers that have an adapter."""
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, "get_delta_weight")}
