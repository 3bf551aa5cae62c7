"""Attention on a prefix-tree layout: the table of kernels, and the function that transformers calls.

transformers looks attention functions up by name and passes keyword arguments that it does not know through. So a
trunk whose attention is set to TREE_ATTENTION, and which is called with `tree_plan=...`, computes on a tree layout
without any change to its code. Because no mask function is registered under that name, transformers makes no mask.

Shapes: S positions of the layout, Q <= S of them that are queries.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface

from critic_train.layers import cuda_kernels, sdpa_kernels
from critic_train.layers.attention_kernel import (
    AttentionCall,
    Kernel,
    Queries,
    Scoring,
    all_queries,
    fill_short_gaps,
    queries_at,
)
from critic_train.layers.prefix_tree import TreeLayout
from critic_train.layers.sequence_parallel import (
    Exchange,
    ExchangedAttention,
    SequenceRanks,
    counts_between,
    one_on_each_rank,
)
from critic_train.layers.to_device import to_device
from critic_train.layers.tree_states import TreeStates
from critic_train.settings import Attention, Precision

TREE_ATTENTION = "critic_train_forest"
"""The name under which transformers finds `tree_attention`."""


BuildKernel = Callable[[Queries, torch.device, bool], Kernel]
"""(queries, device, whether it will be called with soft caps) -> kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelEntry:
    """One value of `--attention`.

    Attributes:
        build: makes the kernel.
        supports: (device, precision) -> whether it can be used there.
        needs: what it can be used with, for the message that it cannot.
    """

    build: BuildKernel
    supports: Callable[[torch.device, Precision], bool] = lambda device, precision: True
    needs: str = ""


def _sdpa(queries: Queries, device: torch.device, softcapped: bool) -> Kernel:
    if sdpa_kernels.cpu_flash_available(device) and not softcapped:
        return sdpa_kernels.CpuFlashKernel(queries)
    return sdpa_kernels.SdpaKernel(queries, device)


# To add a kernel: implement `attention_kernel.Kernel`, add an entry here and its name to `settings.Attention`.
# `--attention auto` takes the first one that is supported and right. In bf16 on CUDA that is varlen: flash attention's
# kernels reach more of the device's peak than FlexAttention's, at the price of a copy of the keys of each path.
KERNELS: dict[Attention, KernelEntry] = {
    "varlen": KernelEntry(
        build=lambda queries, device, softcapped: cuda_kernels.VarlenKernel(queries, device),
        supports=lambda device, precision: precision == "bf16" and cuda_kernels.varlen_available(device),
        needs="--precision bf16 and a CUDA device of compute capability 8.0 or more",
    ),
    "flex": KernelEntry(
        build=lambda queries, device, softcapped: cuda_kernels.FlexKernel(queries, device),
        supports=lambda device, precision: device.type == "cuda",
        needs="a CUDA device (FlexAttention cannot be differentiated on a CPU)",
    ),
    "sdpa": KernelEntry(build=_sdpa),
}


class TreeAttention(Kernel):
    """A kernel for all layers of a trunk, and for values of another size than keys (latent attention).

    Args:
        queries: whose attention is computed.
        device: where the trunk is.
        build: makes the kernel; called at once, and once more if some layers have soft caps.
    """

    def __init__(self, queries: Queries, device: torch.device, build: BuildKernel) -> None:
        self._queries = queries
        self._device = device
        self._build = build
        self._longest = int(queries.layout.depth.max()) + 1  # tokens of the longest rollout
        self._kernels: dict[bool, Kernel] = {False: build(queries, device, False)}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        value_size = value.shape[-1]
        # A window or a chunk as long as the longest rollout cuts nothing.
        scoring = replace(
            scoring,
            scale=query.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale,
            window=self._if_it_cuts(scoring.window),
            chunk=self._if_it_cuts(scoring.chunk),
        )
        # The fused kernels need heads of one size. Zeros at the end change neither scores nor what values add up to.
        missing = key.shape[-1] - value_size
        if missing > 0:
            value = F.pad(value, (0, missing))
        elif missing < 0:
            query, key = F.pad(query, (0, -missing)), F.pad(key, (0, -missing))
        softcapped = scoring.softcap is not None
        if softcapped not in self._kernels:
            self._kernels[softcapped] = self._build(self._queries, self._device, softcapped)
        output = self._kernels[softcapped](query, key, value, scoring)
        return output[..., :value_size] if missing > 0 else output

    def _if_it_cuts(self, tokens: int | None) -> int | None:
        return tokens if tokens is not None and tokens < self._longest else None


