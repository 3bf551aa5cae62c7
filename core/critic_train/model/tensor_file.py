"""Read and write safetensors files one tensor at a time: of a sharded model no process ever holds all tensors.

The bytes written are those of `safetensors.torch.save_file` for the same tensors: the format is a length, a JSON
header and the data end to end (https://github.com/huggingface/safetensors#format).
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from critic_train.run.storage import File

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8


def write_tensors(
    path: Path | None,
    tensors: dict[str, Tensor],
    full: Callable[[str], Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write tensors that may be sharded over several processes.

    Args:
        path: the file; None on processes that only help to gather tensors.
        tensors: name -> tensor, with the shape and dtype of the full one.
        full: gives the full tensor of a name; called for one at a time and in the same order on every process.
        metadata: for the file's header.

    Raises:
        OSError: the disk is full or not writable. It is raised at the end, for the other processes still wait for this
            one at every tensor.
    """
    # The library's own order: larger items first, which keeps all of them aligned, then by name.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    begin = 0
    for name in names:
        tensor = tensors[name]
        end = begin + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    failure: OSError | None = None
    with ExitStack() as files:
        file: File | None = None
        try:
            if path is not None:
                file = files.enter_context(File(path, "create"))
                file.write(len(text).to_bytes(8, "little") + text)
        except OSError as error:
            failure = error
        for name in names:
            tensor = full(name)
            if file is not None and failure is None:
                try:
                    file.write(bytes_of(tensor))
                except OSError as error:
                    failure = error
    if failure is not None:
        raise failure


def bytes_of(tensor: Tensor) -> memoryview:
    """The numbers of a tensor, without a copy where it is contiguous and on the CPU."""
    data: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(data)


def read_rows(file: Path, name: str, target: Tensor) -> None:
    """Fill a tensor from a file; of one that is sharded over ranks, only this rank's rows are read.

    Args:
        file: the safetensors file.
        name: of the tensor in it; it has the shape of the full `target`.
        target: filled in place.
    """
    with safe_open(file, framework="pt") as tensors, torch.no_grad():
        if not hasattr(target, "to_local"):
            target.copy_(tensors.get_tensor(name).reshape(target.shape))
            return
        first, last = rows_here(target)
        if first < last:
            target.to_local().copy_(tensors.get_slice(name)[first:last])


def part_here(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded over ranks; it shares its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def rows_here(tensor: Tensor) -> tuple[int, int]:
    """(first, one past the last) row of this rank's part."""
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    first, last = rows_of(mesh.get_local_rank(), mesh.size(), tensor.shape[0])
    assert tensor.to_local().shape[0] == last - first  # type: ignore[attr-defined]
    return first, last


def rows_of(rank: int, ranks: int, rows: int) -> tuple[int, int]:
    """(first, one past the last) row of a rank's part: FSDP2 cuts along the first dimension, as torch.chunk does."""
    per_rank = -(-rows // ranks)
    first = min(rows, rank * per_rank)
    return first, min(rows, first + per_rank)
