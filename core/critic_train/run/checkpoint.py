"""Checkpoints that exist whole or not at all.

A checkpoint is written beside its place, every file synced, a manifest of sizes and SHA-256 digests last; then its
directory is synced, renamed into place, and the parent synced. What has no manifest, or whose manifest does not hold,
is no checkpoint; it is never deleted. The order is by step, never by a file's time. Nothing is pickled.

Which checkpoints of a run are kept, and what is done when there is no room for one more.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from critic_train.errors import MachineError, ModelError
from critic_train.jsonio import read_json_object
from critic_train.run.manifest import MANIFEST, Condition, condition, recorded_step, write_manifest
from critic_train.run.storage import (
    DISK_FULL,
    free_bytes,
    make_directory,
    remove_tree,
    rename,
    sync_directory,
    sync_file,
)
from critic_train.text import format_bytes

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
        OSError: the disk is full or not writable, or the folder is gone; what was begun is removed.
        ModelError: a later critic-train wrote a checkpoint of this step.
    """
    target = folder / checkpoint_name(step)
    if target.exists():
        found = inspect(target)
        if found.kind == "newer":
            raise _refusal(target, found)
        if found.kind == "complete":
            return target
        set_aside(target)
    temporary = hidden(target)
    remove_tree(temporary)
    make_directory(temporary, parents=False)
    try:
        fill(temporary)
        for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
            sync_file(file)
        write_manifest(temporary, step)  # which syncs the directory too
        rename(temporary, target)
    except BaseException:
        remove_tree(temporary)
        raise
    sync_directory(folder)
    return target


def hidden(path: Path) -> Path:
    """The name of a checkpoint that is being written or removed; what is left under it goes at the next start."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def inspect(path: Path, *, digests: bool = True) -> Condition:
    """What a checkpoint of a run is found to be; see `condition`. Its name and its manifest must agree on the step."""
    found = condition(path, digests=digests)
    if found.kind == "complete" and recorded_step(path) != checkpoint_step(path):
        return Condition("damaged", f"{MANIFEST} says that it is of step {recorded_step(path)}")
    return found


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


def newest_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, Condition]]:
    """The newest checkpoint whose digests hold, and what newer ones are.

    Raises:
        ModelError: a later critic-train wrote the newest one: it is not passed over for an older one.
    """
    wrong: dict[Path, Condition] = {}
    for path in reversed(checkpoints(folder)):
        found = inspect(path)
        if found.kind == "complete":
            return path, wrong
        if found.kind == "newer":
            raise _refusal(path, found)
        wrong[path] = found
    return None, wrong


def resolve_model(path: Path) -> Path:
    """A run, a run's `best`, a checkpoint or a Hugging Face directory -> the directory that holds the weights.

    A run stands for its best checkpoint, or for its newest whole one while there is no best.

    Raises:
        ModelError: the run has no whole checkpoint, or the checkpoint named is not whole.
    """
    folder = path / "checkpoints"
    if not folder.is_dir():
        _refuse_damage(path)
        return path
    best = path / "best"
    if best.is_dir():
        _refuse_damage(best.resolve())
        return best.resolve()
    newest, wrong = newest_checkpoint(folder)
    if newest is None:
        faults = "".join(f"\n  {p.name}: {found.fault}" for p, found in wrong.items())
        raise ModelError(f"the run {path} has no whole checkpoint yet{faults}", hint="let critic-train fit reach one")
    return newest


def _refuse_damage(path: Path) -> None:
    """Raise ModelError where a directory is a checkpoint whose weights are not those that were written."""
    real = path.resolve()
    of_a_run = real.parent.name == "checkpoints" and checkpoint_step(real) is not None
    if not of_a_run and not (path / MANIFEST).is_file():
        return  # any other Hugging Face directory
    found = condition(path, state=False)
    if found.kind != "complete":
        raise _refusal(path, found)


def _refusal(path: Path, found: Condition) -> ModelError:
    if found.kind == "newer":
        return ModelError(f"{path}: {found.fault}", hint="use that version, or another checkpoint")
    return ModelError(
        f"the checkpoint {path} is {found.kind}: {found.fault}",
        hint="critic-train verify says which checkpoints of a run are whole; name one of those",
    )


def read_state(path: Path) -> dict[str, Any]:
    """The training state of a whole checkpoint (`trainer.json`). Raises ModelError where it cannot be read."""
    try:
        return read_json_object(path / "trainer.json")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path / 'trainer.json'} cannot be read: {error}") from error


class CheckpointManager:
    """Writes a run's checkpoints and removes those that are too old; never the best, never the newest whole one.

    Args:
        folder: the run's `checkpoints` directory.
        keep: newest whole checkpoints to keep, besides the best. What is damaged does not count, and stays.

    Attributes:
        warnings: what could not be removed, in words; whoever reads them takes them out.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.warnings: list[str] = []
        self._whole: set[Path] = set()

    def mark_complete(self, path: Path) -> None:
        """Remember that a checkpoint's digests held, so that they are not taken again."""
        self._whole.add(path)

    def write(self, step: int, fill: Callable[[Path], None], *, bytes_needed: int, best: Path | None) -> Path:
        """Write a checkpoint; on a full disk remove those it would make too old and try once more.

        Args:
            step: optimizer steps taken.
            fill: writes the files into the directory it is given; called again for the second try.
            bytes_needed: about what it will weigh, for the message.
            best: the checkpoint that must stay.

        Raises:
            MachineError: the disk is full or not writable. The checkpoints that stood still stand.
        """
        try:
            path = self._try(step, fill, best)
        except OSError as error:
            remedy = "make room" if error.errno in DISK_FULL else "see to it"
            raise MachineError(
                f"the checkpoint of step {step} cannot be written to {self.folder}: {error.strerror or error}; "
                f"it needs {format_bytes(bytes_needed)}, {format_bytes(free_bytes(self.folder))} are free",
                hint=f"{remedy} and run the same command again: it goes on from the checkpoint before",
            ) from error
        self._whole.add(path)
        return path

    def _try(self, step: int, fill: Callable[[Path], None], best: Path | None) -> Path:
        try:
            return write_checkpoint(self.folder, step, fill)
        except OSError as error:
            before = checkpoints(self.folder)
            if error.errno not in DISK_FULL or self.prune(best, keep=max(1, self.keep - 1)) == before:
                raise
        return write_checkpoint(self.folder, step, fill)

    def prune(self, best: Path | None, *, keep: int | None = None) -> list[Path]:
        """Remove all but the newest whole checkpoints and the best one; what cannot be removed stays, and is told.

        Args:
            best: never removed.
            keep: how many, where it is not the run's own number.

        Returns:
            The checkpoints that remain, oldest first.
        """
        left = self.keep if keep is None else keep
        for path in reversed(checkpoints(self.folder)):
            if left > 0:
                left -= self._is_whole(path)
            elif path != best and (path in self._whole or inspect(path, digests=False).kind == "complete"):
                self._remove(path)
        return checkpoints(self.folder)

    def _is_whole(self, path: Path) -> bool:
        if path not in self._whole and inspect(path).kind == "complete":
            self._whole.add(path)
        return path in self._whole

    def _remove(self, path: Path) -> None:
        """Hide a checkpoint, then remove it: half removed, it must not look like one that is damaged."""
        self._whole.discard(path)
        try:
            rename(path, hidden(path))
            error = remove_tree(hidden(path))
        except OSError as fault:
            error = fault
        if error is not None:
            self.warnings.append(f"the old checkpoint {path.name} cannot be removed: {error.strerror or error}")
