"""What torch and pickle write is read as it was; what would run, allocate or reach elsewhere is refused, unrun."""

import collections
import contextlib
import encodings.cp437  # what zipfile reads names with, imported at its first use  # noqa: F401
import gc
import io
import os
import pickle
import random
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from critic_train.converting.unpickle import DumpUnpickler, load_bytes, load_dump
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
}  # fmt: skip
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


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_and_arrays_of_any_protocol(tmp_path, protocol):
    value = PLAIN | ARRAYS
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(value, protocol=protocol))
    expected = value | {"ordered": {"a": 1}, "default": {"k": [1]}}
    assert same(read(tmp_path / "a.pkl"), expected)


@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_and_all_else_that_torch_saves(tmp_path, protocol):
    value = {**TENSORS, "twice": [TENSORS["sliced"]] * 2, "scalar": np.float64(2.5), **ARRAYS}
    torch.save(value, tmp_path / "a.pt", pickle_protocol=protocol)
    assert same(read(tmp_path / "a.pt"), value | {"scalar": 2.5})


def test_sets_sizes_and_nested_tensors(tmp_path):
    ragged = torch.nested.nested_tensor([torch.arange(3), torch.arange(5)])
    torch.save({"set": {1, "a"}, "size": torch.Size([2, 3]), "ragged": ragged}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert (found["set"], found["size"]) == ({1, "a"}, (2, 3))
    assert same(found["ragged"], [torch.arange(3), torch.arange(5)])


CODE = {
    "os.system": lambda marker: Call(os.system, f"touch {marker}"),
    "eval": lambda marker: Call(eval, f"open({str(marker)!r}, 'w')"),
    "exec": lambda marker: Call(exec, f"open({str(marker)!r}, 'w')"),
    "open": lambda marker: Call(open, str(marker), "w"),
    "getattr": lambda marker: Call(getattr, {}, "__class__"),
    "__import__": lambda marker: Call(__import__, "os"),
    "torch.load": lambda marker: Call(torch.load, str(marker)),
    "pickle.loads": lambda marker: Call(pickle.loads, pickle.dumps(1)),
    "partial": lambda marker: Call(__import__("functools").partial, print),
}


@pytest.mark.parametrize("wrap", ["bare", "list", "key", "objects", "torch", "torch objects", "verl", "verl meta"])
@pytest.mark.parametrize("name", CODE)
def test_code_is_refused_by_name_wherever_it_hides_and_does_not_run(tmp_path, name, wrap):
    marker = tmp_path / "it ran"
    evil = CODE[name](marker)
    inside = np.asarray([evil, 1], dtype=object)
    content = {
        "bare": lambda: pickle.dumps(evil),
        "list": lambda: pickle.dumps([1, [evil]]),
        "key": lambda: pickle.dumps({"a": 1, "b": {"c": evil}}, protocol=2),
        "objects": lambda: pickle.dumps(inside),
        "torch": lambda: torch_bytes({"samples": [evil]}),
        "torch objects": lambda: torch_bytes({"samples": inside}),
        "verl": lambda: data_proto(torch_bytes(evil), {}, {}),
        "verl meta": lambda: data_proto(torch_bytes({}), {"uid": inside}, {"a": evil}),
    }[wrap]()
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=f"wants .*{name.rpartition('.')[2]}, which is no tensor.*nothing of it was run"
    ):
        unwrapped(read(path))
    assert not marker.exists()


def data_proto(batch: bytes, others: object, meta: object) -> bytes:
    """What DataProto.save_to_disk writes, with the class's name put in by hand."""
    state = pickle.dumps((batch, others, meta), protocol=4)
    return b"\x80\x04\x8c\x0dverl.protocol\x8c\x09DataProto\x93)\x81" + state[2:-1] + b"b."


def unwrapped(found: object) -> object:
    """A DataProto's inner archive, as the reader of verl's files opens it."""
    return load_bytes(memoryview(found.state[0]), limit_bytes=2**26)


