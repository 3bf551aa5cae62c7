"""The choice among the kernels of attention, by what each gives on the device at hand."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from critic_train.errors import ConfigError, MachineError, first_line
from critic_train.layers.attention import KERNELS, BuildKernel, TreeAttention
from critic_train.layers.attention_kernel import AttentionCall, Kernel, KernelLacksError, Queries, all_queries
from critic_train.layers.prefix_tree import TreeLayout
from critic_train.layers.sdpa_kernels import SdpaKernel
from critic_train.settings import Attention, Precision


def kernels_to_try(wanted: Attention, device: torch.device, precision: Precision) -> list[Attention]:
    """The kernels that `--attention` allows on a device, best first.

    Raises:
        ConfigError: the kernel that is asked for does not support the device or the precision.
    """
    if wanted == "auto":
        return [name for name, entry in KERNELS.items() if entry.supports(device, precision)]
    entry = KERNELS[wanted]
    if not entry.supports(device, precision):
        raise ConfigError(
            f"--attention {wanted} needs {entry.needs}, not {precision} on {device}",
            hint="--attention auto takes what the device has",
        )
    return [wanted]


def choose_attention(
    wanted: Attention,
    calls: Iterable[AttentionCall],
    layout: TreeLayout,
    device: torch.device,
    precision: Precision,
) -> tuple[Attention, list[str]]:
    """The kernel to use, after a comparison with scaled-dot-product attention on a layout of the data at hand.

    Args:
        wanted: `--attention`.
        calls: what the layers of the trunk ask for, without repetition.
        layout: a small layout with branches.
        device: where the trunk is.
        precision: what the trunk computes in.

    Returns:
        (the name of the kernel, not auto; why better ones are not used, in sentences).

    Raises:
        ConfigError: see `kernels_to_try`.
        MachineError: the kernel that is asked for computes something else or fails here.
    """
    notices: list[str] = []
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for name in kernels_to_try(wanted, device, precision):
        errors = (
            [] if name == "sdpa" else [kernel_error(KERNELS[name].build, call, layout, device, dtype) for call in calls]
        )
        if not any(errors):
            return name, notices
        notices.append(f"--attention {name} is not used: {next(filter(None, errors))}")
    raise MachineError(notices[-1], hint="--attention auto takes what is right on this device")


ROUNDINGS, SMALLEST_TOLERANCE = 4.0, 1e-5
"""A kernel may be off by so many times what scaled-dot-product attention is off by rounding in the same dtype, and by
so much more. Both are norms of differences, relative to the norm of what is exact."""


def kernel_error(
    build: BuildKernel, call: AttentionCall, layout: TreeLayout, device: torch.device, dtype: torch.dtype
) -> str:
    """What is wrong with the output or the gradients of a kernel on random tensors; empty if they are SdpaKernel's.

    Args:
        build: makes the kernel.
        call: heads, their sizes and what else a layer asks for; a window or chunk is shortened until it cuts.
        layout: all its positions are queries.
        device: where the kernel runs.
        dtype: of query, key and value.
    """
    queries = all_queries(layout)
    third = max(1, int(layout.depth.max()) // 3)
    scoring = replace(
        call.scoring,
        window=None if call.scoring.window is None else min(call.scoring.window, third),
        chunk=None if call.scoring.chunk is None else min(call.scoring.chunk, third),
    )
    generator = torch.Generator().manual_seed(0)
    sizes = ((call.heads, call.key_size), (call.kv_heads, call.key_size), (call.kv_heads, call.value_size))
    drawn = [torch.randn((1, heads, len(layout), size), generator=generator) for heads, size in sizes]
    if call.has_sinks:
        drawn.append(torch.randn(call.heads, generator=generator))
    slope = torch.randn((1, len(layout), call.heads, call.value_size), generator=generator)

    def output_and_gradients(build: BuildKernel, exactly: torch.dtype) -> list[Tensor]:
        attend = TreeAttention(queries, device, build)
        inputs = [tensor.to(device, dtype).to(exactly).requires_grad_() for tensor in drawn]
        query, key, value, *sinks = inputs
        output = attend(query, key, value, replace(scoring, sinks=sinks[0] if sinks else None))
        return [output, *torch.autograd.grad(output, inputs, slope.to(device, dtype).to(exactly))]

    exact = output_and_gradients(_plain_sdpa, torch.float64)
    try:
        actual = output_and_gradients(build, dtype)
    except KernelLacksError as error:
        return str(error)
    except Exception as error:  # a kernel that does not run here raises anything
        return f"it fails on {device}: {first_line(error)}"
    rounding = max(map(_relative, output_and_gradients(_plain_sdpa, dtype), exact))
    off = max(map(_relative, actual, exact))
    if off <= ROUNDINGS * rounding + SMALLEST_TOLERANCE:
        return ""
    return f"it is off by {off:.1e} on {device}, where scaled-dot-product attention is off by {rounding:.1e} in {dtype}"


def _plain_sdpa(queries: Queries, device: torch.device, softcapped: bool) -> Kernel:
    return SdpaKernel(queries, device)


def _relative(actual: Tensor, exact: Tensor) -> float:
    return float(((actual.double() - exact).norm() / exact.norm()).detach())
