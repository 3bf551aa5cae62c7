"""Every name that a pickled dump may use, and what stands for it. What is not here is refused.

Nothing here is torch's or numpy's own code for pickles: a name stands for a small function, which checks what it is
given. Objects that a pickle could hand a state to (BUILD) define `__setstate__` themselves, so that the unpickler never
writes to their attributes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from critic_train.convert.dump_tensors import (
    STORAGES,
    TORCH_TYPES,
    DumpArray,
    Memory,
    NumpyType,
    RefusedError,
    array,
    consolidated_tensors,
    dtype_of,
    nested_tensor,
    tensor,
)

SKYRL_MODULES = ("skyrl.backends.skyrl_train.training_batch", "skyrl_train.training_batch")
"""Where SkyRL's batches are defined, and where they were before it was one package."""
PLAIN = (str, int, float, bool, type(None), bytes)


class Name:
    """A name that a pickle may use; calling it runs a function of this module, if it has one.

    Args:
        text: module and name, for messages.
        build: called with the pickle's arguments; None for names that are only referred to.
    """

    __slots__ = ("_build", "text")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, text: str, build: Callable[..., Any] | None) -> None:
        self.text = text
        self._build = build

    def __call__(self, *arguments: Any) -> Any:
        """What the pickle makes by calling the name."""
        if self._build is None:
            raise RefusedError(f"it calls {self.text}")
        return self._build(*arguments)

    def __setstate__(self, state: Any) -> NoReturn:
        raise RefusedError(f"it gives a state to {self.text}")


class SavedObject:
    """An instance of a class that keeps all it has in its state; made without arguments."""

    name = ""
    __slots__ = ("state",)
    __hash__ = None  # type: ignore[assignment]

    def __new__(cls, *arguments: Any) -> "SavedObject":
        if arguments:
            raise RefusedError(f"it makes an instance of {cls.name} with arguments")
        made = super().__new__(cls)
        made.state = None
        return made

    def __init__(self, *_: Any) -> None:
        # Unpickling an instance calls __new__ alone.
        raise RefusedError(f"it calls {self.name}")

    def __setstate__(self, state: Any) -> None:
        self.state = state


class DataProtoState(SavedObject):
    """What verl's `DataProto.save_to_disk` keeps: state is (batch, arrays that are no tensors, meta)."""

    name = "verl.protocol.DataProto"
    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 3:
            raise RefusedError("a DataProto with an unknown state")
        self.state = state


class TensorDictState(SavedObject):
    """tensordict's TensorDict; state is its dictionary of tensors."""

    name = "tensordict.TensorDict"
    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        self.state = _tensors_of(state)


class TensorBatchState(SavedObject):
    """SkyRL's TensorBatch; state is its dictionary of tensors as bytes, with the batch's size and metadata."""

    name = "skyrl TensorBatch"
    __slots__ = ()

    def __init__(self, *_: Any) -> None:
        # Some versions are pickled as a call of the class, with a state behind it.
        self.state = None

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict:
            raise RefusedError("a TensorBatch with an unknown state")
        self.state = state


class TensorListState(SavedObject):
    """SkyRL's TensorList, of images and the like; it is not read."""

    name = "skyrl TensorList"
    __slots__ = ()


class DiskReference(SavedObject):
    """slime's reference to a tensor in another file, which is not read."""

    name = "slime.utils.tensor_store.DiskTensorRef"
    __slots__ = ()


def is_key(key: Any) -> bool:
    """Whether something may be a dict key or set element: plain, or a short tuple of texts.

    Nested tuples may take for ever to hash.
    """
    return type(key) in PLAIN or (isinstance(key, tuple) and len(key) <= 8 and set(map(type, key)) <= {str})


def find_allowed(memory: Memory, module: str, name: str) -> Any:
    """What stands for a name in a pickle.

    Args:
        memory: what the functions may spend.
        module, name: as the pickle has them.

    Raises:
        RefusedError: it is not on the list.
    """
    if not is_allowed(module, name):
        raise not_allowed(module, name)
    if (module, name) in INSTANCES:
        return INSTANCES[module, name]
    build = ALLOWED[module, name]
    return Name(f"{module}.{name}", None if build is None else partial(build, memory))


def is_allowed(module: str, name: str) -> bool:
    """Whether a name is on the list."""
    return (module, name) in ALLOWED or (module, name) in INSTANCES


def not_allowed(module: str, name: str) -> RefusedError:
    """What is raised for a name that is not on the list."""
    return RefusedError(
        f"it refers to {module}.{name}, which is no tensor, array or plain container; nothing was run",
        hint="take that field out before the dump is written; a rollout needs none of it",
    )


def _tensor_v3(memory: Memory, *given: Any) -> NDArray[Any]:
    storage, offset, shape, strides, _, _, kind, *_ = given
    named = kind.text.removeprefix("torch.") if isinstance(kind, Name) else None
    return tensor(memory, storage, offset, shape, strides, named)


def _empty_dict(memory: Memory, *given: Any) -> dict[Any, Any]:
    """An OrderedDict or defaultdict as it begins: empty; its entries are set one by one."""
    if len(given) > 1 or (given and given[0] is not None and not isinstance(given[0], Name)):
        raise RefusedError("a dictionary made of something")
    return {}