def test_a_module_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("open('it ran', 'w')\nx = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    refused(tmp_path / "a.pkl", b"\x80\x02cevil_module\nx\n.", r"wants evil_module\.x")
    refused(tmp_path / "a.pkl", b"\x80\x04\x8c\x0bevil_module\x8c\x01x\x93.", r"wants evil_module\.x")
    assert "evil_module" not in sys.modules
    assert not (tmp_path / "it ran").exists()


BATCH = {
    "bytes that are not there": (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.", "too early"),
    "text that is not there": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.", "more than|too early"),
    "a bytearray that is not there": (b"\x80\x05\x96" + struct.pack("<Q", 2**50) + b".", "too early"),
    "a memo by number": (b"\x80\x02]r\xff\xff\xff\xff.", "more than"),
    "a whole number without end": (b"\x80\x02\x8b" + struct.pack("<I", 2**31) + b"\x01.", "whole number of"),
    "a bytearray of a size": (b"\x80\x04cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R.", "made of a int"),
    "an array of a size": (
        b"\x80\x04cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\x01b\x87R"
        b"(K\x01\x8a\x06\0\0\0\0\0\x01\x85cnumpy\ndtype\n\x8c\x02u1\x89\x88\x87R(K\x03\x8c\x01|NNNJ\xff\xff\xff\xffJ"
        b"\xff\xff\xff\xffK\0tb\x89C\x01xtb.",
        "array of shape",
    ),
    "lists without end": (b"\x80\x02(" + b"]" * 2**20 + b"l.", "more than"),
    "marks without end": (b"\x80\x02" + b"(" * 2**23 + b".", "more than"),
    "a dictionary of one entry, often": (b"\x80\x02" + b"}" * 2**20 + b".", "more than"),
    "tuples in tuples as a key": (b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s.", "a key is a tuple"),
    "tuples in tuples in a set": (b"\x80\x04\x8f()" + b"2\x86" * 60 + b"\x90.", "a key is a tuple"),
    "tuples of a tuple in the memo as a key": (
        b"\x80\x04)\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(60)) + b"}h\x3cK\x01s.",
        "a key is a tuple",
    ),
    "a deep nest of tuples as a key": (b"\x80\x02})" + b"\x85" * 10**5 + b"K\x01s.", "a key is a tuple"),
    "frozen sets in a frozen set": (b"\x80\x04((K\x01\x91(K\x02\x91\x91.", "a key is a set"),
    "a frozen set as a key": (b"\x80\x04}(K\x01\x91K\x01s.", "a key is a set"),
    "a name as a key": (b"\x80\x02}cnumpy\ndtype\nK\x01s.", "a key is a Name"),
    "an array as a key": (
        b"\x80\x02}cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\x01b\x87RK\x01s.",
        "a key is a DumpArray",
    ),
    "an index of no bytes": (b"\x80\x02K\x07Q.", "damaged"),
    "an instance by name of a function": (b"\x80\x02(icollections\nOrderedDict\n.", "INST"),
    "a state for a class": (b"\x80\x02cverl.protocol\nDataProto\n(NNNtb.", "missing 1 required"),
    "a slot state for a class": (b"\x80\x02cverl.protocol\nDataProto\nN}X\x04\0\0\0namebs\x86b.", "damaged"),
    "a call of a class": (b"\x80\x02cverl.protocol\nDataProto\n)R.", "calls verl.protocol.DataProto"),
    "an instance with arguments": (b"\x80\x02cverl.protocol\nDataProto\nK\x01\x85\x81.", "with arguments"),
    "a state for a name, by slots": (
        b"\x80\x02cnumpy\ndtype\nN}X\x06\0\0\0_buildNs\x86b.", "gives a state to numpy.dtype",
    ),
    "a shape of tuples": (
        b"\x80\x02cbuiltins\nset\n)" + b"2\x86" * 60 + b"\x85\x85R.", "a set of something",
    ),
    "an old instance": (b"\x80\x02(ios\nsystem\n.", r"wants os\.system"),
    "an instance": (b"\x80\x02(ccollections\nOrderedDict\no.", "OBJ"),
    "an extension": (b"\x80\x02\x82\x01.", "EXT1"),
    "a name in a name": (b"\x80\x04\x8c\x05numpy\x8c\x0cdtype.type.x\x93.", r"numpy\.dtype\.type\.x"),
    "a name that is no text": (b"\x80\x04K\x01K\x02\x93.", "STACK_GLOBAL requires str"),
    "a state for a name": (b"\x80\x02cnumpy\ndtype\n}(X\x05\0\0\0buildNub.", "gives a state to numpy.dtype"),
    "a state for a list": (b"\x80\x02]}b.", "gives a state to a list"),
    "a call of a list": (b"\x80\x02])R.", "calls a list"),
    "a call of an inert name": (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage"),
    "an instance of a callable": (b"\x80\x02cnumpy\ndtype\n)\x81.", "must be a type"),
    "items for a dictionary": (b"\x80\x02}K\x01a.", "added to a dict"),
    "a persistent id": (b"\x80\x02X\x07\0\0\0storageQ.", "refers to something outside"),
    "a text persistent id": (b"\x80\x02Pstorage\n.", "PERSID"),
    "an array of dates": (b"\x80\x02cnumpy\ndtype\nX\x02\0\0\0M8\x89\x88\x87R.", "type 'M8'"),
    "an empty stack": (b"\x80\x02R.", "damaged"),
    "no end": (b"\x80\x02]", "too early"),
    "another protocol": (b"\x80\x09].", "newer than 5"),
    "protocol 0": (pickle.dumps([1], protocol=0), "opcode"),
}  # fmt: skip


@pytest.mark.parametrize("what", BATCH)
def test_what_no_pickler_of_plain_data_writes_is_refused(tmp_path, what):
    refused(tmp_path / "a.pkl", *BATCH[what])


def test_a_deep_nest_is_read_without_recursion(tmp_path):
    depth = 50_000
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".")
    found = read(tmp_path / "a.pkl")
    for _ in range(depth - 1):
        (found,) = found
    assert found == []


def archive(entries: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as file:
        for name, content in entries.items():
            file.writestr(f"a/{name}", content)
    return buffer.getvalue()


def tensor_pickle(
    key: str = "0", count: int = 4, kind: str = "FloatStorage", shape: int = 4, stride: int = 1, tag: str = "storage"
) -> bytes:
    """The pickle of one tensor, with anything claimed of it."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def whole(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    place = b"(" + text(tag) + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu") + whole(count) + b"tQ"
    rest = whole(0) + whole(shape) + b"\x85" + whole(stride) + b"\x85" + b"\x89N"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + place + rest + b"tR."


FLOATS = np.arange(4, dtype="<f4").tobytes()
ARCHIVES = {
    "a zip bomb": (archive({"data.pkl": b"\x80\x02]" + b"0]" * 10**6 + b"."}, zipfile.ZIP_DEFLATED), "compressed"),
    "a compressed storage": (
        archive({"data.pkl": tensor_pickle(), "data/0": FLOATS}, zipfile.ZIP_DEFLATED), "compressed",
    ),
    "no pickle": (archive({"data/0": FLOATS}), "no data.pkl"),
    "a storage that is not there": (archive({"data.pkl": tensor_pickle()}), "lacks a/data/0"),
    "a storage elsewhere": (archive({"data.pkl": tensor_pickle("../x"), "x": FLOATS}), "a storage of"),
    "more elements than bytes": (
        archive({"data.pkl": tensor_pickle(count=2**40), "data/0": FLOATS}), "claims 1,099,511,627,776 elements",
    ),
    "a tensor beyond its storage": (
        archive({"data.pkl": tensor_pickle(shape=2**40), "data/0": FLOATS}), "reaches to element",
    ),
    "a tensor that repeats one number": (
        archive({"data.pkl": tensor_pickle(shape=2**40, stride=0), "data/0": FLOATS}), "more than",
    ),
    "a negative stride": (archive({"data.pkl": tensor_pickle(stride=-1), "data/0": FLOATS}), "shape of"),
    "another persistent id": (archive({"data.pkl": tensor_pickle(tag="module"), "data/0": FLOATS}), "no tensor's"),
    "a dtype for a storage": (archive({"data.pkl": tensor_pickle(kind="int64"), "data/0": FLOATS}), "torch.int64"),
    "big-endian numbers": (
        archive({"data.pkl": tensor_pickle(), "data/0": FLOATS, "byteorder": b"big"}), "big-endian",
    ),
    "half an archive": (archive({"data.pkl": tensor_pickle(), "data/0": FLOATS})[:-30], "damaged"),
    "a changed number": (
        archive({"data.pkl": tensor_pickle(), "data/0": FLOATS}).replace(FLOATS, FLOATS[::-1]), "checksum of a/data/0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ARCHIVES)
def test_an_archive_that_torch_does_not_write_is_refused(tmp_path, what):
    refused(tmp_path / "a.pt", *ARCHIVES[what])


def test_the_archive_of_these_tests_is_one_that_torch_reads(tmp_path):
    (tmp_path / "a.pt").write_bytes(archive({"data.pkl": tensor_pickle(), "data/0": FLOATS, "version": b"3"}))
    assert same(read(tmp_path / "a.pt"), torch.load(tmp_path / "a.pt", weights_only=True))


def test_files_of_old_torch_and_empty_ones_say_so(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(DataError, match=r"before version 1\.6"):
        read(tmp_path / "old.pt")
    refused(tmp_path / "empty.pt", b"", "empty")


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_damage_anywhere_is_refused_or_harmless(tmp_path, kind):
    """Three hundred files with a few bytes changed: an error of ours or a value, nothing else, and nothing runs."""
    value = {"samples": [{"tokens": torch.arange(9), "reward": 1.0, "words": ARRAYS["objects"]}], "n": [1] * 20}
    sound = torch_bytes(value) if kind == "torch" else pickle.dumps(PLAIN | ARRAYS)
    draw = random.Random(0)
    path = tmp_path / "a.pt"
    refusals = 0
    for _ in range(300):
        content = bytearray(sound)
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content[: draw.randint(1, len(content))] if draw.random() < 0.2 else content)
        try:
            read(path)
        except DataError:
            refusals += 1
    assert refusals > 30


def test_what_was_read_is_freed_without_the_collector(tmp_path):
    """Or memory would grow from file to file until it runs."""
    torch.save({"samples": [{"a key of this test": list(range(100))}]}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Call(os.system, "true")))
    gc.collect()
    gc.disable()
    try:
        load_dump(tmp_path / "a.pt", "a")
        with contextlib.suppress(DataError):
            load_dump(tmp_path / "b.pt", "b")
        assert not [left for left in gc.get_objects() if type(left) is DumpUnpickler]
        assert not [left for left in gc.get_objects() if type(left) is dict and "a key of this test" in left]
    finally:
        gc.enable()
