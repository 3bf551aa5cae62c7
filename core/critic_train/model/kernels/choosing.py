"""Which kernel computes attention: what was asked for, or the best that this device has and that is right on it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from critic_train.errors import ConfigError, MachineError
from critic_train.model.forest import Forest
from critic_train.model.kernels import pieces, varlen
from critic_train.model.kernels.flex import Flex
from critic_train.model.kernels.queries import Kernel, Queries, all_queries
from critic_train.model.kernels.segments import Segments
from critic_train.model.kernels.varlen import Varlen
from critic_train.settings import Attention, Precision

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest error allowed against scaled-dot-product attention, in norms."""


def kernel_of(name: Attention, queries: Queries, device: torch.device, *, windowed: bool) -> Kernel:
    """The kernel of a resolved `--attention` for some queries.

    Args:
        name: sdpa, flex or varlen.
        queries: who asks.
        device: where the trunk is.
        windowed: whether it will be called with a window that cuts.
    """
    if name == "flex":
        return Flex(queries, device)
    if name == "varlen":
        return Varlen(queries, device)
    if pieces.available(device) and not windowed:
        return pieces.Pieces(queries)
    return Segments(queries, device)


def candidates(wanted: Attention, device: torch.device, precision: Precision) -> list[Attention]:
    """What to try for `--attention`, best first.

    `auto` is sdpa on a CPU: FlexAttention has no backward pass there, and variable-length attention does not exist.
    On CUDA it is varlen in bf16 (flash attention's kernels, which reach more of the device than FlexAttention's do, at
    the price of one copy of each path's keys), flex in float32, which varlen cannot do, and sdpa where they are wrong.

    Raises:
        ConfigError: what was asked for does not exist for this device or precision.
    """
    on_cuda = device.type == "cuda"
    if wanted == "flex" and not on_cuda:
        raise ConfigError(
            "--attention flex needs a CUDA device: FlexAttention cannot be differentiated on a CPU",
            hint="--attention auto takes what the device has",
        )
    if wanted == "varlen" and (not varlen.available(device) or precision != "bf16"):
        raise ConfigError(
            f"--attention varlen needs --precision bf16 and a CUDA device of compute capability 8.0 or more, not "
            f"{precision} on {device}",
            hint="--attention auto takes what the device has",
        )
    if wanted != "auto":
        return [wanted]
    if not on_cuda:
        return ["sdpa"]
    return ["varlen", "flex", "sdpa"] if precision == "bf16" and varlen.available(device) else ["flex", "sdpa"]


def choose_attention(
    wanted: Attention, forest: Forest, device: torch.device, precision: Precision
) -> tuple[Attention, list[str]]:
    """The kernel to use, tried on a forest of the data at hand against torch's scaled-dot-product attention.

    Args:
        wanted: `--attention`.
        forest: a small layout with branches.
        device: where the trunk is.
        precision: what the trunk computes in.

    Returns:
        (sdpa, flex or varlen; why better ones were passed over, in sentences).

    Raises:
        ConfigError: see `candidates`.
        MachineError: what was asked for is wrong or fails here.
    """
    passed: list[str] = []
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for name in candidates(wanted, device, precision):
        fault = "" if name == "sdpa" else fault_of(partial(_whole, name, device), forest, device, dtype)
        if not fault:
            return name, passed
        passed.append(f"--attention {name} is not used: {fault}")
    raise MachineError(passed[-1], hint="--attention auto takes what is right on this device")


def fault_of(make: Callable[[Queries], Kernel], forest: Forest, device: torch.device, dtype: torch.dtype) -> str:
    """What is wrong with a kernel's output or gradients on a forest, held against Segments; empty where nothing is."""
    queries = all_queries(forest)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, len(forest), HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    *inputs, slope = drawn
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def run(kernel: Kernel) -> list[Tensor]:
        output = kernel(inputs[0], inputs[1], inputs[2], None, None)
        return [output, *torch.autograd.grad(output, inputs, slope.transpose(1, 2))]

    expected = run(Segments(queries, device))
    try:
        found = run(make(queries))
    except Exception as error:  # a kernel that does not run here raises anything
        return f"it fails on {device}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    errors = [
        float((one.float() - other.float()).norm() / other.float().norm())
        for one, other in zip(found, expected, strict=True)
    ]
    if max(errors) <= TOLERANCE[dtype]:
        return ""
    return f"it differs from scaled-dot-product attention by {max(errors):.1e} on {device}"


def _whole(name: Attention, device: torch.device, queries: Queries) -> Kernel:
    return kernel_of(name, queries, device, windowed=False)
