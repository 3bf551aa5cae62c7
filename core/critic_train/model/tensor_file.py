"""Read and write safetensors files piece by piece: tensors that are spread over several processes are never all held.

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
    whole: Callable[[str], Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write tensors that are perhaps held in parts by several processes.

    Args:
        path: the file; None on processes that only help to make tensors whole.
        tensors: name -> tensor; its shape and dtype are those of the whole.
        whole: gives the whole tensor of a name; asked for one at a time and in the same order on every process.
        metadata: kept in the header.

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
    fault: OSError | None = None
    with ExitStack() as files:
        file: File | None = None
        try:
            if path is not None:
                file = files.enter_context(File(path, "create"))
                file.write(len(text).to_bytes(8, "little") + text)
        except OSError as error:
            fault = error
        for name in names:
            tensor = whole(name)
            if file is not None and fault is None:
                try:
                    file.write(_bytes_of(tensor))
                except OSError as error:
                    fault = error
    if fault is not None:
        raise fault


def _bytes_of(tensor: Tensor) -> memoryview:
    data: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(data)


def read_rows(file: Path, name: str, target: Tensor) -> None:
    """Fill a tensor from a file; of one that is spread over ranks, this rank's rows, and no others are read.

    Args:
        file: the safetensors file.
        name: of the tensor in it; its shape is that of the whole `target`.
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
    """This rank's part of a tensor that may be spread over ranks; it shares its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def rows_here(tensor: Tensor) -> tuple[int, int]:
    """(first, one past the last) row of this rank's part: FSDP2 cuts along the first dimension, as torch.chunk does."""
    mesh, rows = tensor.device_mesh, tensor.shape[0]  # type: ignore[attr-defined]
    each = -(-rows // mesh.size())
    first = min(rows, mesh.get_local_rank() * each)
    last = min(rows, first + each)
    assert tensor.to_local().shape[0] == last - first  # type: ignore[attr-defined]
    return first, last
