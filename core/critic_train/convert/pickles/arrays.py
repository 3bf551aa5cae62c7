"""Tensors and arrays out of what a pickle says of them: views on the file's bytes, checked before they are made."""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from critic_train.convert.pickles.budget import Budget, RefusedError
from critic_train.convert.pickles.machine import Machine, Unfinished

MOST_DIMENSIONS = 8
BFLOAT16 = "bfloat16"
TORCH_TYPES = {
    "float32": "<f4", "float64": "<f8", "float16": "<f2", BFLOAT16: "<u2", "int64": "<i8", "int32": "<i4",
    "int16": "<i2", "int8": "|i1", "uint8": "|u1", "bool": "|b1", "uint16": "<u2", "uint32": "<u4", "uint64": "<u8",
}  # fmt: skip
"""torch's dtype -> how its bytes are read; bfloat16 becomes float32."""
SIMPLE_TYPE = re.compile(r"[biufUSO]\d{1,9}")


@dataclass(frozen=True, slots=True)
class Storage:
    """The bytes under tensors. `kind` is a key of TORCH_TYPES, or None where the tensor says it."""

    content: memoryview
    kind: str | None


def tensor(storage: Any, offset: Any, shape: Any, strides: Any, kind: str | None, budget: Budget) -> NDArray[Any]:
    """A tensor on a storage.

    Args:
        storage: a Storage.
        offset: first element, in elements.
        shape: its size in each dimension.
        strides: elements from one to the next in each dimension.
        kind: its dtype where the storage has none.
        budget: what may be built; a tensor that repeats its storage, or must be converted, is paid for.

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
    flat = np.frombuffer(storage.content, dtype=TORCH_TYPES[name])
    count = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if count and last >= len(flat):
        raise RefusedError(f"a tensor that reaches to element {last:,} of a storage of {len(flat):,}")
    if count > len(flat) - offset:
        budget.spend(count * flat.itemsize)
    steps = tuple(stride * flat.itemsize for stride in strides)
    view = np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)
    return from_bfloat16(view, budget) if name == BFLOAT16 else view


def array(content: Any, kind: "np.dtype[Any]", shape: Any, *, fortran: bool = False) -> NDArray[Any]:
    """An array whose bytes are all there.

    Raises:
        RefusedError: they are not.
    """
    if not isinstance(content, bytes | memoryview | np.ndarray):
        raise RefusedError(f"an array made of a {type(content).__name__}")
    shape = sizes(shape)
    if math.prod(shape) * kind.itemsize != len(content):
        raise RefusedError(f"an array of shape {shape} in {len(content):,} bytes")
    return np.frombuffer(content, dtype=kind).reshape(shape, order="F" if fortran else "C")


def torch_array(content: Any, name: Any, shape: Any, budget: Budget) -> NDArray[Any]:
    """The same, of a dtype as torch names it (`int64`, `torch.int64`)."""
    name = name.removeprefix("torch.") if type(name) is str else name
    if name not in TORCH_TYPES:
        raise RefusedError(f"a tensor of {name}")
    whole = array(content, np.dtype(TORCH_TYPES[name]), shape)
    return from_bfloat16(whole, budget) if name == BFLOAT16 else whole


def bytes_of(part: NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes of an array, uint8 [n]."""
    return np.ascontiguousarray(part).reshape(-1).view(np.uint8)


def from_bfloat16(bits: NDArray[np.uint16], budget: Budget) -> NDArray[np.float32]:
    """float32 of the same values: bfloat16 is its upper half."""
    budget.spend(8 * bits.size)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def sizes(shape: Any) -> tuple[int, ...]:
    """A shape, checked to be one."""
    if not isinstance(shape, tuple | list) or len(shape) > MOST_DIMENSIONS:
        raise RefusedError("a shape that is none")
    if any(type(size) is not int or not 0 <= size < 2**48 for size in shape):
        raise RefusedError(f"a shape of {shape}")
    return tuple(shape)


class NumpyType(Unfinished):
    """numpy.dtype while its byte order is missing; numbers, texts, bytes and objects only."""

    __slots__ = ("text",)

    def __init__(self, text: Any) -> None:
        super().__init__()
        if type(text) is not str or not SIMPLE_TYPE.fullmatch(text):
            raise RefusedError(f"an array of type {text!r}")
        self.text = text

    def finish(self, state: Any, machine: Machine) -> "np.dtype[Any]":
        """The type, given (version, byte order, ...)."""
        if type(state) is not tuple or len(state) < 5 or any(part is not None for part in state[2:5]):
            raise RefusedError("an array type with parts")
        if state[1] not in ("<", "|", "=", ">"):
            raise RefusedError(f"a byte order {state[1]!r}")
        return self.plain().newbyteorder(state[1])

    def plain(self) -> "np.dtype[Any]":
        """The type as it is without a state."""
        return np.dtype(self.text)


class NumpyArray(Unfinished):
    """numpy.ndarray while its content is missing."""

    __slots__ = ()

    def finish(self, state: Any, machine: Machine) -> Any:
        """The array, given (version, shape, type, Fortran order, content); a list where it is one of objects."""
        if type(state) is not tuple or len(state) != 5:
            raise RefusedError("an array with an unknown state")
        _, shape, kind, fortran, content = state
        kind = numpy_type(kind)
        if not kind.hasobject:
            return array(content, kind, shape, fortran=bool(fortran))
        shape = sizes(shape)
        if type(content) is not list or len(content) != math.prod(shape) or len(shape) > 1:
            raise RefusedError(f"an array of objects of shape {shape}")
        return content


def numpy_type(kind: Any) -> "np.dtype[Any]":
    """A finished type, or one that needs no state."""
    if isinstance(kind, NumpyType):
        return kind.plain()
    if not isinstance(kind, np.dtype):
        raise RefusedError(f"a {type(kind).__name__} where the type of an array belongs")
    return kind
