"""What is kept, what goes, and what happens when there is no room."""

import errno
import os
from pathlib import Path

import pytest

from critic_train.errors import MachineError
from critic_train.run import storage
from critic_train.run.checkpoint import CheckpointManager, checkpoint_name, checkpoints
from critic_train.run.storage import require_room


def fill(directory: Path) -> None:
    storage.write_file(directory / "model.safetensors", b"weights")


def keeper_of(folder: Path, keep: int, *steps: int) -> CheckpointManager:
    """A keeper of checkpoints that another process wrote."""
    folder.mkdir()
    for step in steps:
        CheckpointManager(folder, 9).write(step, fill, bytes_needed=7, best=None)
    return CheckpointManager(folder, keep)


def steps(folder: Path) -> list[int]:
    return [int(path.name[-8:]) for path in checkpoints(folder)]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "checkpoints"


@pytest.mark.parametrize(("keep", "best", "left"), [(1, 5, [5, 9]), (2, None, [8, 9]), (3, 9, [7, 8, 9])])
def test_the_newest_and_the_best_are_kept(keep, best, left, folder):
    keeper = keeper_of(folder, keep, 5, 6, 7, 8, 9)
    remaining = keeper.prune(best and folder / checkpoint_name(best))
    assert steps(folder) == left
    assert remaining == checkpoints(folder)
    assert not list(folder.glob(".*"))


def test_what_is_damaged_or_incomplete_does_not_count_and_is_not_deleted(folder):
    """Scenario 4. Otherwise the last whole checkpoint could be removed because broken newer ones stand."""
    keeper = keeper_of(folder, 2, 1, 2, 3, 4, 5, 6)
    (folder / checkpoint_name(6) / "manifest.json").unlink()
    (folder / checkpoint_name(5) / "model.safetensors").write_bytes(b"weighty")
    (folder / checkpoint_name(1) / "model.safetensors").write_bytes(b"")
    keeper.prune(None)
    assert steps(folder) == [1, 3, 4, 5, 6]


def test_a_checkpoint_of_a_later_format_is_neither_counted_nor_removed(folder):
    keeper = keeper_of(folder, 1, 1, 2)
    manifest = folder / checkpoint_name(1) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    keeper.prune(None)
    assert steps(folder) == [1, 2]


def fails_at(operation: str, name: str, number: int, times: int):
    """A watcher that refuses the first `times` operations of a kind on a name."""
    left = [times]

    def watch(found):
        if (found.kind, found.path.name) == (operation, name) and left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number), str(found.path))

    return watch


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_tried_once_more_without_the_oldest(number, folder):
    """Scenario 5."""
    keeper = keeper_of(folder, 2, 1, 2)
    with storage.watched(fails_at("sync", "model.safetensors", number, 1)):
        keeper.write(3, fill, bytes_needed=7, best=None)
    assert steps(folder) == [2, 3]
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(("keep", "best", "left"), [(2, None, [2]), (1, None, [2]), (2, 1, [1, 2]), (3, None, [1, 2])])
def test_a_disk_that_stays_full_ends_the_run_and_keeps_what_stands(keep, best, left, folder):
    """Scenario 5: only what the new checkpoint would have made too old goes; the newest and the best never."""
    keeper = keeper_of(folder, keep, 1, 2)
    with storage.watched(fails_at("sync", "model.safetensors", errno.ENOSPC, 2)), pytest.raises(MachineError) as told:
        keeper.write(3, fill, bytes_needed=1_600_000_000, best=best and folder / checkpoint_name(best))
    assert steps(folder) == left
    assert not list(folder.glob(".*"))
    assert "the checkpoint of step 3 cannot be written" in told.value.message
    assert "No space left on device; it needs 1.6 GB, " in told.value.message
    assert told.value.message.endswith(" are free")
    assert "make room" in told.value.hint


def test_another_fault_of_the_disk_removes_nothing(folder):
    keeper = keeper_of(folder, 1, 1, 2)
    with (
        storage.watched(fails_at("sync", "model.safetensors", errno.EIO, 1)),
        pytest.raises(MachineError, match="error"),
    ):
        keeper.write(3, fill, bytes_needed=7, best=None)
    assert steps(folder) == [1, 2]


def test_what_cannot_be_removed_is_told_and_ends_nothing(folder):
    """Scenario 7: a cleanup that fails is a warning."""
    keeper = keeper_of(folder, 1, 1, 2, 3)
    hidden = f".{checkpoint_name(2)}.tmp-{os.getpid()}"
    with (
        storage.watched(fails_at("remove", hidden, errno.EIO, 1)),
        storage.watched(fails_at("rename", checkpoint_name(1), errno.EACCES, 1)),
    ):
        keeper.prune(None)
    assert [said.rpartition(": ")[2] for said in keeper.warnings] == ["Input/output error", "Permission denied"]
    assert steps(folder) == [1, 3]
    keeper.prune(None)
    assert steps(folder) == [3]


def test_a_folder_that_vanished_is_not_made_again(folder):
    """Scenario 7."""
    keeper = keeper_of(folder, 1)
    folder.rmdir()
    with pytest.raises(MachineError, match="No such file or directory"):
        keeper.write(1, fill, bytes_needed=7, best=None)
    assert not folder.exists()


def test_room_is_asked_for_before(tmp_path, monkeypatch):
    """Scenario 6."""
    require_room(tmp_path / "not" / "yet", 1000, "a checkpoint", hint="")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 999})())
    with pytest.raises(MachineError) as told:
        require_room(tmp_path, 1_234_567, "3 checkpoints of 0.4 MB", hint="keep fewer")
    assert told.value.message == (
        f"not enough room at {tmp_path} for 3 checkpoints of 0.4 MB: 1.2 MB needed, 999 B free"
    )
