"""AdamW with 8-bit moments by bitsandbytes (Dettmers et al. 2022, arXiv 2110.02861), sharded or not, and their files.

A moment is a tensor of codes, one scale for every block of 256 of them, and a map of what the 256 codes stand for.

bitsandbytes knows plain tensors alone. Of parameters that are sharded over ranks it is given this rank's shards: AdamW
goes number by number, so that a shard is updated as it is in the full tensor. The blocks of 256 begin anew in each
shard. A file holds the shards end to end and says how many there are, so that as many ranks resume to the bit. Other
numbers of ranks do as well where their blocks have the same bounds, as in matrices whose rows are multiples of 256;
elsewhere the numbers are quantised anew.
"""

import logging
import sys
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from critic_train.errors import ConfigError
from critic_train.model_files.gather import Gather, as_rows_of, concat_over_ranks
from critic_train.model_files.tensor_file import part_here, rows_here, rows_of

BLOCK = 256
CODES = ("qmap1", "qmap2")
"""What the 256 codes of each moment stand for."""
PARTS = "parts"
"""Key in the file's metadata: over how many ranks its parameters were sharded. A file of one process lacks it."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How the numbers of a tensor are shared out among parts, by rows.

    Attributes:
        rows: of the full tensor.
        width: numbers in a row.
        parts: how many.
    """

    rows: int
    width: int
    parts: int

    @classmethod
    def of(cls, tensor: Tensor, parts: int) -> "Cut":
        """Of a tensor, sharded or not."""
        return cls(tensor.shape[0], tensor.numel() // max(1, tensor.shape[0]), parts)

    def span(self, part: int) -> tuple[int, int]:
        """(first, one past the last) number of a part, as torch.chunk cuts."""
        first, last = rows_of(part, self.parts, self.rows)
        return first * self.width, last * self.width

    def blocks(self, part: int) -> int:
        """How many blocks a part has."""
        first, last = self.span(part)
        return -(-(last - first) // BLOCK)


def gathered_state(state: dict[str, Any], parameter: Any, gather: Gather) -> dict[str, Any]:
    """The state of a sharded parameter as a file holds it: codes as rows of a DTensor, scales of all shards end to end.

    All ranks call it for the same parameters in the same order.
    """
    gathered = dict(state)
    cut = Cut.of(parameter, parameter.device_mesh.size())
    for which in (1, 2):
        gathered[f"state{which}"] = as_rows_of(parameter, state[f"state{which}"])
        if f"absmax{which}" in state:
            lengths = [cut.blocks(part) for part in range(cut.parts)]
            gathered[f"absmax{which}"] = concat_over_ranks(parameter, state[f"absmax{which}"], lengths, gather).cpu()
    return gathered


def stored_state(file: Path, name: str, names: Set[str], parameter: Tensor) -> dict[str, Any]:
    """What a file holds of one parameter's state; of one that is spread over ranks, this rank's part.

    Args:
        file: written on any number of ranks.
        name: the parameter's.
        names: of all tensors in the file.
        parameter: whose state it is.

    Raises:
        RuntimeError, SafetensorError: the file does not fit the parameter.
    """
    first, last = rows_here(parameter) if hasattr(parameter, "to_local") else (0, parameter.shape[0])
    device = parameter.device
    with safe_open(file, framework="pt") as stored:
        parts = int((stored.metadata() or {}).get(PARTS, 1))
        cut = Cut.of(parameter, parts)
        state: dict[str, Any] = {"step": int(stored.get_tensor(f"step.{name}"))}
        for which in (1, 2):
            rows = stored.get_slice(f"state{which}.{name}")
            if rows.get_shape() != list(parameter.shape):
                raise RuntimeError(f"its shape is {rows.get_shape()}, not {list(parameter.shape)}")
            moment = rows[first:last] if first < last else torch.empty(0, *parameter.shape[1:])
            if f"absmax{which}.{name}" in names:
                scales = stored.get_tensor(f"absmax{which}.{name}")
                meaning = stored.get_tensor(f"qmap{which}.{name}")
                moment, scales = in_own_blocks(moment.to(torch.uint8), scales, meaning, cut, first * cut.width)
                state |= {f"absmax{which}": scales.to(device), f"qmap{which}": meaning.to(device)}
            state[f"state{which}"] = moment.to(device)
    return state


def in_own_blocks(codes: Tensor, scales: Tensor, meaning: Tensor, cut: Cut, first: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of some numbers in a row, in blocks that begin with the first of them.

    Args:
        codes: uint8, of these numbers.
        scales: float32, of all blocks of the file.
        meaning: float32 [256], what the codes stand for.
        cut: into the parts of the file.
        first: the index of the first number in the full tensor.
    """
    pieces, same_bounds, base = [], True, 0
    for part in range(cut.parts):
        begin, end = cut.span(part)
        start, stop = max(begin, first), min(end, first + codes.numel())
        if start < stop:
            # The scales of the blocks that this part of the file shares with the numbers asked for, and how many of the
            # first block's numbers come before them.
            of_piece = scales[base + (start - begin) // BLOCK : base + -(-(stop - begin) // BLOCK)]
            pieces.append((of_piece, (start - begin) % BLOCK, stop - start))
            same_bounds = same_bounds and (begin - first) % BLOCK == 0
        base += cut.blocks(part)
    if not pieces:
        return codes, scales[:0]
    if same_bounds:
        return codes, torch.cat([of_piece for of_piece, _, _ in pieces])
    from bitsandbytes.functional import quantize_blockwise

    # Blocks begin elsewhere here: dequantise with each number's own scale, and quantise again in blocks of our own.
    each = torch.cat([s.repeat_interleave(BLOCK)[skipped : skipped + count] for s, skipped, count in pieces])
    again, kind = quantize_blockwise(meaning[codes.flatten().long()] * each, code=meaning, blocksize=BLOCK)
    return again.view(codes.shape), kind.absmax


SMALL = 4096
"""Parameters with fewer numbers keep float32 moments: bitsandbytes' own limit. Full tensors are counted, so that the
moments of a parameter are of one kind on any number of ranks."""


def in_8_bits(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW with 8-bit moments over parameter groups.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    # At import the package logs warnings about backends that it does not find on this machine.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ConfigError(
            "--optimizer adamw-8bit: the package bitsandbytes is not installed",
            hint="pip install bitsandbytes",
        ) from None
    spread = any(hasattr(parameter, "to_local") for group in groups for parameter in group["params"])
    optimizer: torch.optim.Optimizer = AdamWOfParts(groups, AdamW8bit) if spread else AdamW8bit(groups)
    return optimizer


@dataclass(frozen=True, slots=True)
class Pair:
    """A parameter that is spread over ranks, and what this rank keeps of it as a parameter of its own."""

    sharded: Any
    part: nn.Parameter
    group: dict[str, Any]
    group_of_part: dict[str, Any]
    inner: torch.optim.Optimizer


class AdamWOfParts(torch.optim.Optimizer):
    """An optimizer for parameters that FSDP2 has spread over ranks; `state` holds this rank's part of each one's.

    Args:
        groups: parameter groups.
        kind: bitsandbytes' class.
    """

    def __init__(self, groups: list[dict[str, Any]], kind: Callable[..., Any]) -> None:
        super().__init__(groups, {})
        self._pairs: list[Pair] = []
        for group in self.param_groups:
            for small in (False, True):
                sharded = [p for p in group["params"] if (p.numel() < SMALL) == small and local(p).numel()]
                if sharded:
                    parts = [nn.Parameter(local(parameter)) for parameter in sharded]
                    inner = kind([{**group, "params": parts}], min_8bit_size=sys.maxsize if small else 0)
                    given = inner.param_groups[0]
                    self._pairs += [
                        Pair(parameter, part, group, given, inner)
                        for parameter, part in zip(sharded, parts, strict=True)
                    ]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update what this rank keeps of every parameter that has a gradient."""
        assert closure is None
        for pair in self._pairs:
            # The inner optimizer has parameters of its own: it is given the shard, its gradient, its state and the
            # rate.
            pair.group_of_part["lr"] = pair.group["lr"]
            pair.part.data = local(pair.sharded)
            pair.part.grad = None if pair.sharded.grad is None else local(pair.sharded.grad)
            if pair.sharded in self.state:
                pair.inner.state[pair.part] = self.state[pair.sharded]
        for inner in {id(pair.inner): pair.inner for pair in self._pairs}.values():
            inner.step()
        for pair in self._pairs:
            if pair.part.grad is not None:
                self.state[pair.sharded] = pair.inner.state[pair.part]
                pair.part.grad = None
        self._count_empty_parts()

    def _count_empty_parts(self) -> None:
        """A parameter of which this rank keeps nothing has moments too, all of them on other ranks."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not local(parameter).numel():
                    step = 1 + self.state[parameter].get("step", 0)
                    self.state[parameter] = empty_state(parameter, step)


def empty_state(parameter: Tensor, step: int) -> dict[str, Any]:
    """The state of a part without numbers."""
    nothing = local(parameter.detach())
    if parameter.numel() < SMALL:
        return {"step": step, "state1": nothing.clone(), "state2": nothing.clone()}
    codes = {f"state{which}": torch.empty_like(nothing, dtype=torch.uint8) for which in (1, 2)}
    scales = {f"absmax{which}": nothing.new_empty(0) for which in (1, 2)}
    meanings = {f"qmap{which}": nothing.new_zeros(256) for which in (1, 2)}
    return {"step": step, **codes, **scales, **meanings}


def local(tensor: Any) -> Tensor:
    """This rank's part of a tensor that is spread over ranks; it shares its memory."""
    part: Tensor = part_here(tensor.detach())
    assert part.is_contiguous(), "bitsandbytes would update a copy"
    return part
