"""Every name that a rollout dump may use, and what is built for it. What is not here is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np

from critic_train.convert.pickles.arrays import (
    TORCH_TYPES,
    NumpyArray,
    NumpyType,
    array,
    bytes_of,
    numpy_type,
    tensor,
    torch_array,
)
from critic_train.convert.pickles.budget import RefusedError
from critic_train.convert.pickles.machine import Machine, Name, Unfinished, checked_key

STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": None,
}  # fmt: skip
"""torch's storage class -> the dtype of its elements."""

DEEPEST = 4
"""How many tensor dictionaries may lie in one another."""
RAGGED = ("<NJT_VALUES>", "<NJT_LENGTHS>", "<NJT_OFFSETS>")


class Saved(Unfinished):
    """An instance of a class that keeps all it has in its state."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def finish(self, state: Any, machine: Machine) -> Any:
        """What the class would hold."""
        if self.text == "verl.protocol.DataProto":
            return DataProtoState(state)
        if self.text == "slime.utils.tensor_store.DiskTensorRef":
            return None
        return _tensor_dict_of(state)


class DataProtoState:
    """What `DataProto.save_to_disk` keeps: (batch, arrays that are no tensors, meta)."""

    __slots__ = ("batch", "meta", "others")

    def __init__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 3:
            raise RefusedError("a DataProto with an unknown state")
        self.batch, self.others, self.meta = state


def _tensor_v2(given: tuple[Any, ...], machine: Machine) -> Any:
    storage, offset, shape, strides, *_ = given
    return tensor(storage, offset, shape, strides, None, machine.budget)


def _tensor_v3(given: tuple[Any, ...], machine: Machine) -> Any:
    storage, offset, shape, strides, _, _, kind, *_ = given
    named = kind.text.removeprefix("torch.") if isinstance(kind, Name) else None
    return tensor(storage, offset, shape, strides, named, machine.budget)


def _nested_tensor(given: tuple[Any, ...], machine: Machine) -> list[Any]:
    """torch._utils._rebuild_nested_tensor: a buffer, and size, strides and offset of each part."""
    buffer, shapes, _, starts = given
    shapes, starts = np.asarray(shapes), np.asarray(starts).ravel()
    if not isinstance(buffer, np.ndarray) or shapes.ndim != 2 or len(shapes) != len(starts):
        raise RefusedError("a nested tensor with an unknown state")
    counts = shapes.prod(axis=1)
    return [
        array(bytes_of(buffer[start : start + count]), buffer.dtype, shape)
        for start, count, shape in zip(starts.tolist(), counts.tolist(), shapes.tolist(), strict=True)
    ]


def _first(given: tuple[Any, ...], machine: Machine) -> Any:
    return given[0]


def _ordered(given: tuple[Any, ...], machine: Machine) -> dict[Any, Any]:
    """An OrderedDict or defaultdict as it begins: empty; its entries are set one by one."""
    if len(given) > 1 or (given and given[0] is not None and not isinstance(given[0], Name)):
        raise RefusedError("a dictionary made of something")
    return {}


def _collection(kind: type[Any], items_of: tuple[type, ...]) -> Callable[[tuple[Any, ...], Machine], Any]:
    def build(given: tuple[Any, ...], machine: Machine) -> Any:
        items: Any = given[0] if given else ()
        if len(given) > 1 or type(items) not in (*items_of, tuple):
            raise RefusedError(f"a {kind.__name__} made of a {type(items).__name__}")
        machine.budget.spend(100 * len(items))
        return kind([checked_key(item) for item in items] if kind in (set, frozenset) else items)

    return build


def _encode(given: tuple[Any, ...], machine: Machine) -> bytes:
    """Bytes as protocol 2 writes them: text to be encoded."""
    if len(given) != 2 or type(given[0]) is not str or given[1] != "latin1":
        raise RefusedError("text in an unknown encoding")
    machine.budget.spend(len(given[0]))
    return given[0].encode("latin1")


def _numpy_type(given: tuple[Any, ...], machine: Machine) -> NumpyType:
    return NumpyType(given[0])


def _numpy_array(given: tuple[Any, ...], machine: Machine) -> NumpyArray:
    return NumpyArray()


def _numpy_scalar(given: tuple[Any, ...], machine: Machine) -> Any:
    if len(given) != 2:
        raise RefusedError("a number made of something")
    kind = numpy_type(given[0])
    return given[1] if kind.hasobject else array(given[1], kind, ()).item()


def _numpy_buffer(given: tuple[Any, ...], machine: Machine) -> Any:
    content, kind, shape, order = given
    return array(content, numpy_type(kind), shape, fortran=order == "F")


def _tensor_dict(given: tuple[Any, ...], machine: Machine) -> dict[str, Any]:
    return _tensor_dict_of(given[1])


def _tensor_dict_of(state: Any) -> dict[str, Any]:
    found = state.get("_tensordict") if type(state) is dict else None
    if type(found) is not dict:
        raise RefusedError("a TensorDict with an unknown state")
    return found


def _consolidated(given: tuple[Any, ...], machine: Machine, depth: int = 0) -> dict[str, Any]:
    """A TensorDict whose tensors lie in one storage: name -> (dtype, shape, start, stop, padding, ...)."""
    described, storage = given
    if type(described) is not dict or not isinstance(storage, np.ndarray) or depth > DEEPEST:
        raise RefusedError("a TensorDict with an unknown layout")
    found: dict[str, Any] = {}
    ragged: dict[str, Any] = {}
    for key, (kind, shape, start, stop, padding, *_) in described["leaves"].items():
        content = bytes_of(storage[start:stop])
        if padding:
            content = content[: len(content) - int(padding)]
        value = torch_array(content, kind, shape, machine.budget)
        mark = next((mark for mark in RAGGED if str(key).startswith(mark)), "")
        ragged[key] = value
        if mark == RAGGED[-1]:
            name = key.removeprefix(mark)
            found[name] = _pieces(ragged[RAGGED[0] + name], value, ragged.get(RAGGED[1] + name))
        elif not mark:
            found[key] = value
    found |= {key: data[0] for key, data in described.get("non_tensors", {}).items()}
    inner = [key for key in described if key not in ("leaves", "non_tensors", "cls", "cls_metadata", "size")]
    return found | {key: _consolidated((described[key], storage), machine, depth + 1) for key in inner}


def _pieces(values: Any, offsets: Any, lengths: Any) -> list[Any]:
    """A jagged tensor as one array a row."""
    starts = offsets[:-1]
    stops = offsets[1:] if lengths is None else starts + lengths
    return [values[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]


def _names() -> dict[tuple[str, str], Name]:
    build: dict[str, dict[str, Any]] = {
        "torch._utils": {
            "_rebuild_tensor_v2": _tensor_v2,
            "_rebuild_tensor_v3": _tensor_v3,
            "_rebuild_nested_tensor": _nested_tensor,
            "_rebuild_parameter": _first,
        },
        "torch": {"Size": _collection(tuple, (tuple, list)), "device": _first},
        "collections": {"OrderedDict": _ordered, "defaultdict": _ordered},
        "_codecs": {"encode": _encode},
        "numpy": {"dtype": _numpy_type, "ndarray": None},
        "tensordict._reductions": {"_make_td": _tensor_dict, "_rebuild_tensordict_files_consolidated": _consolidated},
        "tensordict.utils": {"_StringOnlyDict": _ordered},
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        build[module] = {"_reconstruct": _numpy_array, "scalar": _numpy_scalar}
    for module in ("numpy.core.numeric", "numpy._core.numeric"):
        build[module] = {"_frombuffer": _numpy_buffer}
    for module in ("builtins", "__builtin__"):
        build[module] = {
            "set": _collection(set, (list, tuple)),
            "frozenset": _collection(frozenset, (list, tuple)),
            "list": _collection(list, (list, tuple)),
            "tuple": _collection(tuple, (list, tuple)),
            "bytearray": _collection(bytes, (bytes, memoryview)),
            "dict": _ordered,
            **dict.fromkeys(("int", "float", "str", "bool")),
        }
    names = {(module, name): Name(f"{module}.{name}", how) for module, of in build.items() for name, how in of.items()}
    inert = [("torch", name) for name in (*STORAGES, *TORCH_TYPES)] + [("torch.storage", "UntypedStorage")]
    names |= {(module, name): Name(f"{module}.{name}") for module, name in inert}
    instances = [
        ("verl.protocol", "DataProto"),
        ("tensordict._td", "TensorDict"),
        ("tensordict.tensordict", "TensorDict"),
        ("slime.utils.tensor_store", "DiskTensorRef"),
    ]
    return names | {(module, name): Name(f"{module}.{name}", instance=True) for module, name in instances}


NAMES = _names()
"""(module, name) -> what stands for it."""


def instance_of(name: Name) -> Unfinished:
    """What `cls.__new__(cls)` leaves, until its state comes."""
    return Saved(name.text)
