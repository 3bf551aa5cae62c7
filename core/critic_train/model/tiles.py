"""Parts of a trunk that treat each position alone (MLPs, mixtures of experts, norms), computed in tiles of positions.

The backward pass computes a tile again from its input, so that what such a part keeps of a long micro-batch is its
input, and its intermediate results exist for one tile at a time (TiledMLP of Arctic's long-sequence training, Bekman
et al. 2025, arXiv 2506.13996). Which parts these are is found by what they do, on a few random tokens, not by name.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from critic_train.layers.attention import TREE_ATTENTION
from critic_train.layers.prefix_tree import prefix_order
from critic_train.model.critic import Critic
from critic_train.model.fsdp import full_precision_params
from critic_train.model.model_input import padded_input, tree_input
from critic_train.rollouts import rollouts_of_tokens

SMALLEST_TILE = 1024
"""Positions. Tiles are as long as a hidden state is wide (as in the paper), but no shorter: each has its own calls, and
adds a gradient to each weight's."""
TRIED_TOKENS = 37
"""About so many tokens are tried: more than a short convolution reaches, and no number that is a size of the model."""
WORTHWHILE = 0.5
"""A part is computed again where it keeps at least so many times its input beside it; a linear map keeps none."""
SAME = 1e-4
"""Rounding of the tried parts, relative to their largest output: in float32, sums of another order."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """Along which dimensions a module can be cut into tiles: those of the positions.

    Attributes:
        inputs: of every tensor that it is called with, in order.
        outputs: of every tensor that it returns.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class _Trials:
    """Forward hooks that try, in one pass, which modules treat each position alone.

    Args:
        positions: of the pass.
    """

    def __init__(self, positions: int) -> None:
        self.cuts: dict[str, _Cut | None] = {}
        self._positions = positions
        self._trying = False

    def look(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Try a module on its own input, with the positions in another order and cut in two."""
        if self._trying or self.cuts.get(name, True) is None:
            return
        self._trying = True
        try:
            self.cuts[name] = self._try(module, args, kwargs, output)
        except Exception:  # what cannot be called so cannot be cut
            self.cuts[name] = None
        finally:
            self._trying = False

    def _try(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> _Cut | None:
        given = [*args, *kwargs.values()]
        tensors = [each for each in given if isinstance(each, Tensor)]
        outputs = output if isinstance(output, tuple) else (output,)
        others = (each for each in given if not isinstance(each, Tensor))
        if not tensors or not tensors[0].is_floating_point() or not all(isinstance(each, Tensor) for each in outputs):
            return None
        if not all(each is None or isinstance(each, bool | int | float | str) for each in others):
            return None
        # ValueError where a tensor has no dimension of that size.
        cut = _Cut(*(tuple(each.shape.index(self._positions) for each in part) for part in (tensors, outputs)))
        if cut.inputs[0] == tensors[0].dim() - 1:
            return None  # numbers of tokens, not states
        buffers = [buffer.clone() for buffer in module.buffers()]
        if _bytes_held(module, args, kwargs, tensors) < WORTHWHILE * tensors[0].nbytes:
            return None
        order = torch.randperm(self._positions, generator=torch.Generator().manual_seed(0)).to(tensors[0].device)
        parts = []
        for part in order.split(-(-self._positions // 2)):
            at_part = [each.index_select(dim, part) for each, dim in zip(tensors, cut.inputs, strict=True)]
            answer = _call(module, args, kwargs, at_part)
            parts.append(answer if isinstance(answer, tuple) else (answer,))
        joined = [torch.cat(each, dim) for each, dim in zip(zip(*parts, strict=True), cut.outputs, strict=True)]
        expected = [each.index_select(dim, order) for each, dim in zip(outputs, cut.outputs, strict=True)]
        # One that counts what it sees in a buffer has to see all at once.
        unchanged = all(torch.equal(*pair) for pair in zip(buffers, module.buffers(), strict=True))
        return cut if unchanged and _agree(joined, expected) else None


def _agree(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    pairs = zip(outputs, expected, strict=True)
    return all((one - other).abs().max() <= SAME * other.abs().max() for one, other in pairs)


def compute_in_tiles(critic: Critic) -> list[str]:
    """Have the parts of the trunk that treat each position alone compute in tiles. All ranks call it.

    Args:
        critic: on its device, its packing chosen.

    Returns:
        Their names; none where no part keeps anything worth computing again.
    """
    trunk: PreTrainedModel = critic.trunk
    compute_at_once(trunk)
    tile = tile_size(critic)
    names: list[str] = []
    for name, cut in _cuts(critic).items():
        if not any(name.startswith(f"{outer}.") for outer in names):
            names.append(name)
            module: Any = trunk.get_submodule(name)
            module.forward = partial(_in_tiles, module.forward, tile, cut)
    return names


def can_compute_in_tiles(critic: Critic) -> bool:
    """Whether `compute_in_tiles` would find a part; nothing is changed. All ranks call it."""
    return bool(_cuts(critic))


def tile_size(critic: Critic) -> int:
    """Positions of a tile."""
    return max(SMALLEST_TILE, int(critic.trunk.config.hidden_size))


def compute_at_once(trunk: nn.Module) -> None:
    """Undo `compute_in_tiles`."""
    for module in trunk.modules():
        if getattr(vars(module).get("forward"), "func", None) is _in_tiles:
            del vars(module)["forward"]


@torch.no_grad()
def _cuts(critic: Critic) -> dict[str, _Cut]:
    """How the modules can be cut that treat each position alone, the outer ones before those inside them."""
    trunk = critic.trunk
    sizes = {size for parameter in trunk.parameters() for size in parameter.shape}
    positions = next(count for count in range(TRIED_TOKENS, TRIED_TOKENS + len(sizes) + 1) if count not in sizes)
    ids = np.random.default_rng(0).integers(0, int(trunk.config.vocab_size), positions)
    rollouts = rollouts_of_tokens([ids], [positions])  # nothing is read, so that the last layer computes all positions
    if trunk.config._attn_implementation == TREE_ATTENTION:
        batch = tree_input(rollouts, prefix_order(rollouts), critic.device)
    else:
        batch = padded_input(rollouts, np.zeros(1, dtype=np.int64), critic.device, masked=False)
    trials = _Trials(positions)
    tried = [name for name, module in trunk.named_modules() if name and any(True for _ in module.parameters())]
    hooks = [
        trunk.get_submodule(name).register_forward_hook(partial(trials.look, name), with_kwargs=True) for name in tried
    ]
    try:
        with full_precision_params(critic.parts):
            trunk(use_cache=False, **batch.trunk_arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: cut for name in tried if (cut := trials.cuts.get(name)) is not None}


def _bytes_held(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> int:
    """What the backward pass of a module would hold beside its input and its weights."""
    own = {each.untyped_storage().data_ptr() for each in (*tensors, *module.parameters(), *module.buffers())}
    held: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            held[address] = tensor
        return tensor

    inputs = [each.detach().requires_grad_(each.is_floating_point()) for each in tensors]
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _call(module, args, kwargs, inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def _call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Iterable[Tensor]
) -> Any:
    """Call with other tensors in place of those among the arguments, in order."""
    args, kwargs = _with_tensors(args, kwargs, tensors)
    return function(*args, **kwargs)


def _with_tensors(
    args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Iterable[Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with other tensors in place of those among them, in order."""
    others = iter(tensors)
    given = [next(others) if isinstance(each, Tensor) else each for each in (*args, *kwargs.values())]
    return tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :], strict=True))


def _in_tiles(forward: Callable[..., Any], tile: int, cut: _Cut, *args: Any, **kwargs: Any) -> Any:
    """A module's own output, computed tile by tile."""
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    rows = tensors[0].shape[: cut.inputs[0]].numel()
    size = max(1, tile // max(1, rows))
    # Checkpoints hold `compute` until the backward pass: not, through it, the input that a checkpoint around drops.
    empty = [each.new_empty(0) for each in tensors]
    args, kwargs = _with_tensors(args, kwargs, empty)

    def compute(*part: Tensor) -> Any:
        # Of padded rows a tile is a view of a piece of each, and some modules take its rows for one after the other.
        return _call(forward, args, kwargs, (each.contiguous() for each in part))

    if torch.is_grad_enabled():
        compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
    tiles = zip(*(each.split(size, dim) for each, dim in zip(tensors, cut.inputs, strict=True)), strict=True)
    outputs = [compute(*part) for part in tiles]
    if len(outputs) == 1:
        return outputs[0]
    if not isinstance(outputs[0], tuple):
        return torch.cat(outputs, cut.outputs[0])
    return tuple(torch.cat(each, dim) for each, dim in zip(zip(*outputs, strict=True), cut.outputs, strict=True))
