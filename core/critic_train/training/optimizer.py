"""Fused AdamW on float32 master weights, and learning rates that depend on the step alone."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from critic_train.errors import ModelError, first_line
from critic_train.model.critic import Critic
from critic_train.model_files.gather import Gather, full_tensor
from critic_train.model_files.tensor_file import read_rows, write_tensors
from critic_train.run.storage import library_writes
from critic_train.settings import Offload, OptimizerKind, Schedule, offloads
from critic_train.training.eight_bit import CODES, PARTS, AdamWOfParts, gathered_state, in_8_bits, stored_state
from critic_train.training.host_adamw import MOMENTS, HostAdamW

STATE_FILE = "optimizer.safetensors"


def build_optimizer(
    critic: Critic,
    *,
    lr: float,
    head_lr: float,
    next_token_lr: float | None = None,
    weight_decay: float,
    kind: OptimizerKind = "adamw",
    offload: Offload = "none",
    return_scale: float = 1.0,
) -> torch.optim.Optimizer:
    """AdamW over trunk and head; matrices of trunk and next-token head decay, vectors and the head do not.

    Args:
        critic: on its device.
        lr: peak learning rate of the trunk.
        head_lr: peak learning rate of the head.
        next_token_lr: peak learning rate of the next-token head, where there is one; `lr` by default.
        weight_decay: decoupled decay of the trunk's matrices (Loshchilov & Hutter 2019).
        kind: moments in float32, or in 8 bits a number (Dettmers et al. 2022, arXiv 2110.02861) by bitsandbytes.
        offload: what is kept in host memory; the result is the same.
        return_scale: of the returns, by which the head's weights move more; see `train_step`.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    trunk = [p for p in critic.trunk.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trunk if p.ndim >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trunk if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
        {"params": list(critic.head.parameters()), "lr": head_lr, "weight_decay": 0.0},
    ]
    if critic.next_token_head is not None:
        beside = {"params": [critic.next_token_head.weight], "lr": next_token_lr or lr, "weight_decay": weight_decay}
        groups.insert(2, beside)
    for group in groups:
        group["peak_lr"], group["lr_scale"] = group["lr"], 1.0
    groups[-1]["lr_scale"] = return_scale
    groups = [group for group in groups if group["params"]]
    if kind != "adamw":
        return in_8_bits(groups)
    return HostAdamW(groups) if offloads(offload, "optimizer") else torch.optim.AdamW(groups, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group to its peak times `factor`, the head's in units of the returns.

    Returns:
        The trunk's learning rate, or where the head alone is trained the head's, as the user wrote it.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor * group["lr_scale"]
    return float(optimizer.param_groups[0]["peak_lr"] * factor)


def schedule_factor(schedule: Schedule, step: int, *, total_steps: int, warmup_steps: int) -> float:
    """The share of the peak learning rate at a step, a pure function of its arguments.

    Args:
        schedule: the shape after the warm-up; linear and cosine end at 0, one step after the last.
        step: steps taken so far, 0 for the first.
        total_steps: steps of the whole run.
        warmup_steps: steps over which the rate rises linearly; the first step already moves.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def save_optimizer(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, torch.nn.Parameter],
    directory: Path | None,
    gather: Gather | None = None,
) -> None:
    """Write both moments of every parameter, and the step count, as safetensors; in 8 bits, their scales as well.

    Args:
        optimizer: of a critic.
        named: the critic's parameters by name; their names are those of the moments.
        directory: where the file goes; None on ranks other than 0.
        gather: how full tensors are made of moments that are sharded, all ranks calling this; None on one process.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in named.items():
        state = optimizer.state.get(parameter, {})
        if state and isinstance(optimizer, AdamWOfParts):
            state = gathered_state(state, parameter, gather or full_tensor)
        for key, value in state.items():
            tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
            if key in CODES:
                tensor = tensor.clone()  # one for all parameters, which the format does not know
            tensors[f"{key}.{name}"] = tensor.reshape(1) if tensor.ndim == 0 else tensor.contiguous()
    file = None if directory is None else directory / STATE_FILE
    if gather is not None:
        mesh: Any = getattr(next(iter(named.values())), "device_mesh", None)
        metadata = {PARTS: str(mesh.size())} if isinstance(optimizer, AdamWOfParts) else None
        write_tensors(file, tensors, lambda name: gather(tensors[name]), metadata)
        return
    assert file is not None
    with library_writes(file):
        save_file(tensors, file)


def load_optimizer(optimizer: torch.optim.Optimizer, critic: Critic, directory: Path) -> None:
    """Put back what `save_optimizer` wrote, on any number of ranks; each reads its own part only.

    Raises:
        ModelError: the file belongs to another model.
    """
    file = directory / STATE_FILE
    with safe_open(file, framework="pt") as stored:
        names = set(stored.keys())
    for name, parameter in critic.named_parameters():
        if not parameter.requires_grad:
            continue
        if f"step.{name}" not in names:
            if names:
                raise ModelError(f"{file} holds no state of {name}: it belongs to another model")
            continue
        try:
            optimizer.state[parameter] = _stored(optimizer, parameter, file, name, names)
        except (RuntimeError, SafetensorError) as error:
            first = first_line(error)
            raise ModelError(f"{file}: the moments of {name} do not fit this model: {first}") from error


def _stored(
    optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, file: Path, name: str, names: set[str]
) -> dict[str, Any]:
    """One parameter's state as its optimizer keeps it."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return stored_state(file, name, names, parameter)
    state = _new_state(optimizer, parameter)
    for key, tensor in state.items():
        read_rows(file, f"{key}.{name}", tensor)
    return state


def _new_state(optimizer: torch.optim.AdamW, parameter: torch.nn.Parameter) -> dict[str, Any]:
    """What fused AdamW begins with: a step count beside the parameter, 0-d float32, and two moments."""
    if isinstance(optimizer, HostAdamW):
        return optimizer.new_state(parameter)
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step} | {name: torch.zeros_like(parameter, requires_grad=False) for name in MOMENTS}
