"""Recurrent layers and short convolutions on a prefix-tree layout: the table of what is known, and how it is computed.

transformers' layers call their recurrence and their convolution by name in their own module, and pass on keyword
arguments that they do not know: `torch_chunk_gated_delta_rule(query, ..., **kwargs)`. `share_states` replaces those
names by functions which, where `tree_plan` is among the arguments, call what was there before on the nodes of the
tree, each from its parent's final state, and otherwise do nothing else. So a layer of any architecture that calls a
function of the table computes on a tree layout without any change to its code.

Shapes: S positions of the layout.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from critic_train.layers.sequence_parallel import HeadShares
from critic_train.layers.tree_states import CHUNK, NodeCalls, TreeStates, rearranged, taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrence:
    """How transformers' layers call a recurrence, and how it is given a state to start from.

    It must be so that a position at which all `sequences` are 0 leaves the state as it is.

    Attributes:
        sequences: the parameters of shape [rows, positions, ...].
        initial_state: the parameter that takes a state for every row.
        final_state: the parameter that asks for the state at the end of every row, as a second result.
        always_a_pair: it returns (output, final state) or (output, None); else, where no state is asked, the output.
        per_head: parameters of shape [heads, ...], which go with the heads where those are cut over ranks.
        packed: a faster function of an installed package is called once a level with `cu_seqlens`, the bounds of the
            nodes laid end to end, if it takes them; else it is called with padded rows, as torch's is.
        prepare: makes the condition above true of the arguments.
    """

    sequences: tuple[str, ...]
    initial_state: str
    final_state: str
    always_a_pair: bool = True
    per_head: tuple[str, ...] = ()
    packed: bool = True
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = dict


def time_steps(arguments: dict[str, Any]) -> dict[str, Any]:
    """Mamba-2's time steps as they are after bias, softplus and limits: at a step of 0 a state stays as it is."""
    dt, bias = arguments["dt"].float(), arguments.get("dt_bias")
    if bias is not None:
        dt = dt + bias.float()
    if arguments.get("dt_softplus"):
        dt = F.softplus(dt)
    dt = dt.clamp(*arguments.get("dt_limit", (0.0, float("inf"))))
    unlimited = {"dt_bias": None, "dt_softplus": False, "dt_limit": (0.0, float("inf"))}
    return arguments | {"dt": dt} | unlimited


# The name by which transformers' layers call a recurrence -> how. To add one, see CONTRIBUTING.md.
DELTA_RULE = Recurrence(
    sequences=("query", "key", "value", "g", "beta"), initial_state="initial_state", final_state="output_final_state"
)
RECURRENCES: dict[str, Recurrence] = {
    # Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): Qwen3-Next, Qwen3.5, Olmo-hybrid
    "torch_chunk_gated_delta_rule": DELTA_RULE,
    # Kimi Delta Attention (arXiv 2510.26692): the same with one decay a channel
    "chunk_kimi_delta_attention": DELTA_RULE,
    # Mamba-2 (Dao & Gu 2024, arXiv 2405.21060): Granite-4-h, Nemotron-H, Falcon-H1, Bamba, Zamba2. mamba-ssm returns
    # final states of packed sequences, but they cannot be differentiated.
    "mamba2_chunk_scan": Recurrence(
        sequences=("hidden_states", "dt", "B", "C"),
        initial_state="initial_states",
        final_state="return_final_states",
        always_a_pair=False,
        per_head=("A", "D"),
        packed=False,
        prepare=time_steps,
    ),
}

CONVOLUTION = "causal_conv1d_fn"
"""A convolution over the last few tokens, one filter a channel: beside the recurrences above, and alone in LFM2."""

FUSED = ("mamba2_split_conv1d_scan_combined",)
"""Shortcuts through a full layer, taken in training where mamba-ssm is installed. They return None where it is not."""


