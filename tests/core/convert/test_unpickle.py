"""Pickles and archives that no pickler or torch.save writes are refused, before anything is allocated or run."""

import contextlib
import gc
import io
import os
import pickle
import random
import struct
import zipfile

import numpy as np
import pytest
import torch
from guarded import ARRAYS, PLAIN, Call, read, refused, same, torch_bytes

from critic_train.convert.unpickle import DumpUnpickler, load_dump
from critic_train.errors import DataError

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
    "lists without end": (b"\x80\x02(" + b"]" * 2**23 + b"l.", "more than"),
    "marks without end": (b"\x80\x02" + b"(" * 2**23 + b".", "more than"),
    "a dictionary of one entry, often": (b"\x80\x02" + b"}" * 2**23 + b".", "more than"),
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
    "an old instance": (b"\x80\x02(ios\nsystem\n.", r"refers to os\.system"),
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
