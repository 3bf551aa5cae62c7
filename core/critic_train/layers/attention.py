"""Attention on a prefix-tree layout: the table of kernels, the choice among them, and the function transformers calls.

transformers looks attention functions up by name and passes keyword arguments that it does not know through. So a
trunk whose attention is set to TREE_ATTENTION, and which is called with `tree_plan=...`, computes on a tree layout
without any change to its code. Because no mask function is registered under that name, transformers makes no mask.

Shapes: S positions of the layout, Q <= S of them that are queries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface

from critic_train.errors import ConfigError, MachineError, first_line
from critic_train.layers import cuda_kernels, sdpa_kernels
from critic_train.layers.attention_kernel import Kernel, Queries, all_queries, fill_short_gaps, queries_at
from critic_train.layers.prefix_tree import TreeLayout
from critic_train.settings import Attention, Precision

TREE_ATTENTION = "critic_train_forest"
"""The name under which transformers finds `tree_attention`."""

UNSUPPORTED = ("softcap", "s_aux")
"""Arguments by which architectures change the arithmetic of attention, and which no kernel here takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelEntry:
    """One value of `--attention`.

    Attributes:
        build: (queries, device, whether it will be called with a window) -> kernel.
        supports: (device, precision) -> whether it can be used there.
        needs: what it can be used with, for the message that it cannot.
    """

    build: Callable[[Queries, torch.device, bool], Kernel]
    supports: Callable[[torch.device, Precision], bool] = lambda device, precision: True
    needs: str = ""


def _sdpa(queries: Queries, device: torch.device, windowed: bool) -> Kernel:
    if sdpa_kernels.cpu_flash_available(device) and not windowed:
        return sdpa_kernels.CpuFlashKernel(queries)
    return sdpa_kernels.SdpaKernel(queries, device)


# To add a kernel: implement `attention_kernel.Kernel`, add an entry here and its name to `settings.Attention`.
# `--attention auto` takes the first one that is supported and right. In bf16 on CUDA that is varlen: flash attention's
# kernels reach more of the device's peak than FlexAttention's, at the price of a copy of the keys of each path.
KERNELS: dict[Attention, KernelEntry] = {
    "varlen": KernelEntry(
        build=lambda queries, device, windowed: cuda_kernels.VarlenKernel(queries, device),
        supports=lambda device, precision: precision == "bf16" and cuda_kernels.varlen_available(device),
        needs="--precision bf16 and a CUDA device of compute capability 8.0 or more",
    ),
    "flex": KernelEntry(
        build=lambda queries, device, windowed: cuda_kernels.FlexKernel(queries, device),
        supports=lambda device, precision: device.type == "cuda",
        needs="a CUDA device (FlexAttention cannot be differentiated on a CPU)",
    ),
    "sdpa": KernelEntry(build=_sdpa),
}


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
    wanted: Attention, layout: TreeLayout, device: torch.device, precision: Precision
) -> tuple[Attention, list[str]]:
    """The kernel to use, after a comparison with scaled-dot-product attention on a layout of the data at hand.

    Args:
        wanted: `--attention`.
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
        build = partial(TreeAttention, device=device, name=name)
        error = "" if name == "sdpa" else kernel_error(build, layout, device, dtype)
        if not error:
            return name, notices
        notices.append(f"--attention {name} is not used: {error}")
    raise MachineError(notices[-1], hint="--attention auto takes what is right on this device")


HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest norm of a difference allowed in `kernel_error`, relative to the norm of what is right."""


def kernel_error(
    build: Callable[[Queries], Kernel], layout: TreeLayout, device: torch.device, dtype: torch.dtype
) -> str:
    """What is wrong with the output or the gradients of a kernel on random tensors; empty if they are SdpaKernel's.

    Args:
        build: makes the kernel for some queries.
        layout: all its positions are queries.
        device: where the kernel runs.
        dtype: of query, key and value.
    """
    queries = all_queries(layout)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, len(layout), HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    *inputs, grad_output = drawn
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def output_and_gradients(kernel: Kernel) -> list[Tensor]:
        output = kernel(inputs[0], inputs[1], inputs[2], None, None)
        return [output, *torch.autograd.grad(output, inputs, grad_output.transpose(1, 2))]

    expected = output_and_gradients(sdpa_kernels.SdpaKernel(queries, device))
    try:
        actual = output_and_gradients(build(queries))
    except Exception as error:  # a kernel that does not run here raises anything
        return f"it fails on {device}: {first_line(error)}"
    errors = [float((a.float() - e.float()).norm() / e.float().norm()) for a, e in zip(actual, expected, strict=True)]
    if max(errors) <= TOLERANCE[dtype]:
        return ""
    return f"it differs from scaled-dot-product attention by {max(errors):.1e} on {device}"