def recur(
    recurrence: Recurrence, function: Callable[..., Any], states: TreeStates, *args: Any, **kwargs: Any
) -> tuple[Tensor, None] | Tensor:
    """Call a recurrence on the nodes of a tree.

    Args:
        recurrence: how it is called.
        function: what the layer's module has under that name.
        states: of the layout.
        args: as the layer calls it; sequences are [1, S, ...].
        kwargs: the rest of its arguments.

    Returns:
        What the layer expects: [1, S, ...], where it asked for final states always together with None.
    """
    positional = list(inspect.signature(function).parameters)[: len(args)]
    arguments = recurrence.prepare(dict(zip(positional, args, strict=True)) | kwargs)
    implementation = _implementation(function)
    packed = recurrence.packed and "cu_seqlens" in inspect.signature(implementation).parameters
    calls = states.packed if packed else states.padded
    if implementation is inspect.unwrap(function):
        arguments["chunk_size"] = min(CHUNK, arguments.get("chunk_size", CHUNK))
    asked = bool(arguments.get(recurrence.final_state))
    arguments[recurrence.final_state] = True
    sequences = {name: _gather(arguments[name], calls) for name in recurrence.sequences}
    outputs: list[Tensor] = []
    above: Tensor | None = None
    for level in calls.levels:
        final_states = []
        for call in level:
            part: dict[str, Any] = {name: next(parts) for name, parts in sequences.items()}
            if above is not None and call.parents is not None:
                part[recurrence.initial_state] = above.index_select(0, call.parents)
            if packed:
                part["cu_seqlens"] = call.bounds
            given = arguments | part
            output, final = function(*[given.pop(name) for name in positional], **given)
            outputs.append(output.flatten(0, 1))
            final_states.append(final.index_select(0, call.parent_nodes))
        above = torch.cat(final_states)
    together = rearranged(torch.cat(outputs), calls.index, calls.positions)[None]
    return (together, None) if asked or recurrence.always_a_pair else together


def _gather(sequence: Tensor, calls: NodeCalls) -> Iterator[Tensor]:
    """[1, S, ...] -> what each call takes, [rows, positions, ...]; 0 where a row is padded."""
    rows = rearranged(sequence[0], calls.positions, calls.index)
    shapes = [call.shape for level in calls.levels for call in level]
    parts = rows.split([count * width for count, width in shapes])
    return (part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True))


def _implementation(function: Callable[..., Any]) -> Callable[..., Any]:
    """What transformers calls under a function's name: its own function in torch, or that of an installed package."""
    if not inspect.isfunction(function):
        return function
    implementation: Callable[..., Any] = inspect.getclosurevars(function).nonlocals.get("implementation", function)
    return implementation


