"""Full tensors from shards: by a collective, or through files where memory ran out and collectives hang.

Either way all ranks go through the same tensors in the same order.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from critic_train.model_files.tensor_file import bytes_of, rows_of
from critic_train.run.storage import File

Gather = Callable[[Tensor], Tensor]
"""Gives the full tensor of one that may be sharded."""


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be sharded, gathered from all ranks; all of them call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class PartWriter:
    """A Gather that collects nothing: it writes this rank's rows of every tensor to a file, one after the other.

    Args:
        file: of this rank.
        report_progress: called after every tensor.
    """

    def __init__(self, file: File, report_progress: Callable[[], None]) -> None:
        self._file, self._report_progress = file, report_progress

    def __call__(self, tensor: Tensor) -> Tensor:
        """Write the rows; returns a tensor of the full shape, whose content is not read."""
        if isinstance(tensor, DTensor):
            self._file.write(bytes_of(tensor.to_local()))
            self._report_progress()
        return torch.empty(tensor.shape, dtype=tensor.dtype)


class PartReader:
    """A Gather for rank 0 that reads the other ranks' rows from the files that their PartWriters have written.

    Args:
        paths: of ranks 1, 2, ... in this order.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._open = ExitStack()
        self._files: list[BinaryIO] = []

    def __enter__(self) -> "PartReader":
        self._files = [self._open.enter_context(path.open("rb", buffering=0)) for path in self._paths]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def __call__(self, tensor: Tensor) -> Tensor:
        """The full tensor, on the CPU. Raises OSError where a file ends too early."""
        if not isinstance(tensor, DTensor):
            return tensor
        full = torch.empty(tensor.shape, dtype=tensor.dtype)
        own = tensor.to_local().detach()
        full[: len(own)] = own.cpu()
        for rank, file in enumerate(self._files, start=1):
            first, last = rows_of(rank, len(self._files) + 1, len(full))
            _read_into(file, bytes_of(full[first:last]))
        return full


def _read_into(file: BinaryIO, target: memoryview) -> None:
    while len(target):
        count = file.readinto(target)  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"{file.name} ends too early")
        target = target[count:]


def as_rows_of(like: DTensor, part: Tensor) -> DTensor:
    """A DTensor made of this rank's rows [r, ...], sharded as `like`, which has the full shape, is."""
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def concat_over_ranks(like: DTensor, numbers: Tensor, lengths: list[int], gather: Gather) -> Tensor:
    """The numbers of all ranks, concatenated. All ranks call it.

    Args:
        like: sharded over these ranks.
        numbers: 1-d, of this rank.
        lengths: how many numbers each rank has.
        gather: of the full tensors.
    """
    padded = numbers.new_zeros(max(lengths))
    padded[: len(numbers)] = numbers
    rows = gather(DTensor.from_local(padded[None], like.device_mesh, like.placements, run_check=False))
    return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])
