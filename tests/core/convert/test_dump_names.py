"""No name outside of the list is looked up, wherever it hides."""

import os
import pickle
import sys

import numpy as np
import pytest
import torch
from guarded import Call, read, refused, torch_bytes

from critic_train.convert.unpickle import load_bytes
from critic_train.errors import DataError

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
    with pytest.raises(DataError, match=f"refers to .*{name.rpartition('.')[2]}, which is no tensor.*nothing was run"):
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
    refused(tmp_path / "a.pkl", b"\x80\x02cevil_module\nx\n.", r"refers to evil_module\.x")
    refused(tmp_path / "a.pkl", b"\x80\x04\x8c\x0bevil_module\x8c\x01x\x93.", r"refers to evil_module\.x")
    assert "evil_module" not in sys.modules
    assert not (tmp_path / "it ran").exists()
