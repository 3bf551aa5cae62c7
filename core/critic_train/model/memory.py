"""What to do about memory: compute activations again instead of keeping them, and go on when it runs out."""

import gc
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from critic_train.errors import MachineError, ModelError
from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.rollouts import Rollouts
from critic_train.settings import ActivationCheckpointing, TrainComputeSettings
from critic_train.text import format_bytes

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

T = TypeVar("T")


def apply_memory_options(critic: Critic, settings: TrainComputeSettings) -> None:
    """Set a critic up for training as the settings say, once its packing is chosen.

    Raises:
        ModelError: see `checkpoint_activations`.
    """
    checkpoint_activations(critic, settings.activation_checkpointing)
    if settings.compile:
        compile_layers(critic)


def checkpoint_activations(critic: Critic, kind: ActivationCheckpointing) -> None:
    """Have the trunk's layers keep less for the backward pass; the gradient is the same.

    Args:
        critic: in training mode.
        kind: `layer` keeps the input of each layer; `selective` also attention and every other matrix product, as
            torchtitan does.

    Raises:
        ModelError: the architecture cannot.
    """
    if kind == "none":
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


def with_oom_retry(attempt: Callable[[], T], rollouts: Rollouts, compute: Compute, critic: Critic) -> T:
    """Do something micro-batch by micro-batch; where memory runs out, do it again from the start with half of them.

    Args:
        attempt: what to do, by `compute.max_tokens`. It may leave gradients behind when it fails. Of several ranks
            all do it together and end it with an exchange; where one runs out, all do it again.
        rollouts: what it goes through.
        compute: its `max_tokens` is halved for good, down to the longest rollout.
        critic: its gradients are cleared before another attempt.

    Raises:
        MachineError: a single rollout is too much.
    """
    ranks = compute.ranks
    while True:
        ranks.attempting()
        try:
            return attempt()
        except Exception as error:
            fault = ranks.ran_out(error, here=is_out_of_memory(error))
            if fault is None:
                raise
        # Outside of `except`, the traceback no longer holds what was allocated. All ranks come to the same numbers.
        longest, tokens = int(rollouts.lengths.max()), len(rollouts.input_ids)
        if min(compute.max_tokens, tokens) <= longest:
            raise _too_long(longest, critic, compute, fault)
        compute.max_tokens = max(longest, min(compute.max_tokens, -(-tokens // ranks.size)) // 2)
        ranks.meet_again()
        critic.zero_grad(set_to_none=True)
        release_memory(compute.device)


def release_memory(device: torch.device) -> None:
    """Give back what an attempt that ran out has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def activation_bytes(trunk: nn.Module, tokens: int, compute: Compute) -> int:
    """About what the backward pass of a gated decoder keeps of some tokens, without activation checkpointing.

    A layer keeps its residual stream twice in float32; and in the compute precision both normed states, queries, keys,
    values and the attention's output (about 6 hidden_size), and gate, up, activation and product of the MLP.
    """
    config: Any = trunk.config
    width = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", 4 * width))
    size = 2 if compute.precision == "bf16" else 4
    return tokens * int(config.num_hidden_layers) * (2 * 4 * width + size * (6 * width + 4 * inner))


def _too_long(tokens: int, critic: Critic, compute: Compute, fault: str) -> MachineError:
    parameters = sum(p.numel() for p in critic.parameters())
    static, activations = 16 * parameters // compute.ranks.size, activation_bytes(critic.trunk, tokens, compute)
    room = ""
    if compute.device.type == "cuda":
        room = f"; {compute.device} has {format_bytes(torch.cuda.mem_get_info(compute.device)[1])}"
    return MachineError(
        f"memory ran out on a single rollout of {tokens:,} tokens: weights, gradients and moments take about "
        f"{format_bytes(static)} and its activations {format_bytes(activations)}{room}\n{fault.strip()[:200]}".rstrip(),
        hint="--activation-checkpointing layer, --precision bf16, a smaller model, or leave such rollouts out",
    )
