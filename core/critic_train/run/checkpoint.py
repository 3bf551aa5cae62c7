"""Checkpoints that are complete or absent, and the policy of keeping them.

A checkpoint is written to a temporary directory: every file is synced, then a manifest of sizes and SHA-256 digests,
then the directory; it is renamed to its final name and the parent is synced. A directory without a valid manifest is
not a checkpoint; it is never deleted. Checkpoints are ordered by step, never by a file's time. Nothing is pickled.
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
    rename_durably,
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
        The checkpoint. A complete one of that step is left as it is: the same step has the same state.

    Raises:
        OSError: the disk is full or not writable, or the folder is gone; the unfinished checkpoint is removed.
        ModelError: a later critic-train wrote a checkpoint of this step.
    """
    target = folder / checkpoint_name(step)
    if target.exists():
        state = inspect(target)
        if state.kind == "newer":
            raise _refusal(target, state)
        if state.kind == "complete":
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
    """The name of a checkpoint while it is written or removed; the next start removes leftovers of that name."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def inspect(path: Path, *, digests: bool = True) -> Condition:
    """The condition of a checkpoint of a run, see `condition`; its name and its manifest must agree on the step."""
    state = condition(path, digests=digests)
    if state.kind == "complete" and recorded_step(path) != checkpoint_step(path):
        return Condition("damaged", f"{MANIFEST} says that it is of step {recorded_step(path)}")
    return state


def set_aside(path: Path) -> Path:
    """Move a damaged checkpoint out of the way without deleting it."""
    number = 0
    while (aside := path.with_name(f"damaged-{path.name}-{number}")).exists():
        number += 1
    rename_durably(path, aside)
    return aside


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint directories of a run by step, oldest first, complete or not."""
    paths = [p for p in folder.iterdir() if p.is_dir() and checkpoint_step(p) is not None] if folder.is_dir() else []
    return sorted(paths, key=lambda p: checkpoint_step(p) or 0)


def newest_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, Condition]]:
    """The newest complete checkpoint, and the condition of every newer directory.

    Raises:
        ModelError: a later critic-train wrote the newest one; an older one is not taken in its stead.
    """
    incomplete: dict[Path, Condition] = {}
    for path in reversed(checkpoints(folder)):
        state = inspect(path)
        if state.kind == "complete":
            return path, incomplete
        if state.kind == "newer":
            raise _refusal(path, state)
        incomplete[path] = state
    return None, incomplete


def resolve_model(path: Path) -> Path:
    """A run, a run's `best`, a checkpoint or a Hugging Face directory -> the directory that holds the weights.

    Of a run it is the best checkpoint, or the newest complete one while there is no best.

    Raises:
        ModelError: the run has no complete checkpoint, or the checkpoint named is not complete.
    """
    folder = path / "checkpoints"
    if not folder.is_dir():
        _refuse_damage(path)
        return path
    best = path / "best"
    if best.is_dir():
        _refuse_damage(best.resolve())
        return best.resolve()
    newest, incomplete = newest_checkpoint(folder)
    if newest is None:
        reasons = "".join(f"\n  {p.name}: {state.fault}" for p, state in incomplete.items())
        raise ModelError(
            f"the run {path} has no complete checkpoint yet{reasons}", hint="let critic-train fit reach one"
        )
    return newest


def _refuse_damage(path: Path) -> None:
    """Raise ModelError where a directory is a checkpoint whose weights have changed since it was written."""
    real = path.resolve()
    of_a_run = real.parent.name == "checkpoints" and checkpoint_step(real) is not None
    if not of_a_run and not (path / MANIFEST).is_file():
        return  # any other Hugging Face directory
    state = condition(path, state=False)
    if state.kind != "complete":
        raise _refusal(path, state)


def _refusal(path: Path, state: Condition) -> ModelError:
    if state.kind == "newer":
        return ModelError(f"{path}: {state.fault}", hint="use that version, or another checkpoint")
    return ModelError(
        f"the checkpoint {path} is {state.kind}: {state.fault}",
        hint="critic-train verify says which checkpoints of a run are complete; name one of those",
    )


def read_state(path: Path) -> dict[str, Any]:
    """The training state of a checkpoint (`trainer.json`). Raises ModelError where it cannot be read."""
    try:
        return read_json_object(path / "trainer.json")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path / 'trainer.json'} cannot be read: {error}") from error


class CheckpointManager:
    """Writes a run's checkpoints and removes old ones; never the best, never the newest complete one.

    Args:
        folder: the run's `checkpoints` directory.
        keep: newest complete checkpoints to keep, besides the best. Damaged ones do not count, and stay.

    Attributes:
        warnings: what could not be removed, as text; the reader clears the list.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.warnings: list[str] = []
        self._complete: set[Path] = set()

    def mark_complete(self, path: Path) -> None:
        """Note that a checkpoint's digests are valid, so that they are not computed again."""
        self._complete.add(path)

    def write(self, step: int, fill: Callable[[Path], None], *, bytes_needed: int, best: Path | None) -> Path:
        """Write a checkpoint; on a full disk remove those it would make too old and try once more.

        Args:
            step: optimizer steps taken.
            fill: writes the files into the directory it is given; called again for the second try.
            bytes_needed: its approximate size, for the message.
            best: the checkpoint that must stay.

        Raises:
            MachineError: the disk is full or not writable. No checkpoint is lost.
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
        self._complete.add(path)
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
        """Remove all but the newest complete checkpoints and the best one; those that cannot be removed are warned of.

        Args:
            best: never removed.
            keep: how many; None for the run's own number.

        Returns:
            The checkpoints that remain, oldest first.
        """
        left = self.keep if keep is None else keep
        for path in reversed(checkpoints(self.folder)):
            if left > 0:
                left -= self._is_complete(path)
            elif path != best and (path in self._complete or inspect(path, digests=False).kind == "complete"):
                self._remove(path)
        return checkpoints(self.folder)

    def _is_complete(self, path: Path) -> bool:
        if path not in self._complete and inspect(path).kind == "complete":
            self._complete.add(path)
        return path in self._complete

    def _remove(self, path: Path) -> None:
        """Rename a checkpoint, then remove it: half removed, it must not look like a damaged one."""
        self._complete.discard(path)
        try:
            rename(path, hidden(path))
            error = remove_tree(hidden(path))
        except OSError as refusal:
            error = refusal
        if error is not None:
            self.warnings.append(f"the old checkpoint {path.name} cannot be removed: {error.strerror or error}")
