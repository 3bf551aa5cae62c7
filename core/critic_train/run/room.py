"""How much room there is on the disk, and whether it will do."""

import errno
import shutil
from pathlib import Path

from critic_train.errors import MachineError

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""No space, no quota, no larger files: what removing something may help against."""
UNITS = ("bytes", "kB", "MB", "GB", "TB")


def free_bytes(path: Path) -> int:
    """What this user may still write at `path`, or where its nearest standing parent is. A quota is not seen."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def in_units(count: int) -> str:
    """`1234567` -> `1.2 MB`."""
    number, unit = float(count), 0
    while number >= 1000 and unit < len(UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.1f} {UNITS[unit]}" if unit else f"{count} bytes"


def require_room(path: Path, needed: int, what: str, *, hint: str) -> None:
    """Raise where the disk has less room than will be needed.

    Args:
        path: where it will be written.
        needed: bytes.
        what: what needs them, as in "3 checkpoints of 1.6 GB".
        hint: what to do.

    Raises:
        MachineError: there is not enough.
    """
    free = free_bytes(path)
    if needed > free:
        raise MachineError(
            f"not enough room at {path} for {what}: {in_units(needed)} needed, {in_units(free)} free",
            hint=hint,
        )
