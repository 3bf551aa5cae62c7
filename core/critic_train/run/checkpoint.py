"""Checkpoints that exist whole or not at all.

A checkpoint is written beside its place, every file synced, a manifest of sizes and SHA-256 digests last; then the
directory is renamed into place and its parent synced. What has no manifest, or whose manifest does not hold, is no
checkpoint. Nothing is pickled.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from critic_train.errors import ModelError
from critic_train.run.durable import sha256, write_json
from critic_train.run.storage import make_directory, remove_tree, rename, sync_directory, sync_file

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PREFIX = "step-"


def checkpoint_name(step: int) -> str:
    """`100` -> `step-00000100`."""
    return f"{PREFIX}{step:08d}"


def checkpoint_step(path: Path) -> int | None:
    """The step of a checkpoint directory by its name, None where it is none."""
    digits = path.name.removeprefix(PREFIX)
    return int(digits) if path.name.startswith(PREFIX) and digits.isdecimal() else None


def write_checkpoint(folder: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Write a checkpoint.

    Args:
        folder: the run's `checkpoints` directory.
        step: optimizer steps taken.
        fill: writes the checkpoint's files into the empty directory it is given.

    Returns:
        The checkpoint. One that already stands there whole is left as it is: the same step holds the same state.

    Raises:
        OSError: the disk is full or not writable; what was begun is removed.
    """
    target = folder / checkpoint_name(step)
    if target.exists():
        if not damage(target):
            return target
        set_aside(target)
    temporary = folder / f".{target.name}.tmp-{os.getpid()}"
    remove_tree(temporary)
    make_directory(temporary)
    try:
        fill(temporary)
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        for file in files:
            sync_file(file)
        entries = {str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
        write_json(temporary / MANIFEST, {"format_version": FORMAT_VERSION, "step": step, "files": entries})
        rename(temporary, target)
    except BaseException:
        remove_tree(temporary)
        raise
    sync_directory(folder)
    return target


def damage(path: Path) -> str:
    """What is wrong with a checkpoint, in words; an empty string when every digest holds."""
    manifest = path / MANIFEST
    try:
        recorded = json.loads(manifest.read_text(encoding="utf-8"))
        version, files = recorded["format_version"], dict(recorded["files"])
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    if version != FORMAT_VERSION:
        return f"it has format version {version}; this critic-train reads {FORMAT_VERSION}"
    for name, entry in files.items():
        file = path / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{MANIFEST} names a file outside the checkpoint: {name!r}"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, {entry['bytes']} were written"
        if sha256(file) != entry["sha256"]:
            return f"the content of {name} has changed since it was written"
    return ""


def set_aside(path: Path) -> Path:
    """Move a damaged checkpoint out of the way without deleting it."""
    number = 0
    while (aside := path.with_name(f"damaged-{path.name}-{number}")).exists():
        number += 1
    rename(path, aside)
    sync_directory(path.parent)
    return aside


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint directories of a run by step, oldest first, whole or not."""
    found = [p for p in folder.iterdir() if p.is_dir() and checkpoint_step(p) is not None] if folder.is_dir() else []
    return sorted(found, key=lambda p: checkpoint_step(p) or 0)


def newest_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint whose digests hold, and what is wrong with newer ones."""
    wrong: dict[Path, str] = {}
    for path in reversed(checkpoints(folder)):
        fault = damage(path)
        if not fault:
            return path, wrong
        wrong[path] = fault
    return None, wrong


def prune(folder: Path, keep: int, best: Path | None) -> list[Path]:
    """Remove all but the newest `keep` checkpoints and the best one; what cannot be removed stays.

    Returns:
        The checkpoints that remain, oldest first.
    """
    standing = checkpoints(folder)
    kept = set(standing[-keep:]) | ({best} if best else set())
    for path in standing:
        if path not in kept:
            _remove(path)
    return checkpoints(folder)


def _remove(path: Path) -> None:
    """Remove a checkpoint: hidden first, so that one that is half removed is not taken for one that is damaged."""
    hidden = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    rename(path, hidden)
    remove_tree(hidden)


def resolve_model(path: Path) -> Path:
    """A run, a run's `best`, a checkpoint or a Hugging Face directory -> the directory that holds the weights.

    A run stands for its best checkpoint, or for its newest whole one while there is no best.

    Raises:
        ModelError: the run has no whole checkpoint.
    """
    folder = path / "checkpoints"
    if not folder.is_dir():
        return path
    best = path / "best"
    if best.is_dir():
        return best.resolve()
    newest, wrong = newest_checkpoint(folder)
    if newest is None:
        faults = "".join(f"\n  {p.name}: {fault}" for p, fault in wrong.items())
        raise ModelError(f"the run {path} has no whole checkpoint yet{faults}", hint="let critic-train fit reach one")
    return newest


def read_state(path: Path) -> dict[str, Any]:
    """The training state of a whole checkpoint (`trainer.json`)."""
    state = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
    assert isinstance(state, dict)
    return state