class TreeAttentionPlan:
    """What the layers of a trunk are given of a layout.

    Args:
        layout: the layout.
        read: int64 [R], ascending: the positions whose last hidden state is read.
        device: where the trunk is.
        kernel: the kernel, resolved (not auto).
        sequence: the ranks over which the positions are cut; None where this process computes all.

    Attributes:
        attend: attention of all positions.
        attend_needed: attention of the positions that the last layer has to compute; None where it computes all.
        needed_positions: int64 numpy [Q], ascending: the positions that the last layer has to compute. Where positions
            are cut over ranks, these and the two below are of this rank's positions, numbered from the first of them.
        needed: the same on the device; None where they are all positions.
        depth: int64 [S] on the device, the position id of every position.
        exchange: of this rank's positions for heads; None where positions are not cut over ranks.
        exchange_needed: of those of them that the last layer has to compute; None where it computes all.
        calls: what attention was called with, where it is to be noted down; else None.
        capture: whether attention raises KeysAndValues in place of being computed.
        keys_and_values: of all positions, which attention takes where the layer computes some positions only.
        narrowed: whether a layer has computed some positions only.
        states: for layers with a recurrent state or a short convolution.
    """

    def __init__(
        self,
        layout: TreeLayout,
        read: NDArray[np.int64],
        device: torch.device,
        kernel: Attention = "sdpa",
        sequence: SequenceRanks | None = None,
    ) -> None:
        build = KERNELS[kernel].build
        self.attend = TreeAttention(all_queries(layout), device, build)
        self.states = TreeStates(layout, device, sequence)
        self.attend_needed: TreeAttention | None = None
        self.needed: Tensor | None = None
        self.exchange = self.states.exchange
        self.exchange_needed: Exchange | None = None
        self.calls: set[AttentionCall] | None = None
        self.capture = False
        self.keys_and_values: tuple[Tensor, Tensor] | None = None
        self.narrowed = False
        bounds = np.asarray([0, len(layout)]) if sequence is None else sequence.bounds(len(layout))
        first, stop = (0, len(layout)) if sequence is None else sequence.span(len(layout))
        self.depth = to_device(layout.depth[first:stop], device)
        # A rank without work reads nothing, and computes its one position.
        needed = np.arange(len(layout))
        if len(read):
            needed = fill_short_gaps(layout, one_on_each_rank(read, bounds))
        self.needed_positions = needed[(first <= needed) & (needed < stop)] - first
        if 0 < len(needed) < len(layout):
            self.attend_needed = TreeAttention(queries_at(layout, needed), device, build)
            self.needed = to_device(self.needed_positions, device)
            if sequence is not None:
                self.exchange_needed = Exchange(sequence, counts_between(needed, bounds))


class TreeUnsupportedError(Exception):
    """The architecture asks of attention what no kernel here computes."""


