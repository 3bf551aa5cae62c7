"""LoRA adapters on the linear layers of a trunk (Hu et al. 2021, arXiv 2106.09685), through peft.

Experts that transformers keeps in one tensor are left out: an adapter of such a tensor makes a product of its size for
all experts in every pass, and peft adapts it in some architectures and not in others. `adapter_notice` says what is
adapted. The head is trained in full beside the adapters.

A checkpoint holds the merged weights, which load anywhere, and the adapters by themselves, with which a run is resumed:
merged weights cannot be taken apart again.
"""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from critic_train.errors import ConfigError, ModelError
from critic_train.events import Notice
from critic_train.model.critic import Critic
from critic_train.model_files.tensor_file import read_rows, write_tensors

ADAPTER_FILE = "adapter.safetensors"
ADAPTER = "default"
"""peft's name for the first adapter of a model."""
BASE = ".base_layer"
"""peft's name for the layer that an adapter wraps."""
HOLDER = "trunk"
NUMBERED = re.compile(r"^.*?\.\d+\.")
"""What stands before the name of a tensor inside its layer."""


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
        raise ConfigError("--train lora: the package peft is not installed", hint="pip install peft") from None
    # peft's lora_alpha is an int; the scaling is set below.
    targets = [f"{HOLDER}.{name}" for name in _linear_layers(critic.trunk)]
    if not targets:
        raise ModelError(f"{critic.trunk.config.model_type} takes no LoRA adapters: it has no linear layers")
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, lora_dropout=0.0, bias="none")
    # Where peft sees a transformers model, it takes names like gate_proj for those of fused experts, and adapts those
    # in place of the linear layers that were named. In a module of another class it takes names as they are.
    holder = nn.Module()
    holder.add_module(HOLDER, critic.trunk)
    with torch.random.fork_rng(devices=[]), _meta_weights_on_cpu(critic.trunk):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, holder)
        except ValueError as error:
            raise ModelError(f"{critic.trunk.config.model_type} takes no LoRA adapters: {error}") from error
    for name, parameter in critic.trunk.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    for layer in _adapted_layers(critic.trunk).values():
        layer.scaling[ADAPTER] = alpha / rank


def _linear_layers(trunk: nn.Module) -> list[str]:
    """Names of the layers that get an adapter: those that compute a linear map and nothing else.

    A router that is a linear layer with a forward of its own gives more than one tensor. The fused kernels of Mamba
    read the weight of its last projection without calling the layer, so an adapter there would do nothing.
    """
    forwards = (nn.Linear.forward, Conv1D.forward)
    names = []
    for name, module in trunk.named_modules():
        parent, _, last = name.rpartition(".")
        by_weight = last == "out_proj" and hasattr(trunk.get_submodule(parent), "A_log")
        if isinstance(module, nn.Linear | Conv1D) and type(module).forward in forwards and not by_weight:
            names.append(name)
    return names


def adapter_notice(critic: Critic) -> Iterator[Notice]:
    """What of a trunk has adapters, and which matrices have none, if it has any adapters."""
    adapted = _adapted_layers(critic.trunk)
    if not adapted:
        return
    wrapped = {f"{name}{BASE}.weight" for name in adapted}
    embeddings = {f"{name}.weight" for name, module in critic.trunk.named_modules() if isinstance(module, nn.Embedding)}
    others: dict[str, int] = {}
    total = 0
    for name, part in critic.trunk.named_parameters():
        if ".lora_" in name:
            continue
        total += part.numel()
        if part.dim() > 1 and name not in wrapped | embeddings:
            kind = NUMBERED.sub("", name)
            others[kind] = others.get(kind, 0) + part.numel()
    kinds = sorted({name.rpartition(".")[2] for name in adapted})
    message = f"LoRA: {len(adapted)} linear layers have adapters ({', '.join(kinds)})"
    if others:
        share = 100 * sum(others.values()) / total
        message += f"; without any, and not trained: {', '.join(sorted(others))} ({share:.0f} % of the trunk's numbers)"
    yield Notice(message=message)


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
        raise ModelError(
            f"{file} belongs to other adapters: {_difference(shapes.keys(), trained.keys())}",
            hint="an earlier critic-train gave adapters to experts of some architectures: begin such a run anew",
        )
    for name, parameter in trained.items():
        read_rows(file, name, parameter)


def _difference(stored: Collection[str], expected: Collection[str]) -> str:
    """What sets two sets of names apart, the first of each."""
    more, fewer = sorted(set(stored) - set(expected)), sorted(set(expected) - set(stored))
    parts = [
        f"{len(names)} {what}, {names[0]} first" for names, what in ((more, "too many"), (fewer, "missing")) if names
    ]
    return " and ".join(parts) or "their shapes differ"


def trained_parameters(critic: Critic) -> dict[str, nn.Parameter]:
    """Name -> parameter, of those that are trained."""
    parts = {"trunk": critic.trunk, "head": critic.head}
    named = ((f"{part}.{name}", p) for part, module in parts.items() for name, p in module.named_parameters())
    return {name: p for name, p in named if p.requires_grad}


def _adapted_layers(module: nn.Module) -> dict[str, Any]:
    """Name -> layer, of the layers that have an adapter."""
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, "get_delta_weight")}