def convolve(function: Callable[..., Any], states: TreeStates, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Call a causal convolution on a tree.

    Args:
        function: what the layer's module has under that name.
        states: of the layout.
        inputs: [1, channels, S].
        args: the filters, [channels, width], and the rest, as the layer calls it.
        kwargs: the rest of its arguments.

    Returns:
        [1, channels, S].
    """
    filters: Tensor = args[0] if args else kwargs["weight"]
    sequence = states.with_context(filters.shape[-1] - 1)
    rows = inputs[0].transpose(0, 1)  # [S, channels]: what is gathered is contiguous, for it was projected so
    rows = rearranged(torch.cat([rows, taken(rows, sequence.context)]), sequence.order, sequence.order_inverse)
    outputs: Tensor = function(rows.transpose(0, 1)[None], *args, **kwargs)
    outputs = rearranged(outputs[0].transpose(0, 1), sequence.index, sequence.index_inverse)
    return outputs.transpose(0, 1)[None]


def lightning_attention(
    layer: Any, forward: Callable[..., Any], scan: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """MiniMax's lightning attention (arXiv 2501.08313), which calls no function: its forward, with the state in a call.

    Its state decays by one factor a head, S_t = exp(-slope) S_{t-1} + k_t v_t^T, and is read by o_t = q_t S_t: that is
    Mamba-2's recurrence at time steps of 1.

    Args:
        layer: the layer.
        forward: its own forward, for padded rows.
        scan: Mamba-2's recurrence, on a tree.
        args: of the forward.
        kwargs: of the forward.
    """
    plan = kwargs.get("tree_plan")
    if plan is None:
        return forward(*args, **kwargs)
    hidden_states: Tensor = args[0] if args else kwargs["hidden_states"]
    heads = layer.qkv_proj(hidden_states).unflatten(-1, (layer.num_attention_heads, -1))
    query, key, value = layer.act_fn(heads).chunk(3, dim=-1)  # [1, S, heads, head_dim]
    steps = torch.ones_like(value[..., 0])
    read = scan(value, steps, -layer.slope_rate.flatten(), key, query, chunk_size=CHUNK, tree_plan=plan)
    read = layer.norm(read.flatten(2).to(hidden_states.dtype))
    return layer.out_proj(layer.output_gate(hidden_states).sigmoid() * read), None


MAMBA2 = "transformers.models.mamba2.modeling_mamba2"
LIGHTNING = {"qkv_proj", "output_gate", "out_proj", "norm", "act_fn"}
"""The submodules of a layer of lightning attention, which besides has a `slope_rate`."""


def share_states(trunk: nn.Module) -> None:
    """Have the recurrent layers and convolutions of a trunk that are known compute on tree layouts.

    Nothing changes for a trunk that is called without `tree_plan`.
    """
    for layer in trunk.modules():
        namespace = inspect.unwrap(type(layer).forward).__globals__
        for name in (CONVOLUTION, *FUSED, *RECURRENCES):
            function = namespace.get(name)
            if callable(function):
                namespace[name] = _on_tree(name, function)
        children = {name for name, _ in layer.named_children()}
        if children == LIGHTNING and hasattr(layer, "slope_rate") and "forward" not in vars(layer):
            scan = _on_tree("mamba2_chunk_scan", import_module(MAMBA2).mamba2_chunk_scan)
            layer.forward = partial(lightning_attention, layer, layer.forward, scan)


def unshared_states(trunk: nn.Module) -> list[str]:
    """The classes of a trunk's layers that carry a recurrent state and call no function of the table."""
    classes = set()
    for layer in trunk.modules():
        code: Any = getattr(inspect.unwrap(type(layer).forward), "__code__", None)
        names = set(code.co_names) if code else set()
        if any("recurrent_state" in name for name in names) and not names & set(RECURRENCES):
            classes.add(type(layer).__name__)
    return sorted(classes)


def _on_tree(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of transformers which, given a `tree_plan`, computes on the tree, and otherwise does what it did."""
    if hasattr(function, "computes_on_trees"):
        return function

    @wraps(function)
    def computing(*args: Any, **kwargs: Any) -> Any:
        plan = kwargs.pop("tree_plan", None)
        if plan is None:
            return function(*args, **kwargs)
        if name in FUSED:
            return None
        return _outside_graphs(name, function, plan.states, *args, **kwargs)

    computing.computes_on_trees = True  # type: ignore[attr-defined]
    return computing


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside_graphs(name: str, function: Callable[..., Any], states: TreeStates, *args: Any, **kwargs: Any) -> Any:
    if name == CONVOLUTION:
        return _convolve_here(function, states, *args, **kwargs)
    return _recur_here(RECURRENCES[name], function, states, *args, **kwargs)


def _recur_here(
    recurrence: Recurrence, function: Callable[..., Any], states: TreeStates, *args: Any, **kwargs: Any
) -> tuple[Tensor, None] | Tensor:
    """`recur`, where positions are cut over ranks on all positions of this rank's heads."""
    exchange = states.exchange
    if exchange is None:
        _check_positions(states, args[0].shape[1])
        return recur(recurrence, function, states, *args, **kwargs)
    positional = list(inspect.signature(function).parameters)[: len(args)]
    arguments = recurrence.prepare(dict(zip(positional, args, strict=True)) | kwargs)
    # As in attention, keys may have fewer heads than values (groups of Mamba-2).
    heads = {name: arguments[name].shape[2] for name in recurrence.sequences}
    most = max(heads.values())
    shares = HeadShares(most, min(heads.values()), exchange.ranks.size)
    for name in recurrence.sequences:
        rows: Tensor = arguments[name][0]
        filled = shares.queries(rows) if heads[name] == most else shares.keys(rows)
        arguments[name] = exchange.all_positions(filled)[None]
    for name in recurrence.per_head:
        if isinstance(arguments.get(name), Tensor):
            arguments[name] = shares.of_rank(arguments[name], exchange.ranks.rank)
    _check_positions(states, arguments[recurrence.sequences[0]].shape[1])
    output = recur(recurrence, function, states, *[arguments.pop(name) for name in positional], **arguments)
    own = output[0] if isinstance(output, tuple) else output
    own = shares.without_filling(exchange.all_heads(own[0]))[None]
    return (own, None) if isinstance(output, tuple) else own


def _convolve_here(
    function: Callable[..., Any], states: TreeStates, inputs: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """`convolve`, where positions are cut over ranks on all positions of this rank's channels."""
    exchange, channels = states.exchange, inputs.shape[1]
    if exchange is None:
        _check_positions(states, inputs.shape[2])
        return convolve(function, states, inputs, *args, **kwargs)
    shares, rank = HeadShares(channels, channels, exchange.ranks.size), exchange.ranks.rank

    def here(given: Any) -> Any:
        of_channels = isinstance(given, Tensor) and given.shape[0] == channels  # filters and their bias
        return shares.of_rank(given, rank) if of_channels else given

    rows = exchange.all_positions(shares.queries(inputs[0].transpose(0, 1)))
    _check_positions(states, len(rows))
    named = {name: here(given) for name, given in kwargs.items()}
    outputs = convolve(function, states, rows.transpose(0, 1)[None], *map(here, args), **named)
    own = shares.without_filling(exchange.all_heads(outputs[0].transpose(0, 1)))
    return own.transpose(0, 1)[None]


def _check_positions(states: TreeStates, given: int) -> None:
    if given != len(states):  # on CUDA, indices beyond the end would end the process
        raise ValueError(f"a recurrent layer is given {given:,} of {len(states):,} positions")
