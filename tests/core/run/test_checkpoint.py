import json
import os
from pathlib import Path

import pytest

from critic_train import __version__
from critic_train.errors import ModelError
from critic_train.run import storage
from critic_train.run.checkpoint import checkpoints, inspect, newest_checkpoint, resolve_model, write_checkpoint
from critic_train.run.manifest import condition


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


def rewritten(path: Path, **changes: object) -> None:
    """Change what a checkpoint's manifest says."""
    manifest = path / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


def test_checkpoints_are_ordered_by_step_never_by_time(folder):
    """Scenario 30: a clock that jumps, and files copied without their times."""
    for hours, path in enumerate(checkpoints(folder)):
        os.utime(path, (10**9 - 3600 * hours,) * 2)
    write_checkpoint(folder, 7, fill)
    assert [path.name[-3:] for path in checkpoints(folder)] == ["005", "007", "020", "100"]
    path, wrong = newest_checkpoint(folder)
    assert path is not None
    assert path.name == "step-00000100"
    assert not wrong


def test_a_checkpoint_under_another_step_s_name_is_damaged(folder):
    (folder / "step-00000020").rename(folder / "step-00000200")
    path, wrong = newest_checkpoint(folder)
    assert path == folder / "step-00000100"
    assert wrong[folder / "step-00000200"].fault == "manifest.json says that it is of step 20"


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        (lambda p: (p / "manifest.json").unlink(), "incomplete", "manifest.json is missing"),
        (lambda p: (p / "manifest.json").write_text("{"), "damaged", "cannot be read"),
        (lambda p: (p / "manifest.json").write_text(""), "damaged", "cannot be read"),
        (lambda p: (p / "manifest.json").write_text("[" * 100_000), "damaged", "cannot be read"),
        (lambda p: (p / "manifest.json").write_bytes(bytes(900)), "damaged", "cannot be read"),
        (lambda p: os.truncate(p / "manifest.json", 2**25), "damaged", "it has 33554432 bytes"),
        (lambda p: (p / "model.safetensors").unlink(), "damaged", "model.safetensors is missing"),
        (lambda p: (p / "model.safetensors").write_bytes(b"weight"), "damaged", "has 6 bytes, 7 were written"),
        (lambda p: (p / "model.safetensors").write_bytes(b"Weights"), "damaged", "has changed since it was written"),
        (lambda p: (p / "model.safetensors").write_bytes(bytes(7)), "damaged", "has changed since it was written"),
        (lambda p: (p / "trainer.json").write_bytes(b"[]"), "damaged", "trainer.json has changed since"),
        (lambda p: rewritten(p, format_version=0), "damaged", "format version 0"),
        (lambda p: rewritten(p, format_version="1"), "damaged", "format version '1'"),
        (lambda p: rewritten(p, files={"a": 3}), "damaged", "cannot be read"),
        (lambda p: rewritten(p, files={"a\0": {"bytes": 1, "sha256": ""}}), "damaged", "is missing"),
        (lambda p: rewritten(p, files={"../x": {"bytes": 1, "sha256": ""}}), "damaged", "outside the checkpoint"),
        (lambda p: rewritten(p, files={"/etc/passwd": {"bytes": 1, "sha256": ""}}), "damaged", "outside"),
    ],
)
def test_damage_is_seen_and_the_one_before_it_is_taken(spoil, kind, said, folder):
    spoil(folder / "step-00000100")
    path, wrong = newest_checkpoint(folder)
    assert path is not None
    assert path.name == "step-00000020"
    found = wrong[folder / "step-00000100"]
    assert found.kind == kind
    assert said in found.fault


def test_a_flipped_bit_of_a_checkpoint_is_seen(folder):
    """Scenario 3, over weights, state and manifest: whole, or not, but never whole with other content."""
    path = folder / "step-00000100"
    before = {file: file.read_bytes() for file in path.iterdir()}
    said_only_by = json.loads(before[path / "manifest.json"])
    for file, content in before.items():
        for bit in range(0, 8 * len(content), 5):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            if inspect(path).kind == "complete":
                now = json.loads((path / "manifest.json").read_bytes())
                assert now["files"] == said_only_by["files"]
                assert now["step"] == 100
        file.write_bytes(content)
    assert inspect(path).kind == "complete"


def test_a_later_format_is_refused_by_name_never_passed_over(folder):
    """Scenario 15."""
    newest = folder / "step-00000100"
    rewritten(newest, format_version=2, written_by="9.9.0", readable_since="9.0.0")
    said = f"written by critic-train 9.9.0, needs >= 9.0.0; this is {__version__}"
    for refused in (
        lambda: newest_checkpoint(folder),
        lambda: resolve_model(folder.parent),
        lambda: resolve_model(newest),
        lambda: write_checkpoint(folder, 100, fill),
    ):
        with pytest.raises(ModelError, match=said):
            refused()
    assert [p.name[-3:] for p in checkpoints(folder)] == ["005", "020", "100"]


def test_files_are_synced_before_the_manifest_and_the_manifest_before_the_name(folder):
    """Data before reference: what a power cut leaves is either without a name or whole."""
    seen = []
    with storage.watched(lambda found: seen.append(f"{found.kind} {found.path.name}")):
        write_checkpoint(folder, 101, fill)
    hidden = f".step-00000101.tmp-{os.getpid()}"
    manifest = [f"{what} .manifest.json.tmp" for what in ("create", "write", "sync", "rename")]
    assert seen == [
        *(f"mkdir {hidden}", "sync model.safetensors", "sync trainer.json"),
        *(*manifest, f"sync {hidden}", f"rename {hidden}", "sync checkpoints"),
    ]


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

    assert inspect(write_checkpoint(folder, 100, other)).kind == "complete"


def test_one_that_stands_incomplete_is_set_aside_and_written(folder):
    (folder / "step-00000100" / "manifest.json").unlink()
    assert inspect(write_checkpoint(folder, 100, fill)).kind == "complete"
    assert (folder / "damaged-step-00000100-0" / "model.safetensors").read_bytes() == b"weights"


def test_a_run_stands_for_its_best_or_its_newest_checkpoint(folder):
    run = folder.parent
    assert resolve_model(run).name == "step-00000100"
    (run / "best").symlink_to("checkpoints/step-00000020")
    assert resolve_model(run).name == "step-00000020"
    assert resolve_model(run / "best") == run / "best"
    for path in checkpoints(folder):
        (path / "manifest.json").unlink()
    (run / "best").unlink()
    with pytest.raises(ModelError, match="no complete checkpoint yet"):
        resolve_model(run)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_no_model(name, folder):
    """Scenario 3: eval and fit --model refuse with exit code 4; state that they do not need may be damaged."""
    newest = folder / "step-00000100"
    (folder.parent / "best").symlink_to("checkpoints/step-00000100")
    (newest / "trainer.json").write_text("other")
    assert resolve_model(folder.parent) == newest
    assert condition(newest).kind == "damaged"
    (newest / name).write_text("other")
    for path in (folder.parent, folder.parent / "best", newest):
        with pytest.raises(ModelError, match="is damaged"):
            resolve_model(path)


def test_an_incomplete_checkpoint_is_no_model(folder):
    (folder / "step-00000100" / "manifest.json").unlink()
    with pytest.raises(ModelError, match="is incomplete"):
        resolve_model(folder / "step-00000100")


def test_any_other_model_directory_needs_no_manifest(tmp_path):
    assert resolve_model(tmp_path) == tmp_path
