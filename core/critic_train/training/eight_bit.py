"""AdamW with 8-bit moments by bitsandbytes (Dettmers et al. 2022, arXiv 2110.02861), on whole parameters or on parts.

bitsandbytes knows plain tensors alone. Where parameters are spread over ranks, it is given what this rank keeps of
each: AdamW goes number by number, so that a part is updated as it is in the whole.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from critic_train.errors import ConfigError
from critic_train.model.tensor_file import part_here

SMALL = 4096
"""Parameters with fewer numbers keep float32 moments: bitsandbytes' own limit. It is the whole that counts, so that the
moments of a parameter are of one kind on any number of ranks."""


def in_8_bits(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW with 8-bit moments over parameter groups.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    # The package greets its importer with what it lacks on this machine, which is nobody's concern here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ConfigError(
            "--optimizer adamw-8bit: the package bitsandbytes is not installed",
            hint="pip install 'critic-train[8bit]'",
        ) from None
    spread = any(hasattr(parameter, "to_local") for group in groups for parameter in group["params"])
    optimizer: torch.optim.Optimizer = AdamWOfParts(groups, AdamW8bit) if spread else AdamW8bit(groups)
    return optimizer


@dataclass(frozen=True, slots=True)
class Pair:
    """A parameter that is spread over ranks, and what this rank keeps of it as a parameter of its own."""

    whole: Any
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
                wholes = [p for p in group["params"] if (p.numel() < SMALL) == small and local(p).numel()]
                if wholes:
                    parts = [nn.Parameter(local(whole)) for whole in wholes]
                    inner = kind([{**group, "params": parts}], min_8bit_size=sys.maxsize if small else 0)
                    given = inner.param_groups[0]
                    self._pairs += [
                        Pair(whole, part, group, given, inner) for whole, part in zip(wholes, parts, strict=True)
                    ]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update what this rank keeps of every parameter that has a gradient."""
        assert closure is None
        for pair in self._pairs:
            pair.group_of_part["lr"] = pair.group["lr"]
            pair.part.data = local(pair.whole)
            pair.part.grad = None if pair.whole.grad is None else local(pair.whole.grad)
            if pair.whole in self.state:
                pair.inner.state[pair.part] = self.state[pair.whole]
        for inner in {id(pair.inner): pair.inner for pair in self._pairs}.values():
            inner.step()
        for pair in self._pairs:
            if pair.part.grad is not None:
                self.state[pair.whole] = pair.inner.state[pair.part]
                pair.part.grad = None
        self._count_empty_parts()

    def _count_empty_parts(self) -> None:
        """A parameter of which this rank keeps nothing has moments too, all of them on other ranks."""
        for group in self.param_groups:
            for whole in group["params"]:
                if whole.grad is not None and not local(whole).numel():
                    self.state[whole] = empty_state(whole, 1 + self.state[whole].get("step", 0))


def empty_state(whole: Tensor, step: int) -> dict[str, Any]:
    """The state of a part without numbers."""
    nothing = local(whole.detach())
    if whole.numel() < SMALL:
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
