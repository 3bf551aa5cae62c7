"""Pickles and archives read under an audit hook, and values to put in them."""

import collections
import encodings.cp437  # what zipfile reads names with, imported at its first use  # noqa: F401
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from critic_train.convert.unpickle import load_dump
from critic_train.errors import DataError

WATCHED = ("import", "os.", "subprocess.", "exec", "compile", "pickle.find_class", "ctypes.", "socket.", "open")
MEMORY_GUARD = "/proc/self/statm"
"""What data/memory_guard.py reads."""
seen: list[str] | None = None


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if seen is not None and event.startswith(WATCHED):
        seen.append(f"{event} {arguments!r:.100}")


sys.addaudithook(_watch)


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def read(path: Path, limit_bytes: int | None = 2**24) -> object:
    """Load, and see that nothing but the file itself was opened, nothing imported, nothing run."""
    global seen
    seen = []
    try:
        return load_dump(path, path.name, limit_bytes=limit_bytes)
    finally:
        events, seen = seen, None
        assert [e for e in events if str(path) not in e and MEMORY_GUARD not in e] == []


def refused(path: Path, content: bytes, match: str) -> None:
    path.write_bytes(content)
    with pytest.raises(DataError, match=match):
        read(path)


def torch_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def same(found: object, expected: object) -> bool:
    if isinstance(expected, torch.Tensor):
        expected = expected.float().numpy() if expected.dtype == torch.bfloat16 else expected.numpy()
    if isinstance(expected, np.ndarray) and not expected.dtype.hasobject:
        # Like numpy's own pickles, an array of another byte order may come back in this machine's.
        expected = expected.astype(expected.dtype.newbyteorder(found.dtype.byteorder))
        return isinstance(found, np.ndarray) and found.dtype == expected.dtype and np.array_equal(found, expected)
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple | np.ndarray):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(found, memoryview):
        found = bytes(found)
    return type(found) is type(expected) and found == expected


TENSORS = {
    str(kind): torch.arange(12).reshape(3, 4).to(kind)
    for kind in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint32,
    )
} | {
    "sliced": torch.arange(20).reshape(4, 5)[1:3, 2:],
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "expanded": torch.tensor([1.5]).expand(3, 4),
    "empty": torch.zeros(0, 4),
    "single": torch.tensor(2.5),
}  # fmt: skip  # fmt: skip
PLAIN = {
    "text": "a\nä\u2028",
    "numbers": [0, 1, 255, 256, 65535, 65536, -1, 2**40, -(2**70), 1.5, float("-inf"), True, None],
    "ids": list(range(0, 200000, 37)),
    "signed": [number * (-1) ** place for place, number in enumerate(range(0, 2**31, 2**26 + 99))] * 9,
    "mask": [0, 1] * 3000,
    "logprobs": [-i / 7 for i in range(3000)],
    "bytes": b"x" * 10000,
    "pair": (1, ("a", ())),
    "ordered": collections.OrderedDict(a=1),
    "default": collections.defaultdict(list, {"k": [1]}),
    ("a", "b"): {"deep": [[[[]]]]},
}
ARRAYS = {
    "floats": np.arange(6.0).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "big": np.arange(5, dtype=">i4"),
    "words": np.asarray(["a", "bcd"]),
    "objects": np.asarray(["a", None, {"k": 1}], dtype=object),
}