class KeysAndValues(Exception):  # noqa: N818 - no error: the way out of a layer of which only these are wanted
    """Carries the keys and values that a layer calls attention with."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.key, self.value = key, value


# What layers pass to attention that changes nothing in what it computes.
INERT = {"position_ids", "position_embeddings", "cache_position", "output_attentions", "output_router_logits"}


@torch.compiler.disable  # type: ignore[untyped-decorator]
def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree_plan: TreeAttentionPlan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attention of every position to its ancestors and itself, as transformers calls it.

    Args:
        module: the calling attention layer.
        query: [1, heads, Q, head_dim]; Q is S, or the number of positions that the last layer has to compute.
        key: [1, kv_heads, S, head_dim].
        value: [1, kv_heads, S, value_dim].
        attention_mask: must be None: the plan is the mask.
        tree_plan: of the layout.
        scaling: factor on the scores; None means 1/sqrt(head_dim).
        dropout: must be 0.
        sliding_window: a query attends to at most so many tokens of its rollout, itself included.
        softcap: see `Scoring`.
        s_aux: the sinks of `Scoring`.
        other: what else the layer passes; a tensor among it that is not INERT is refused.

    Returns:
        ([1, Q, heads, value_dim], None), as transformers expects.

    Raises:
        TreeUnsupportedError: the layer asks for more than `Scoring` holds.
        KeysAndValues: the plan asks for them.
    """
    tree_plan = _supported_plan(module, attention_mask, tree_plan, dropout, other)
    if tree_plan.capture:
        raise KeysAndValues(key, value)
    scoring = Scoring(scale=scaling, window=sliding_window, chunk=_chunk_of(module), softcap=softcap, sinks=s_aux)
    attend, depth, exchange = tree_plan.attend, tree_plan.depth, tree_plan.exchange
    if tree_plan.keys_and_values is not None:
        assert tree_plan.attend_needed is not None
        key, value = tree_plan.keys_and_values
        attend, depth, exchange = tree_plan.attend_needed, depth[tree_plan.needed], tree_plan.exchange_needed
    query = query * _tuned_for_depth(module, depth) if _tunes_by_place(module) else query
    # Rotary embeddings may promote queries and keys; the fused kernels need one dtype for all three.
    query, key = query.to(value.dtype), key.to(value.dtype)
    exchanged = None
    if exchange is not None and tree_plan.exchange is not None:
        exchanged = ExchangedAttention.of(query, key, value, scoring, queries=exchange, keys=tree_plan.exchange)
        query, key, value, scoring = exchanged.query, exchanged.key, exchanged.value, exchanged.scoring
    if tree_plan.calls is not None:
        tree_plan.calls.add(_call_of(query, key, value, scoring))
    output = attend(query, key, value, scoring)
    return output if exchanged is None else exchanged.back(output), None


def _supported_plan(
    module: Any,
    attention_mask: Tensor | None,
    tree_plan: TreeAttentionPlan | None,
    dropout: float,
    other: dict[str, Any],
) -> TreeAttentionPlan:
    """The plan of a call that asks for nothing but what `Scoring` holds; else raises TreeUnsupportedError."""
    unknown = [name for name, given in other.items() if isinstance(given, Tensor) and name not in INERT]
    if unknown or dropout or attention_mask is not None or not getattr(module, "is_causal", True):
        raise TreeUnsupportedError(", ".join(unknown) or ("dropout" if dropout else "a mask that is not plain causal"))
    if tree_plan is None:
        raise TreeUnsupportedError("no arguments but its own: the layout of the prefix tree does not reach it")
    return tree_plan


def _chunk_of(module: Any) -> int | None:
    """The chunk of Llama-4's layers with chunks, which transformers tells the mask alone."""
    kinds, number = getattr(module.config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds is None or number is None or kinds[number] != "chunked_attention":
        return None
    return int(module.config.attention_chunk_size)


def _tunes_by_place(module: Any) -> bool:
    """Whether a layer has scaled its queries by their place in the row, as Llama-4's layers without rotation do."""
    return bool(getattr(module, "attn_temperature_tuning", False)) and not getattr(module, "use_rope", True)


def _tuned_for_depth(module: Any, depth: Tensor) -> Tensor:
    """[Q, 1]: the factor from the temperature of a query's place in the row to that of its depth in the rollout."""

    def temperature(places: Tensor) -> Tensor:  # Nakanishi 2025 (arXiv 2501.19399), as in transformers
        floors = torch.floor((places.float() + 1.0) / float(module.floor_scale))
        return torch.log1p(floors) * float(module.attn_scale) + 1.0

    in_row = torch.arange(len(depth), device=depth.device)
    factor: Tensor = temperature(depth) / temperature(in_row)
    return factor[:, None]


def _call_of(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> AttentionCall:
    return AttentionCall(
        heads=query.shape[1],
        kv_heads=key.shape[1],
        key_size=key.shape[-1],
        value_size=value.shape[-1],
        scoring=replace(scoring, sinks=None),
        has_sinks=scoring.sinks is not None,
    )


AttentionInterface.register(TREE_ATTENTION, tree_attention)
