"""Which checkpoints of a run are kept, and what is done when there is no room for one more."""

from collections.abc import Callable
from pathlib import Path

from critic_train.errors import MachineError
from critic_train.run.checkpoint import checkpoints, hidden, inspect, write_checkpoint
from critic_train.run.room import DISK_FULL, free_bytes, in_units
from critic_train.run.storage import remove_tree, rename


class Keeper:
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

    def found_whole(self, path: Path) -> None:
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
                f"it needs {in_units(bytes_needed)}, {in_units(free_bytes(self.folder))} are free",
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
            elif path != best and (path in self._whole or inspect(path, digests=False).kind == "whole"):
                self._remove(path)
        return checkpoints(self.folder)

    def _is_whole(self, path: Path) -> bool:
        if path not in self._whole and inspect(path).kind == "whole":
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
