"""Tensors and arrays of a pickled dump: views on the file's bytes, checked before they are made.

Objects that a pickle could hand a state to (BUILD) define `__setstate__` themselves, so that the unpickler never writes
to their attributes.
"""

import math
import re
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from critic_train.errors import DataError

MOST_DIMENSIONS = 8
BFLOAT16 = "bfloat16"
TORCH_TYPES = {
    "float32": "<f4", "float64": "<f8", "float16": "<f2", BFLOAT16: "<u2", "int64": "<i8", "int32": "<i4",
    "int16": "<i2", "int8": "|i1", "uint8": "|u1", "bool": "|b1", "uint16": "<u2", "uint32": "<u4", "uint64": "<u8",
}  # fmt: skip
"""torch's dtype -> how its bytes are read; bfloat16 becomes float32."""
ITEM_BYTES = {name: np.dtype(kind).itemsize for name, kind in TORCH_TYPES.items()}
STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": None,
}  # fmt: skip
"""torch's storage class -> the dtype of its elements."""
SIMPLE_TYPE = re.compile(r"[biufUSO]\d{1,9}")
MOST_NESTED = 4
"""How many tensor dictionaries may lie in one another."""
RAGGED = ("<NJT_VALUES>", "<NJT_LENGTHS>", "<NJT_OFFSETS>")


class RefusedError(DataError):
    """The file holds something that is not built, or claims what it does not hold."""


class Memory:
    """Bytes that may still be made of one dump, beyond what the unpickler itself allocates.

    Args:
        limit_bytes: at the start.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.left = limit_bytes

    def spend(self, count: int) -> None:
        """Take `count` bytes, before they are allocated.

        Raises:
            RefusedError: they are not left.
        """
        self.left -= count
        if self.left < 0:
            raise self.error()

    def error(self) -> RefusedError:
        """What is raised where a dump comes to more."""
        return RefusedError(
            f"what it describes takes more than {self.limit_bytes / 2**30:,.2g} GiB in memory",
            hint="no rollout dump of its size holds as much; write smaller dumps, or check where it comes from",
        )


class Storage:
    """The bytes under tensors. `kind` is a key of TORCH_TYPES, or None where the tensor names it."""

    __slots__ = ("content", "kind")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, content: memoryview, kind: str | None) -> None:
        self.content = content
        self.kind = kind

    def __setstate__(self, state: Any) -> NoReturn:
        raise RefusedError("it gives a state to a storage")


class DumpArray(np.ndarray[Any, Any]):
    """An array of a dump, read-only once it has its content; numpy's own `__setstate__` is out of a pickle's reach."""

    def __setstate__(self, state: Any) -> None:
        """Take (version, shape, type, Fortran order, content)."""
        if not self.flags.writeable:
            raise RefusedError("it gives a state to an array that has its content")
        if not isinstance(state, tuple) or len(state) != 5:
            raise RefusedError("an array with an unknown state")
        _, shape, kind, fortran, content = state
        dtype, shape = dtype_of(kind), sizes(shape)
        if not dtype.hasobject:
            _check_size(content, dtype, shape)
            content = bytes(content)
        elif type(content) is list and len(content) == math.prod(shape) and len(shape) <= 1:
            shape = (len(content),)
        else:
            raise RefusedError(f"an array of objects of shape {shape}")
        super().__setstate__((1, shape, dtype, bool(fortran), content))  # type: ignore[arg-type]
        self.flags.writeable = False


class NumpyType:
    """A numpy dtype of numbers, texts, bytes or objects; its state gives the byte order."""

    __slots__ = ("dtype",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, text: Any) -> None:
        if type(text) is not str or not SIMPLE_TYPE.fullmatch(text):
            raise RefusedError(f"an array of type {text!r}" if type(text) is str else "an array type that is no text")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        """Take (version, byte order, ...)."""
        if not isinstance(state, tuple) or len(state) < 5 or any(part is not None for part in state[2:5]):
            raise RefusedError("a structured array type")
        if state[1] not in ("<", "|", "=", ">"):
            raise RefusedError("an unknown byte order")
        self.dtype = self.dtype.newbyteorder(state[1])


def tensor(
    memory: Memory, storage: Any, offset: Any, shape: Any, strides: Any, kind: str | None = None
) -> NDArray[Any]:
    """A tensor on a storage.

    Args:
        memory: pays for a tensor that repeats its storage, or must be converted.
        storage: a Storage.
        offset: first element, in elements.
        shape: its size in each dimension.
        strides: elements from one to the next in each dimension.
        kind: its dtype where the storage has none.

    Raises:
        RefusedError: it reaches outside of its storage, or is none of the above.
    """
    if not isinstance(storage, Storage):
        raise RefusedError("a tensor without a storage")
    name = storage.kind or kind
    if name not in TORCH_TYPES:
        raise RefusedError(f"a tensor of {name}")
    shape, strides = sizes(shape), sizes(strides)
    if len(shape) != len(strides) or type(offset) is not int or offset < 0:
        raise RefusedError("a tensor whose shape and strides disagree")
    item = ITEM_BYTES[name]
    there, count = len(storage.content) // item, math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if count and last >= there:
        raise RefusedError(f"a tensor that reaches to element {last:,} of a storage of {there:,}")
    if count > there - offset:
        memory.spend(count * item)
    if not count:
        return _finished(np.empty(shape, np.float32 if name == BFLOAT16 else TORCH_TYPES[name]))
    steps = tuple(stride * item for stride in strides)
    made = DumpArray(shape, TORCH_TYPES[name], storage.content, offset * item, steps)
    return _from_bfloat16(made, memory) if name == BFLOAT16 else made


def torch_array(content: Any, name: Any, shape: Any, memory: Memory) -> NDArray[Any]:
    """An array whose bytes are all there, of a dtype as torch names it (`int64`, `torch.int64`).

    Raises:
        RefusedError: they are not there, or the dtype is unknown.
    """
    name = name.removeprefix("torch.") if type(name) is str else type(name).__name__
    if name not in TORCH_TYPES:
        raise RefusedError(f"a tensor of {name}")
    made = array(content, np.dtype(TORCH_TYPES[name]), shape)
    return _from_bfloat16(made, memory) if name == BFLOAT16 else made


def array(content: Any, kind: "np.dtype[Any]", shape: Any, *, fortran: bool = False) -> NDArray[Any]:
    """An array whose bytes are all there.

    Raises:
        RefusedError: they are not.
    """
    shape = sizes(shape)
    _check_size(content, kind, shape)
    return _finished(np.frombuffer(content, dtype=kind).reshape(shape, order="F" if fortran else "C"))


def sizes(shape: Any) -> tuple[int, ...]:
    """A shape or strides as a tuple.

    Raises:
        RefusedError: it is none.
    """
    if not isinstance(shape, tuple | list) or len(shape) > MOST_DIMENSIONS:
        raise RefusedError("a shape that is none")
    for size in shape:
        if type(size) is not int or not 0 <= size < 2**48:
            raise RefusedError(f"a shape of {size if type(size) is int else type(size).__name__}")
    return tuple(shape)


def _finished(made: NDArray[Any]) -> NDArray[Any]:
    made.flags.writeable = False
    return made.view(DumpArray)


def _check_size(content: Any, kind: "np.dtype[Any]", shape: tuple[int, ...]) -> None:
    if not isinstance(content, bytes | bytearray | memoryview | np.ndarray):
        raise RefusedError(f"an array made of a {type(content).__name__}")
    if math.prod(shape) * kind.itemsize != len(content):
        raise RefusedError(f"an array of shape {shape} in {len(content):,} bytes")


def _bytes_of(part: NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes of an array, uint8 [n]."""
    return np.ascontiguousarray(part).reshape(-1).view(np.uint8)