class TreeAttention(Kernel):
    """The kernel that `--attention` names, built once for all layers; layers with a window may have one of their own.

    Args:
        queries: whose attention is computed.
        device: where the trunk is.
        name: the kernel, resolved (not auto).
    """

    def __init__(self, queries: Queries, device: torch.device, name: Attention) -> None:
        self._queries = queries
        self._device = device
        self._build = KERNELS[name].build
        self._longest = int(queries.layout.depth.max()) + 1  # tokens of the longest rollout
        self._kernels: dict[bool, Kernel] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None) -> Tensor:
        # A window as long as the longest rollout cuts nothing.
        windowed = window is not None and window < self._longest
        if windowed not in self._kernels:
            self._kernels[windowed] = self._build(self._queries, self._device, windowed)
        return self._kernels[windowed](query, key, value, window if windowed else None, scale)


class TreeAttentionPlan:
    """What the layers of a trunk are given of a layout.

    Args:
        layout: the layout.
        read: int64 [R], ascending: the positions whose last hidden state is read.
        device: where the trunk is.
        kernel: the kernel, resolved (not auto).

    Attributes:
        attend: attention of all positions.
        attend_needed: attention of the positions that the last layer has to compute; None where it computes all.
        needed_positions: int64 numpy [Q], ascending: the positions that the last layer has to compute.
        needed: the same on the device; None where they are all positions.
    """

    def __init__(
        self, layout: TreeLayout, read: NDArray[np.int64], device: torch.device, kernel: Attention = "sdpa"
    ) -> None:
        self.attend = TreeAttention(all_queries(layout), device, kernel)
        self.attend_needed: TreeAttention | None = None
        self.needed: Tensor | None = None
        # A rank without work reads nothing, and computes its one position.
        self.needed_positions = fill_short_gaps(layout, read) if len(read) else np.arange(len(layout))
        if 0 < len(self.needed_positions) < len(layout):
            self.attend_needed = TreeAttention(queries_at(layout, self.needed_positions), device, kernel)
            self.needed = torch.from_numpy(self.needed_positions).to(device, non_blocking=True)


class TreeUnsupportedError(Exception):
    """The architecture asks of attention what no kernel here computes."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree_plan: TreeAttentionPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attention of every position to its ancestors and itself, as transformers calls it.

    Args:
        module: the calling attention layer.
        query: [1, heads, Q, head_dim]; Q is S, or the number of positions that the last layer has to compute.
        key: [1, kv_heads, S, head_dim].
        value: [1, kv_heads, S, head_dim].
        attention_mask: must be None: the plan is the mask.
        tree_plan: of the layout.
        scaling: factor on the scores; None means 1/sqrt(head_dim).
        dropout: must be 0.
        sliding_window: a query attends to at most so many tokens of its rollout, itself included.
        other: what else the layer passes; of UNSUPPORTED all must be None.

    Returns:
        ([1, Q, heads, head_dim], None), as transformers expects.

    Raises:
        TreeUnsupportedError: the layer asks for more than plain or windowed causal attention.
    """
    unsupported = [name for name in UNSUPPORTED if other.get(name) is not None]
    if unsupported or dropout or attention_mask is not None or not getattr(module, "is_causal", True):
        raise TreeUnsupportedError(", ".join(unsupported) or "attention that is not plain causal")
    attend = tree_plan.attend
    if query.shape[2] != key.shape[2]:
        assert tree_plan.attend_needed is not None
        attend = tree_plan.attend_needed
    # Rotary embeddings may promote queries and keys; the fused kernels need one dtype for all three.
    return attend(query.to(value.dtype), key.to(value.dtype), value, sliding_window, scaling), None


AttentionInterface.register(TREE_ATTENTION, tree_attention)
