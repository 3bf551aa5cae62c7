"""Which kernel computes attention: what was asked for, or the best that this device has and that is right on it.

Attention over a layout, handed to transformers under our own name.

transformers looks attention functions up by name and passes unknown keyword arguments through, so a trunk that was
asked for `TREE_ATTENTION` and called with `tree_plan=...` computes on a layout without any change to its code. Because no
mask function is registered under `TREE_ATTENTION`, transformers builds no mask of its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface

from critic_train.errors import ConfigError, MachineError, first_line
from critic_train.model import cuda_kernels as varlen
from critic_train.model import sdpa_kernels as pieces
from critic_train.model.cuda_kernels import FlexKernel, VarlenKernel
from critic_train.model.prefix_tree import TreeLayout
from critic_train.model.queries import Kernel, Queries, all_queries, fill_short_gaps, queries_at
from critic_train.model.sdpa_kernels import SdpaKernel
from critic_train.settings import Attention, Precision

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest error allowed against scaled-dot-product attention, in norms."""


def build_kernel(name: Attention, queries: Queries, device: torch.device, *, windowed: bool) -> Kernel:
    """The kernel of a resolved `--attention` for some queries.

    Args:
        name: sdpa, flex or varlen.
        queries: who asks.
        device: where the trunk is.
        windowed: whether it will be called with a window that cuts.
    """
    if name == "flex":
        return FlexKernel(queries, device)
    if name == "varlen":
        return VarlenKernel(queries, device)
    if pieces.available(device) and not windowed:
        return pieces.CpuFlashKernel(queries)
    return SdpaKernel(queries, device)


def kernels_to_try(wanted: Attention, device: torch.device, precision: Precision) -> list[Attention]:
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
    wanted: Attention, layout: TreeLayout, device: torch.device, precision: Precision
) -> tuple[Attention, list[str]]:
    """The kernel to use, tried on a layout of the data at hand against torch's scaled-dot-product attention.

    Args:
        wanted: `--attention`.
        layout: a small layout with branches.
        device: where the trunk is.
        precision: what the trunk computes in.

    Returns:
        (sdpa, flex or varlen; why better ones were passed over, in sentences).

    Raises:
        ConfigError: see `kernels_to_try`.
        MachineError: what was asked for is wrong or fails here.
    """
    passed: list[str] = []
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for name in kernels_to_try(wanted, device, precision):
        fault = "" if name == "sdpa" else kernel_error(partial(_whole, name, device), layout, device, dtype)
        if not fault:
            return name, passed
        passed.append(f"--attention {name} is not used: {fault}")
    raise MachineError(passed[-1], hint="--attention auto takes what is right on this device")


def kernel_error(
    make: Callable[[Queries], Kernel], layout: TreeLayout, device: torch.device, dtype: torch.dtype
) -> str:
    """What is wrong with a kernel's output or gradients on a layout, held against SdpaKernel; empty where nothing is."""
    queries = all_queries(layout)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, len(layout), HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    *inputs, slope = drawn
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def run(kernel: Kernel) -> list[Tensor]:
        output = kernel(inputs[0], inputs[1], inputs[2], None, None)
        return [output, *torch.autograd.grad(output, inputs, slope.transpose(1, 2))]

    expected = run(SdpaKernel(queries, device))
    try:
        found = run(make(queries))
    except Exception as error:  # a kernel that does not run here raises anything
        return f"it fails on {device}: {first_line(error)}"
    errors = [
        float((one.float() - other.float()).norm() / other.float().norm())
        for one, other in zip(found, expected, strict=True)
    ]
    if max(errors) <= TOLERANCE[dtype]:
        return ""
    return f"it differs from scaled-dot-product attention by {max(errors):.1e} on {device}"


def _whole(name: Attention, device: torch.device, queries: Queries) -> Kernel:
    return build_kernel(name, queries, device, windowed=False)


TREE_ATTENTION = "critic_train_forest"

UNSUPPORTED = ("softcap", "s_aux")
"""Arguments that change the attention's arithmetic and that the layout path does not honour."""


class TreeUnsupportedError(Exception):
    """The architecture asks of attention something that the layout path cannot give."""


class TreeAttention:
    """Attention of some positions of a layout to their ancestors and themselves, prepared once for all layers.

    Args:
        queries: who asks.
        device: where the trunk is.
        kernel: sdpa, flex or varlen.
    """

    def __init__(self, queries: Queries, device: torch.device, kernel: Attention) -> None:
        self._queries = queries
        self._device = device
        self._name = kernel
        self._longest = int(queries.layout.depth.max()) + 1
        self._kernels: dict[bool, Kernel] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None) -> Tensor:
        """See `queries.Kernel`."""
        windowed = window is not None and window < self._longest
        if windowed not in self._kernels:
            self._kernels[windowed] = build_kernel(self._name, self._queries, self._device, windowed=windowed)
        return self._kernels[windowed](query, key, value, window if windowed else None, scale)


class TreeAttentionPlan:
    """What the layers of a trunk need to know of a layout.

    Args:
        layout: the layout.
        read: int64 [R], ascending: the positions whose last state is read.
        device: where the trunk is.
        kernel: sdpa, flex or varlen: how attention is computed.

    Attributes:
        attend: the attention of all positions.
        narrowed: the attention of the positions that the last layer needs to compute; None where those are all,
            or none is read.
        needed_positions: int64 [Q], those positions, ascending.
        kept: the same on the device; None where they are all.
    """

    def __init__(
        self, layout: TreeLayout, read: NDArray[np.int64], device: torch.device, kernel: Attention = "sdpa"
    ) -> None:
        self.attend = TreeAttention(all_queries(layout), device, kernel)
        self.narrowed: TreeAttention | None = None
        self.needed: Tensor | None = None
        # Where nothing is read (a rank without work) there is nothing to narrow to.
        self.needed_positions = fill_short_gaps(layout, read) if len(read) else np.arange(len(layout))
        if 0 < len(self.needed_positions) < len(layout):
            self.narrowed = TreeAttention(queries_at(layout, self.needed_positions), device, kernel)
            self.needed = torch.from_numpy(self.needed_positions).to(device, non_blocking=True)


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
    """Attention of every position to its ancestors and itself.

    Args:
        module: the calling attention layer.
        query: [1, heads, Q, head_dim]; Q is S, or the narrowed plan's.
        key: [1, kv_heads, S, head_dim].
        value: [1, kv_heads, S, head_dim].
        attention_mask: must be None: the plan is the mask.
        tree_plan: the layout.
        scaling: factor on the scores; None means 1/sqrt(head_dim).
        dropout: must be 0.
        sliding_window: keys further back than this in the rollout are not seen.

    Returns:
        ([1, Q, heads, head_dim], None), as transformers expects.

    Raises:
        ForestUnsupportedError: the layer asks for more than plain (or windowed) causal attention.
    """
    asked = [name for name in UNSUPPORTED if other.get(name) is not None]
    if asked or dropout or attention_mask is not None or not getattr(module, "is_causal", True):
        raise TreeUnsupportedError(", ".join(asked) or "attention that is not plain causal")
    attend = tree_plan.attend
    if query.shape[2] != key.shape[2]:
        assert tree_plan.narrowed is not None
        attend = tree_plan.narrowed
    # Rotary embeddings may promote queries and keys; all three must agree for the fused kernels.
    return attend(query.to(value.dtype), key.to(value.dtype), value, sliding_window, scaling), None


AttentionInterface.register(TREE_ATTENTION, tree_attention)
