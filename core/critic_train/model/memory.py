"""Memory options of training: activation checkpointing, compiled layers, and what a CPU keeps of freed memory."""

import ctypes
import os
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from critic_train.errors import ModelError
from critic_train.model.compute import Compute, Keeping
from critic_train.model.critic import Critic
from critic_train.model.host_memory import HostActivations
from critic_train.model.tiles import compute_at_once, compute_in_tiles
from critic_train.settings import ActivationCheckpointing

MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "_scaled_mm")
ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_flash_attention_forward",
    "_varlen_attn",
    "flex_attention",
)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt (malloc.h)."""
KEPT_BYTES, GIVEN_BACK_BYTES = 2**28, 2**20
"""What of freed memory is kept and what is given back: allocations of up to the first, and of more than the second."""
ALLOCATOR_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Have this process keep memory that tensors on the CPU give back: the next micro-batch takes as much again.

    glibc returns the end of the heap to the system whenever enough of it is free, and the next tensor takes it page by
    page: up to 20,000 page faults a step. Whoever has set one of ALLOCATOR_VARIABLES has decided already.

    Returns:
        Whether it is done: the C library is glibc, and the environment does not say otherwise.
    """
    return _set_allocator(M_MMAP_THRESHOLD, KEPT_BYTES) and _set_allocator(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> bool:
    """Have this process give the memory of large tensors on the CPU back at once, for rollouts that fill the memory.

    glibc takes allocations of up to 32 MiB from its heap once one of them was freed, and holes between those that are
    still in use stay with the process: a third more than the tensors of one long rollout cut over four ranks.

    Returns:
        As `keep_freed_memory` does.
    """
    return _set_allocator(M_MMAP_THRESHOLD, GIVEN_BACK_BYTES) and _set_allocator(M_TRIM_THRESHOLD, GIVEN_BACK_BYTES)


def _set_allocator(parameter: int, value: int) -> bool:
    if not sys.platform.startswith("linux") or any(name in os.environ for name in ALLOCATOR_VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(parameter, value))


def checkpoint_activations(critic: Critic, kind: ActivationCheckpointing, *, on_host: bool = False) -> None:
    """Have the trunk's layers keep less for the backward pass; the gradient is the same.

    Args:
        critic: in training mode.
        kind: resolved: not auto. `none` undoes what was set before; `layer` keeps the input of each layer;
            `selective` also attention and every other matrix product, as torchtitan does; `tiles` what `none` keeps
            but for MLPs and norms (see `tiles`), and `layer-tiles` what `layer` keeps, with the same at work within a
            layer.
        on_host: what `layer` and `layer-tiles` keep waits in host memory.

    Raises:
        ModelError: the architecture cannot.
    """
    if kind in ("tiles", "layer-tiles"):
        if not compute_in_tiles(critic):
            raise ModelError(
                f"{critic.trunk.config.model_type} has no part that can be computed in tiles of positions",
                hint="--activation-checkpointing layer or none",
            )
    else:
        compute_at_once(critic.trunk)
    if kind in ("none", "tiles"):
        if any(getattr(module, "gradient_checkpointing", False) for module in critic.trunk.modules()):
            disable: Any = getattr(
                critic.trunk, "activation_checkpointing_disable", critic.trunk.gradient_checkpointing_disable
            )
            disable()
        return
    keep = {"context_fn": _keeping_half} if kind == "selective" else {}
    enable: Any = getattr(critic.trunk, "activation_checkpointing_enable", critic.trunk.gradient_checkpointing_enable)
    try:
        enable({"use_reentrant": False, **keep})
    except ValueError as error:
        raise ModelError(
            f"{critic.trunk.config.model_type} has no activation checkpointing",
            hint="--activation-checkpointing none, and a lower --max-tokens where memory is short",
        ) from error
    if on_host:
        host = HostActivations(critic.device)
        for module in critic.trunk.modules():
            again: Any = getattr(module, "_gradient_checkpointing_func", None)
            if again is not None:
                module._gradient_checkpointing_func = partial(host.around, again)


def set_keeping(critic: Critic, compute: Compute, keeping: Keeping) -> None:
    """Set how much a critic keeps for its backward pass, and note it in `compute`; see `checkpoint_activations`."""
    checkpoint_activations(critic, keeping.kind, on_host=keeping.on_host)
    compute.keep(keeping)


def compile_layers(critic: Critic) -> None:
    """Compile every layer for any number of tokens; attention stays outside.

    A last layer whose forward was replaced stays as it is. What is computed again is compiled from the inside: a
    checkpoint that is compiled as a whole must be one graph, and attention would leave all of it uncompiled.
    """
    compiled: dict[Any, Any] = {}
    for module in critic.trunk.modules():
        if isinstance(module, GradientCheckpointingLayer) and "forward" not in vars(module):
            if module.gradient_checkpointing:
                again: Any = module._gradient_checkpointing_func
                module._gradient_checkpointing_func = partial(_checkpointed, again, compiled)
            else:
                module.compile(dynamic=True)


def leave_uncompiled(critic: Critic) -> None:
    """Undo `compile_layers`, but for what is computed again: `checkpoint_activations` sets that anew."""
    for module in critic.trunk.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._compiled_call_impl = None


def _checkpointed(checkpoint: Callable[..., Any], compiled: dict[Any, Any], layer: "partial[Any]", *args: Any) -> Any:
    """A layer's forward, compiled once for all layers of its kind, within its checkpoint."""
    if layer.func not in compiled:
        compiled[layer.func] = torch.compile(layer.func, dynamic=True)
    return checkpoint(partial(compiled[layer.func], *layer.args, **layer.keywords), *args)


def _keeping_half() -> Any:
    seen: Counter[bool] = Counter()

    def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        name = getattr(operator, "__name__", str(operator)).split(".")[0]
        if name in MATRIX_PRODUCTS:
            seen[context.is_recompute] += 1
            if seen[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        elif name in ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
