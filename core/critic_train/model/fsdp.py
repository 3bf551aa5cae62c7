"""Critics sharded by FSDP2: every rank keeps one shard of each weight, its gradient and its moments.

A layer is gathered while it computes. Each decoder layer is one unit, the head and the embeddings are one each, and
the trunk takes the rest. Trunk and head are roots of their own, so that the trunk can compute hidden states alone.

Master weights and gradient sums are float32, as on one process. With `--precision bf16` a layer's weights are
gathered in bf16: its matrix products are those of autocast, which rounds the same weights to the same bf16. What
autocast leaves in float32 differs only in the layers' norm weights, which are rounded as well.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from critic_train.model.compute import Compute
from critic_train.model.critic import Critic
from critic_train.model.work_sharing import Cost
from critic_train.model_files.config import attention_width
from critic_train.settings import offloads

FULL_GRADIENT_SHARE = 0.125
"""The most of a device's memory that a full float32 gradient may take to be kept until the mini-batch's end."""

# The head's values are a view of its product; nothing here writes into them.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def shard(critic: Critic, compute: Compute) -> Critic:
    """Shard a critic over the ranks of `compute`, in place. All ranks call it; its weights may be on "meta".

    Args:
        critic: the same on every rank; one that is sharded already is left as it is. A layer at a time visits the
            device.
        compute: device, precision and ranks; with `offload` "all" the shards are in host memory.
    """
    if isinstance(critic.trunk, FSDPModule):
        return critic
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    both = _mesh_and_offload(compute)
    inner = {"mp_policy": rounded if compute.precision == "bf16" else exact, **both}
    for layer in _find_layers(critic.trunk):
        fully_shard(layer, **inner)
    # Between forward and backward these stay gathered: embeddings are not gathered twice. See `reshard`. They are a
    # unit of their own, for with cached states no tokens are embedded, and they may be most of the model.
    for part in (critic.head, critic.trunk.get_input_embeddings(), critic.trunk):
        fully_shard(part, mp_policy=exact, **both, reshard_after_forward=False)
    _sum_gradients(critic)
    return critic


def shard_alone(module: nn.Module, compute: Compute) -> None:
    """Shard a module that a critic has beside trunk and head, as these are. All ranks call it; it may be on "meta"."""
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(module, mp_policy=exact, **_mesh_and_offload(compute), reshard_after_forward=False)
    _sum_gradients(module)


def _mesh_and_offload(compute: Compute) -> dict[str, Any]:
    arguments: dict[str, Any] = {"mesh": init_device_mesh(compute.device.type, (compute.ranks.size,))}
    if offloads(compute.offload, "all"):
        arguments["offload_policy"] = CPUOffloadPolicy(pin_memory=compute.device.type == "cuda")
    return arguments


def _sum_gradients(root: nn.Module) -> None:
    """The loss is weighed over the whole mini-batch: gradients are summed over ranks, not averaged."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@contextmanager
def full_precision_params(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, sharded layers are gathered in float32, whatever they are trained in: the self-check compares to 1e-3.

    FSDP2 has no public way to change the policy of a module; what is set here is what it reads before each pass.

    Args:
        modules: roots; those that are not sharded are left as they are.
    """
    groups = [group for module in _sharded_modules(modules) for group in parameter_groups(module)]
    before = [group.mp_policy for group in groups]
    try:
        for group in groups:
            _set_policy(group, MixedPrecisionPolicy(cast_forward_inputs=False))
        yield
    finally:
        reshard(modules)
        for group, policy in zip(groups, before, strict=True):
            _set_policy(group, policy)


def parameter_groups(module: FSDPModule) -> list[Any]:
    """FSDP2's groups of parameters of a module that are gathered together: one before torch 2.13, a list since."""
    state: Any = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def _set_policy(group: Any, policy: MixedPrecisionPolicy) -> None:
    group.mp_policy = policy
    group._init_mp_dtypes()
    for parameter in group.fsdp_params:
        # Gathered before in another dtype; both are made anew when they are missing.
        parameter.all_gather_outputs = []
        vars(parameter).pop("_unsharded_param", None)


def reshard(modules: Sequence[nn.Module]) -> None:
    """Free the gathered weights that a pass without gradients has left: they would hide the shards from the optimizer.

    Args:
        modules: roots; those that are not sharded are left as they are.
    """
    for module in _sharded_modules(modules):
        module.reshard()


def can_reset_after_error(root: nn.Module) -> bool:
    """Whether `reset_after_error` works on this module: it is not sharded, or torch is 2.13 or newer."""
    return not isinstance(root, FSDPModule) or hasattr(root, "reset_iter_state")


def reset_after_error(roots: Sequence[nn.Module]) -> None:
    """Bring sharded modules back to where they stand between passes, after an error within one.

    Only on a single rank: FSDP2 waits for collectives that are under way.

    Args:
        roots: those that are not sharded are left as they are.
    """
    for root in roots:
        # torch's function fails on a root that has not run yet: the head, when the trunk's first pass failed.
        if isinstance(root, FSDPModule) and root._get_fsdp_state()._is_root is not None:
            root.reset_iter_state()


def _sharded_modules(roots: Sequence[nn.Module]) -> Iterator[FSDPModule]:
    for root in roots:
        if isinstance(root, FSDPModule):
            yield from (module for module in root.modules() if isinstance(module, FSDPModule))


def _find_layers(trunk: PreTrainedModel) -> list[nn.Module]:
    """The layers of a decoder, whatever it calls their list; none where it keeps no list of them."""
    count = trunk.config.num_hidden_layers
    lists = (module for module in trunk.modules() if isinstance(module, nn.ModuleList))
    return list(next((layers for layers in lists if len(layers) == count), []))


def set_gradient_sync(modules: Sequence[nn.Module], *, last: bool) -> None:
    """Set whether the next backward pass sums gradients over ranks, or leaves that to a later one.

    A rank that does not sum keeps the full gradient of every weight. It is kept until the last micro-batch where
    memory allows; elsewhere every micro-batch sums.

    Args:
        modules: roots of a critic; those that are not sharded are left as they are.
        last: whether this is the mini-batch's last micro-batch.
    """
    sharded = [module for module in modules if isinstance(module, FSDPModule)]
    if sharded:
        sync = last or not _full_gradient_fits(modules)
        for module in sharded:
            module.set_requires_gradient_sync(sync)


def _full_gradient_fits(modules: Sequence[nn.Module]) -> bool:
    trained: list[Any] = [p for module in modules for p in module.parameters() if p.requires_grad]
    device, mesh = trained[0].device, trained[0].device_mesh
    if device.type != mesh.device_type or mesh.size() == 1:
        return False  # the gradient is on the host, or there is no other rank
    if device.type != "cuda":
        return True
    size: int = sum(4 * parameter.numel() for parameter in trained)
    available: int = torch.cuda.get_device_properties(device).total_memory
    return size <= FULL_GRADIENT_SHARE * available


def cost_of(critic: Critic) -> Cost:
    """What a rollout costs this critic's trunk."""
    config = critic.trunk.config
    parameters = sum(p.numel() for layer in _find_layers(critic.trunk) for p in layer.parameters())
    return Cost.of(parameters, layers=config.num_hidden_layers, width=attention_width(config))
