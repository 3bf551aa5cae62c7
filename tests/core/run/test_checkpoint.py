import json
from pathlib import Path

import pytest

from critic_train.errors import ModelError
from critic_train.run.checkpoint import (
    checkpoints,
    damage,
    newest_checkpoint,
    prune,
    resolve_model,
    write_checkpoint,
)


def fill(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"weights")
    (directory / "trainer.json").write_text("{}")


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (5, 20, 100):
        write_checkpoint(folder, step, fill)
    return folder


def test_the_newest_whole_checkpoint_is_found_by_step_not_by_time(folder):
    write_checkpoint(folder, 7, fill)
    path, wrong = newest_checkpoint(folder)
    assert path is not None
    assert path.name == "step-00000100"
    assert not wrong


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda p: (p / "manifest.json").write_text("{"), "cannot be read"),
        (lambda p: (p / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda p: (p / "model.safetensors").write_bytes(b"weight"), "has 6 bytes, 7 were written"),
        (lambda p: (p / "model.safetensors").write_bytes(b"Weights"), "has changed since it was written"),
        (
            lambda p: (p / "manifest.json").write_text(json.dumps({"format_version": 99, "files": {}})),
            "format version 99",
        ),
        (
            lambda p: (p / "manifest.json").write_text(
                json.dumps({"format_version": 1, "files": {"../x": {"bytes": 1, "sha256": ""}}})
            ),
            "outside the checkpoint",
        ),
    ],
)
def test_damage_is_seen_and_the_one_before_it_is_taken(spoil, said, folder):
    spoil(folder / "step-00000100")
    path, wrong = newest_checkpoint(folder)
    assert path is not None
    assert path.name == "step-00000020"
    assert said in wrong[folder / "step-00000100"]


def test_a_save_that_fails_leaves_the_old_ones_and_nothing_half_done(folder):
    def fails(directory: Path) -> None:
        fill(directory)
        raise OSError(28, "No space left on device")

    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(folder, 101, fails)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_a_checkpoint_that_stands_whole_is_not_written_again(folder):
    def other(directory: Path) -> None:
        raise AssertionError("written again")

    assert not damage(write_checkpoint(folder, 100, other))


def test_prune_keeps_the_newest_and_the_best(folder):
    remaining = prune(folder, 1, folder / "step-00000005")
    assert [p.name for p in remaining] == ["step-00000005", "step-00000100"]
    assert checkpoints(folder) == remaining


def test_a_run_stands_for_its_best_or_its_newest_checkpoint(folder):
    run = folder.parent
    assert resolve_model(run).name == "step-00000100"
    (run / "best").symlink_to("checkpoints/step-00000020")
    assert resolve_model(run).name == "step-00000020"
    assert resolve_model(run / "best") == run / "best"
    for path in checkpoints(folder):
        (path / "manifest.json").unlink()
    (run / "best").unlink()
    with pytest.raises(ModelError, match="no whole checkpoint yet"):
        resolve_model(run)
