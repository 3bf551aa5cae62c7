"""The one door to the disk: nothing goes around it, and what passes can be seen, failed and torn."""

import ast
import errno
import os
import re
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from critic_train.run import storage
from critic_train.run.storage import File, library_writes, remove_tree, watched, write_file, write_json

CORE = Path(storage.__file__).parents[1]
OF_NO_RUN = ("run/storage.py", "evaluation/token_columns.py", "convert/")
"""The door itself; files without a name; shards and what they are made of, which other commands than fit write."""
WRITES = {
    *("write_text", "write_bytes", "mkdir", "makedirs", "mkdtemp", "rename", "renames", "unlink", "rmdir", "rmtree"),
    *("symlink_to", "symlink", "touch", "copyfile", "copy2", "copytree", "ftruncate", "pwrite", "save", "savez"),
}
BY_LIBRARIES = {"save_file", "save_pretrained"}


def calls_around_the_door(source: str) -> list[str]:
    tree = ast.parse(source)
    inside = {
        call
        for block in ast.walk(tree)
        if isinstance(block, ast.With) and "library_writes" in ast.unparse(block.items[0])
        for call in ast.walk(block)
    }
    found = []
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        said = ast.unparse(call)
        opens = name == "open" and any(
            isinstance(a, ast.Constant) and re.fullmatch(r"[rbt+]*[wax+][bt+]*", str(a.value))
            for a in [*call.args, *(k.value for k in call.keywords)]
        )
        held = said.startswith("np.save(held,")
        bare = isinstance(call.func, ast.Name) and name in WRITES
        if opens or (name in WRITES and not held and not bare) or (name in BY_LIBRARIES and call not in inside):
            found.append(said)
    return found


def test_every_write_of_a_run_goes_through_storage():
    around = {
        str(path.relative_to(CORE)): calls
        for path in CORE.rglob("*.py")
        if not str(path.relative_to(CORE)).startswith(OF_NO_RUN) and (calls := calls_around_the_door(path.read_text()))
    }
    assert around == {}


@pytest.mark.parametrize(
    "line",
    [
        "path.write_text('x')",
        "open(path, 'w')",
        "path.open(mode='ab')",
        "save_file(tensors, path)",
        "np.save(path, a)",
        "os.rename(a, b)",
    ],
)
def test_a_write_around_it_would_be_seen(line):
    assert calls_around_the_door(line) == [line]


def test_a_watcher_sees_each_operation_before_it_happens(tmp_path):
    seen = []

    def watch(operation):
        seen.append((operation.kind, operation.path.name, (tmp_path / "a").exists()))

    with watched(watch):
        write_file(tmp_path / "a", b"12")
        storage.rename(tmp_path / "a", tmp_path / "b")
        storage.remove(tmp_path / "b")
        storage.remove(tmp_path / "b")
    write_file(tmp_path / "a", b"12")
    expected = [("create", "a", False), ("write", "a", True), ("sync", "a", True), ("rename", "a", True)]
    assert seen == [*expected, ("remove", "b", False)]


def test_what_a_watcher_raises_the_operation_raises_and_the_old_file_stands(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"step": 1})
    for failing in ("create", "write", "sync", "rename"):

        def fail(operation, failing=failing):
            if operation.kind == failing:
                raise OSError(errno.ENOSPC, "No space left on device")

        with watched(fail), pytest.raises(OSError, match="No space"):
            write_json(path, {"step": 2})
        assert path.read_text() == '{\n  "step": 1\n}\n'
        assert os.listdir(tmp_path) == ["result.json"]


def test_files_grow_at_their_end_and_are_cut(tmp_path):
    path = tmp_path / "log"
    with File(path, "append") as file:
        file.write(b"one\n")
        file.write(b"two\n")
        file.truncate(4)
        file.write(memoryview(np.frombuffer(b"2\n", dtype=np.uint8)))
        assert file.size == 6
    with File(path, "append") as file:
        file.write(b"3\n")
    assert path.read_bytes() == b"one\n2\n3\n"


def test_a_tree_is_removed_link_by_link_and_what_cannot_be_is_told(tmp_path):
    other = tmp_path / "other"
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    other.mkdir()
    (other / "kept").write_text("x")
    (tmp_path / "tree" / "sub" / "link").symlink_to(other)
    (tmp_path / "tree" / "file").write_text("x")

    def fail(operation):
        if operation.path.name == "sub":
            raise OSError(errno.EIO, "Input/output error")

    with watched(fail):
        assert remove_tree(tmp_path / "tree").errno == errno.EIO
    assert remove_tree(tmp_path / "tree") is None
    assert remove_tree(tmp_path / "tree") is None
    assert os.listdir(tmp_path) == ["other"]
    assert (other / "kept").read_text() == "x"


def test_a_full_disk_is_an_os_error_even_where_safetensors_writes(tmp_path):
    """A file size limit is a full disk that needs no mount; safetensors raises its own error there."""
    path = tmp_path / "model.safetensors"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(OSError) as told, library_writes(path):
            save_file({"a": np.zeros(2**18, dtype=np.float32)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert told.value.errno == errno.EFBIG


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_what_a_library_writes_has_the_mode_of_the_umask(umask, tmp_path, monkeypatch):
    """safetensors 0.8 gives its files mode 0600: another account's PPO job could not read a checkpoint."""
    monkeypatch.setattr(storage, "UMASK", umask)
    (tmp_path / "model").mkdir()
    weights = {"weight": np.zeros(3, dtype=np.float32)}
    for path, file in ((tmp_path / "a.safetensors", None), (tmp_path / "model", tmp_path / "model/b.safetensors")):
        with library_writes(path):
            save_file(weights, file or path)
        assert (file or path).stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "model").stat().st_mode & 0o700 == 0o700