def _collection(kind: Callable[[Any], Any], of: tuple[type, ...] = (list, tuple)) -> Callable[..., Any]:
    """A function that makes a collection of one argument; no kind can be hashed, so that none can be a key."""

    def build(memory: Memory, *given: Any) -> Any:
        items: Any = given[0] if given else ()
        is_collection = isinstance(items, (*of, tuple))
        if len(given) > 1 or not is_collection:
            raise RefusedError(f"a collection made of a {type(items).__name__}")
        if kind is set and not all(is_key(item) for item in items):
            raise RefusedError("a set of something that is no key")
        memory.spend(100 * len(items))
        return kind(items)

    return build


class UnhashableTuple(tuple[Any, ...]):
    """A tuple that may hold anything, and so is no key."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]


UnhashableTuple.__name__ = "tuple"  # as messages of the unpickler name it


def _encode(memory: Memory, text: Any, encoding: Any) -> bytes:
    """Bytes as protocol 2 writes them: text to be encoded."""
    if type(text) is not str or encoding != "latin1":
        raise RefusedError("text in an unknown encoding")
    memory.spend(len(text))
    return text.encode("latin1")


def _unfinished_array(memory: Memory, *given: Any) -> DumpArray:
    return DumpArray((0,), np.uint8)


def _numpy_scalar(memory: Memory, kind: Any, content: Any) -> Any:
    dtype = dtype_of(kind)
    return content if dtype.hasobject else array(content, dtype, ()).item()


def _numpy_buffer(memory: Memory, content: Any, kind: Any, shape: Any, order: Any) -> NDArray[Any]:
    return array(content, dtype_of(kind), shape, fortran=order == "F")


def _tensor_batch(memory: Memory, kind: Any, state: Any) -> TensorBatchState:
    if kind is not TensorBatchState:
        raise RefusedError("a TensorBatch of another class")
    made = TensorBatchState()
    made.__setstate__(state)
    return made


def _tensors_of(state: Any) -> dict[str, Any]:
    tensors = state.get("_tensordict") if type(state) is dict else None
    if type(tensors) is not dict:
        raise RefusedError("a TensorDict with an unknown state")
    return tensors


def _allowed() -> dict[tuple[str, str], Callable[..., Any] | None]:
    builders: dict[str, dict[str, Any]] = {
        "torch._utils": {
            "_rebuild_tensor_v2": lambda memory, *given: tensor(memory, *given[:4]),
            "_rebuild_tensor_v3": _tensor_v3,
            "_rebuild_nested_tensor": nested_tensor,
            "_rebuild_parameter": lambda memory, *given: given[0],
        },
        "torch": {
            "Size": _collection(UnhashableTuple),
            "device": lambda memory, *given: given[0],
            **dict.fromkeys((*STORAGES, *TORCH_TYPES)),
        },
        "torch.storage": {"UntypedStorage": None},
        "collections": {"OrderedDict": _empty_dict, "defaultdict": _empty_dict},
        "_codecs": {"encode": _encode},
        "numpy": {"dtype": lambda memory, *given: NumpyType(given[0]), "ndarray": None},
        "tensordict._reductions": {
            "_make_td": lambda memory, *given: _tensors_of(given[1]),
            "_rebuild_tensordict_files_consolidated": lambda memory, layout, storage: consolidated_tensors(
                memory, layout, storage
            ),
        },
        "tensordict.utils": {"_StringOnlyDict": _empty_dict},
        **{module: {"_rebuild_tensor_batch": _tensor_batch} for module in SKYRL_MODULES},
    }
    for core in ("numpy.core", "numpy._core"):
        builders[f"{core}.multiarray"] = {"_reconstruct": _unfinished_array, "scalar": _numpy_scalar}
        builders[f"{core}.numeric"] = {"_frombuffer": _numpy_buffer}
    for module in ("builtins", "__builtin__"):
        builders[module] = {
            **{"set": _collection(set), "frozenset": _collection(set)},
            **{"list": _collection(list), "tuple": _collection(UnhashableTuple)},
            "bytearray": _collection(bytes, (bytes, bytearray, memoryview)),
            "dict": _empty_dict,
            **dict.fromkeys(("int", "float", "str", "bool")),
        }
    return {(module, name): build for module, of in builders.items() for name, build in of.items()}


ALLOWED = _allowed()
"""(module, name) -> the function that stands for it; None for a name that can only be referred to."""
INSTANCES: dict[tuple[str, str], type[SavedObject]] = {
    ("verl.protocol", "DataProto"): DataProtoState,
    ("tensordict._td", "TensorDict"): TensorDictState,
    ("tensordict.tensordict", "TensorDict"): TensorDictState,
    ("slime.utils.tensor_store", "DiskTensorRef"): DiskReference,
    **{(module, name): TensorBatchState for module in SKYRL_MODULES for name in ("TrainingInputBatch", "TensorBatch")},
    **{(module, "TensorList"): TensorListState for module in SKYRL_MODULES},
}
"""(module, name) -> the class of ours whose instances stand for that class's."""
