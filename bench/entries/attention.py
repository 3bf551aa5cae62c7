"""Attention alone, forward and backward, by every kernel that the device has, on one prompt and its responses.

On CUDA in bf16, with the heads of Qwen2.5-0.5B, a prompt of 1,024 and eight responses of 1,024; on a CPU in float32 and
smaller. `flat` is what packing without sharing does: every rollout whole, by the same kernel.
"""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.drawing import Shape, draw
from bench.entry import Options, Table
from bench.measuring import in_turn, ratio
from critic_train.layers.attention_kernel import PLAIN, Kernel, all_queries
from critic_train.layers.cuda_kernels import FlexKernel, VarlenKernel, varlen_available
from critic_train.layers.prefix_tree import PrefixOrder, TreeLayout, build_tree_layout, prefix_order
from critic_train.layers.sdpa_kernels import CpuFlashKernel, SdpaKernel, cpu_flash_available
from critic_train.rollouts import Rollouts

NAME = "attention"
TITLE = "Attention on a forest, forward and backward"
DEVICES = ("cpu", "cuda")

HEADS, KV_HEADS, HEAD_DIM = 14, 2, 64


def run(options: Options) -> Table:
    """Time them in turn and hold each against scaled-dot-product attention."""
    on_cuda = options.device.type == "cuda"
    length = 1024 if on_cuda and not options.quick else 32 if options.quick else 256
    rollouts = draw(Shape("", length, length, length))
    dtype = torch.bfloat16 if on_cuda else torch.float32
    shared = build_tree_layout(rollouts, prefix_order(rollouts))
    flat = build_tree_layout(rollouts, unshared(rollouts))
    passes: dict[str, Callable[[], list[torch.Tensor]]] = {}
    for name, forest in (("forest", shared), ("flat", flat)):
        tensors = drawn(rollouts, forest, options.device, dtype)
        for kernel_name, kernel in kernels(forest, options.device).items():
            passes[f"{kernel_name}, {name}"] = one_pass(kernel, tensors)
    seconds = in_turn(passes, options.rounds, options.device)
    reference = {name: passes[f"segments, {name}"]() for name in ("forest", "flat")}
    fastest_flat = min((name for name in passes if name.endswith("flat")), key=lambda n: statistics.median(seconds[n]))
    table = Table(columns={"kernel": "", "ms": ".2f", "flat/this": ".2f", "relative error": ".1e"})
    for name, times in seconds.items():
        table.rows.append(
            {
                "kernel": name,
                "ms": 1e3 * statistics.median(times),
                "flat/this": ratio(seconds[fastest_flat], times),
                "relative error": largest_error(passes[name](), reference[name.rsplit(", ", 1)[1]]),
            }
        )
    table.notes = [
        f"prompt {length}, 8 responses of {length}, {HEADS} heads, {KV_HEADS} key heads, {dtype}; {len(flat):,} "
        f"positions flat, {len(shared):,} in a forest; flat/this is against {fastest_flat}; errors against segments",
    ]
    return table


def kernels(forest: TreeLayout, device: torch.device) -> dict[str, Kernel]:
    """What there is on this device."""
    queries = all_queries(forest)
    available: dict[str, Kernel] = {"segments": SdpaKernel(queries, device)}
    if cpu_flash_available(device):
        available["pieces"] = CpuFlashKernel(queries)
    if device.type == "cuda":
        available["flex"] = FlexKernel(queries, device)
    if varlen_available(device):
        available["varlen"] = VarlenKernel(queries, device)
    return available


def unshared(rollouts: Rollouts) -> PrefixOrder:
    """Every rollout a tree of its own."""
    return PrefixOrder(index=np.arange(len(rollouts)), shared=np.zeros(len(rollouts), dtype=np.int64))


def drawn(rollouts: Rollouts, forest: TreeLayout, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys, values and a slope, random."""
    torch.manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    *inputs, slope = (torch.randn(1, count, len(forest), HEAD_DIM).to(device, dtype) for count in heads)
    return [*(tensor.requires_grad_() for tensor in inputs), slope.transpose(1, 2).contiguous()]


def one_pass(kernel: Kernel, tensors: list[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    """Output and gradients."""
    query, key, value, slope = tensors

    def run_once() -> list[torch.Tensor]:
        output = kernel(query, key, value, PLAIN)
        return [output, *torch.autograd.grad(output, (query, key, value), slope)]

    return run_once


def largest_error(actual: list[Any], expected: list[Any]) -> float:
    """In norms, over the output and the three gradients."""
    pairs = zip(actual, expected, strict=True)
    return max(float(((one.float() - other.float()).norm() / other.float().norm()).detach()) for one, other in pairs)