def _from_bfloat16(bits: NDArray[np.uint16], memory: Memory) -> NDArray[np.float32]:
    """float32 of the same values: bfloat16 is its upper half."""
    memory.spend(8 * bits.size)
    return _finished((bits.astype(np.uint32) << np.uint32(16)).view(np.float32))


def dtype_of(kind: Any) -> "np.dtype[Any]":
    if not isinstance(kind, NumpyType):
        raise RefusedError(f"a {type(kind).__name__} where the type of an array belongs")
    return kind.dtype


def nested_tensor(memory: Memory, buffer: Any, shapes: Any, _: Any, starts: Any) -> list[Any]:
    """torch._utils._rebuildnested_tensor: a buffer, and size, strides and offset of each part."""
    shapes, starts = np.asarray(shapes), np.asarray(starts).ravel()
    if not isinstance(buffer, np.ndarray) or shapes.ndim != 2 or len(shapes) != len(starts):
        raise RefusedError("a nested tensor with an unknown state")
    counts = shapes.prod(axis=1)
    return [
        array(_bytes_of(buffer[start : start + count]), buffer.dtype, shape)
        for start, count, shape in zip(starts.tolist(), counts.tolist(), shapes.tolist(), strict=True)
    ]


def consolidated_tensors(memory: Memory, layout: Any, storage: Any, depth: int = 0) -> dict[str, Any]:
    """A TensorDict whose tensors lie in one storage: name -> (dtype, shape, start, stop, padding, ...)."""
    if type(layout) is not dict or not isinstance(storage, np.ndarray) or depth > MOST_NESTED:
        raise RefusedError("a TensorDict with an unknown layout")
    tensors: dict[str, Any] = {}
    ragged: dict[str, Any] = {}
    for key, (kind, shape, start, stop, padding, *_) in layout["leaves"].items():
        content = _bytes_of(storage[start:stop])
        if padding:
            content = content[: len(content) - int(padding)]
        value = torch_array(content, kind, shape, memory)
        mark = next((mark for mark in RAGGED if str(key).startswith(mark)), "")
        ragged[key] = value
        if mark == RAGGED[-1]:
            name = key.removeprefix(mark)
            tensors[name] = _rows_of(ragged[RAGGED[0] + name], value, ragged.get(RAGGED[1] + name))
        elif not mark:
            tensors[key] = value
    tensors |= {key: data[0] for key, data in layout.get("non_tensors", {}).items()}
    inner = [key for key in layout if key not in ("leaves", "non_tensors", "cls", "cls_metadata", "size")]
    return tensors | {key: consolidated_tensors(memory, layout[key], storage, depth + 1) for key in inner}


def _rows_of(values: Any, offsets: Any, lengths: Any) -> list[Any]:
    """A jagged tensor as one array a row."""
    starts = offsets[:-1]
    stops = offsets[1:] if lengths is None else starts + lengths
    return [values[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
