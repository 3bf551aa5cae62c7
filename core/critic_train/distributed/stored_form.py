"""Weights in the form in which transformers stores them, where that is another than in memory, a layer at a time.

A mixture of experts, for example, holds all experts of a layer in one tensor and stores each expert by itself. What
turns one form into the other looks at one layer at a time, so that no process needs the whole model for it.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

UP_TO_THE_FIRST_NUMBER = re.compile(r"(.*?\.\d+)\.")


class StoredForm:
    """The tensors that a checkpoint of a sharded model holds.

    Attributes:
        tensors: name in the file -> shape and dtype, on "meta", in transformers' order.

    Args:
        model: the class that is written; transformers looks up what it does to its weights.
        held: name in memory -> tensor, of the whole's shape.
        whole: the whole of a tensor in memory, by name; all ranks call it together.
        leads: whether this rank needs what comes out.
    """

    def __init__(self, model: Any, held: dict[str, Tensor], whole: Callable[[str], Tensor], *, leads: bool) -> None:
        self._model, self._whole, self._leads = model, whole, leads
        outlines = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in held.items()}
        self.tensors: dict[str, Tensor] = revert_weight_conversion(model, outlines)
        self._members: dict[str, list[str]] = defaultdict(list)
        for name in held:
            self._members[_group_of(name)].append(name)
        self._source: dict[str, str] = {}
        self._parted: dict[str, Tensor] = {}
        for group, names in self._members.items():
            made = revert_weight_conversion(model, {name: outlines[name] for name in names})
            self._source |= dict.fromkeys(made, group)
            self._parted |= made
        self._group = ""
        self._here: dict[str, Tensor] = {}

    @property
    def layer_by_layer(self) -> bool:
        """Whether the layers by themselves come to what all of them together do."""
        shapes = [{name: (t.shape, t.dtype) for name, t in made.items()} for made in (self.tensors, self._parted)]
        return shapes[0] == shapes[1]

    def tensor(self, name: str) -> Tensor:
        """A stored tensor; all ranks ask for the same. Those that do not lead get its outline.

        Its layer is held until another one is asked for.
        """
        group = self._source[name]
        if group != self._group:
            self._here = {}
            self._group = group
            found: dict[str, Tensor] = {}
            for member in self._members[group]:
                tensor = self._whole(member)
                if self._leads:
                    found[member] = tensor.detach().cpu()
            self._here = revert_weight_conversion(self._model, found) if self._leads else {}
        return self._here[name] if self._leads else self.tensors[name]


def _group_of(name: str) -> str:
    """What a tensor in memory is converted with: its layer, or where it is in none, itself."""
    layer = UP_TO_THE_FIRST_NUMBER.match(name)
    return name if layer is None else layer[1]
