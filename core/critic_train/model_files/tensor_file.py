"""Read and write safetensors files one tensor at a time: of a sharded model no process ever holds all tensors.

The bytes written are those of `safetensors.torch.save_file` for the same tensors: the format is a length, a JSON
header and the data end to end (https://github.com/huggingface/safetensors#format).
"""

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from critic_train.errors import ModelError, first_line
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
FLOATING = {"F64", "F32", "F16", "BF16"}
"""Types of weights that are not quantized, as the format names them."""
ALIGNMENT = 8
LFS_POINTER = b"version https://git-lfs.github.com/"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor in a safetensors file, by the file's header.

    Attributes:
        file: the file.
        name: of the tensor in it.
        dtype: as the format names it, as in "BF16".
        shape: its dimensions.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def outline(self) -> str:
        """Name and shape, for messages."""
        return f"{self.name} {list(self.shape)}"

    def load(self) -> Tensor:
        """The tensor, on the CPU."""
        with safe_open(self.file, framework="pt") as tensors:
            return tensors.get_tensor(self.name)  # type: ignore[no-any-return]

    def on_meta(self) -> Tensor:
        """Its shape and type, without memory."""
        kind = next(kind for kind, name in DTYPES.items() if name == self.dtype)
        return torch.empty(self.shape, dtype=kind, device="meta")


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Name -> tensor, of all tensors of some files; nothing but headers is read.

    Raises:
        ModelError: a file is damaged or no safetensors file.
    """
    stored: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    part = tensors.get_slice(name)
                    stored[name] = StoredTensor(
                        file=file, name=name, dtype=part.get_dtype(), shape=tuple(part.get_shape())
                    )
        except (OSError, SafetensorError) as error:
            if _is_lfs_pointer(file):
                raise ModelError(
                    f"{file} is a git-lfs pointer, not the weights themselves",
                    hint=f"git lfs pull in {file.parent} fetches them",
                ) from error
            raise ModelError(f"{file} is damaged or no safetensors file: {first_line(error)}") from error
    return stored


def _is_lfs_pointer(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(LFS_POINTER)) == LFS_POINTER


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


def copy_rows(source: Tensor, target: Tensor) -> None:
    """Copy a full tensor into one that may be sharded over ranks: this rank's rows."""
    with torch.no_grad():
        if not hasattr(target, "to_local"):
            target.copy_(source)
            return
        first, last = rows_here(target)
        target.to_local().copy_(source[first:last])


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
