"""An exponential moving average of the weights that are trained (Polyak and Juditsky 1992), with which a run is judged.

    average <- d_t average + (1 - d_t) weights after step t,    d_t = min(decay, (1 + t) / (10 + t))

as tf.train.ExponentialMovingAverage begins, so that the first steps do not count for as long as the last. Training goes
on with the weights themselves. Held-out figures are those of the average, and the weights of a checkpoint too: whoever
loads it gets the critic that was judged. The weights that training goes on with lie beside them in a file of their own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from critic_train.errors import ModelError, first_line
from critic_train.model.critic import Critic
from critic_train.model_files.gather import Gather
from critic_train.model_files.tensor_file import part_here, read_rows, write_tensors
from critic_train.run.storage import library_writes

WEIGHTS_FILE = "optimizer_weights.safetensors"
"""Of a checkpoint: the weights that training goes on with, of trunk and head. Only a resumed run reads it."""
PIECE = 2**20
"""Numbers that are exchanged at once, where memory may have run out."""


class WeightAverage:
    """The average of a critic's trained weights, each rank keeping that of its shards; the next-token head has none.

    Args:
        critic: on its device or sharded, with the parameters that will be trained.
        decay: the most that is kept of the average at each step, in [0, 1).
    """

    def __init__(self, critic: Critic, decay: float) -> None:
        self._weights = critic.averaged_parameters()
        self._averages = {name: torch.empty_like(p, requires_grad=False) for name, p in self._weights.items()}
        self._decay = decay
        self._begun = self._exchanged = False

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the weights after a step; `steps` have been taken, this one counted."""
        weights, averages = self._parts()
        if self._begun:
            torch._foreach_lerp_(averages, weights, 1.0 - min(self._decay, (1 + steps) / (10 + steps)))
        else:
            torch._foreach_copy_(averages, weights)
        self._begun = True

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the critic has the average as its weights; before the first step it is what it is."""
        if not self._begun or self._exchanged:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def save_weights(self, directory: Path | None, gather: Gather | None = None) -> None:
        """Write the weights that training goes on with; with `gather`, all ranks call it, with None but on rank 0."""
        if not self._begun:
            return
        tensors = {
            name: tensor.detach() for name, tensor in (self._averages if self._exchanged else self._weights).items()
        }
        file = None if directory is None else directory / WEIGHTS_FILE
        if gather is not None:
            write_tensors(file, tensors, lambda name: gather(tensors[name]))
            return
        assert file is not None
        with library_writes(file):
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)

    @torch.no_grad()
    def load(self, checkpoint: Path) -> None:
        """Put back what `save_weights` wrote; the critic has the checkpoint's own weights, which are the average.

        Raises:
            ModelError: the file belongs to another model.
        """
        file = checkpoint / WEIGHTS_FILE
        if not file.exists():  # of step 0, when there was no average yet
            return
        weights, averages = self._parts()
        torch._foreach_copy_(averages, weights)
        self._begun = True
        for name, parameter in self._weights.items():
            try:
                read_rows(file, name, parameter)
            except (RuntimeError, SafetensorError) as error:
                raise ModelError(f"{file}: {name} does not fit this model: {first_line(error)}") from error

    @torch.no_grad()
    def _exchange(self) -> None:
        self._exchanged = not self._exchanged
        for weight, average in zip(*self._parts(), strict=True):
            for one, other in zip(_pieces(weight), _pieces(average), strict=True):
                before = one.clone()
                one.copy_(other)
                other.copy_(before)

    def _parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """(weights, averages) of this rank, in one order; they share the memory of what they are parts of."""
        weights = [part_here(parameter.detach()) for parameter in self._weights.values()]
        return weights, [part_here(average) for average in self._averages.values()]


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Rows of a tensor, at most about PIECE numbers at a time."""
    rows = tensor.reshape(1) if tensor.ndim == 0 else tensor
    yield from rows.split(max(1, PIECE // max(1, rows[:1].numel())))
