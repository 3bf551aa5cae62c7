"""Files that cannot be used: all of them are named at once, or left out and counted."""

from dataclasses import dataclass, field
from typing import Any

from critic_train.errors import DataError

SHOWN = 20
NAMES_A_LINE = 3
LEAVES_OUT = "--on-bad-file skip leaves it out and counts it; copying it again may mend it"
LEAVES_THEM_OUT = "--on-bad-file skip leaves them out and counts them; copying them again may mend them"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadFile:
    """A file that cannot be used.

    Attributes:
        file: its name as the user gave it.
        fault: what is wrong with it, to be read after the name; one line or several.
        said: the same as a sentence of its own, with the name in it.
        hint: what to do about it, where that is more than to mend or replace the file.
        rows: how many rows its footer claims; None where the footer cannot be read.
    """

    file: str
    fault: str
    said: str = ""
    hint: str = ""
    rows: int | None = None

    @classmethod
    def of(cls, name: str, error: DataError, rows: int | None) -> "BadFile":
        """A file for what was said of it: the name, where the sentence begins with it, is taken off."""
        fault = error.message.removeprefix(name).lstrip(" ,:")
        return cls(file=name, fault=fault, said=error.message, hint=error.hint, rows=rows)


@dataclass(slots=True)
class BadFiles:
    """The bad files of a data set, each once, in the order found.

    Attributes:
        found: name -> the file.
    """

    found: dict[str, BadFile] = field(default_factory=dict)

    def add(self, file: BadFile) -> None:
        """Take one in; of a file that is known already, the first fault stays."""
        self.found.setdefault(file.file, file)

    def __len__(self) -> int:
        return len(self.found)

    def __contains__(self, name: str) -> bool:
        return name in self.found

    @property
    def rows(self) -> int:
        """Rows that the footers of the bad files claim."""
        return sum(file.rows or 0 for file in self.found.values())

    def lines(self) -> list[str]:
        """A line for each file; files with the same fault share one. Long lists are cut and counted."""
        by_fault: dict[str, list[str]] = {}
        for file in self.found.values():
            by_fault.setdefault(" ".join(file.fault.split()), []).append(file.file)
        told = [
            f"{', '.join(names[start : start + NAMES_A_LINE])}: {fault}"
            for fault, names in by_fault.items()
            for start in range(0, len(names), NAMES_A_LINE)
        ]
        return told[:SHOWN] + ([f"and {len(told) - SHOWN:,} more"] if len(told) > SHOWN else [])

    def error(self, *, all_of_them: bool = False) -> DataError:
        """The fault that tells of them.

        Args:
            all_of_them: whether there is no good file.
        """
        if len(self.found) == 1:
            (file,) = self.found.values()
            hints = [hint for hint in (file.hint, "" if all_of_them else LEAVES_OUT) if hint]
            return DataError(file.said or f"{file.file}: {file.fault}", hint="\n".join(hints))
        left = ", and there are no others" if all_of_them else ""
        shown = "\n".join(f"  {line}" for line in self.lines())
        hints = list(dict.fromkeys(file.hint for file in self.found.values() if file.hint))[:1]
        hints += [] if all_of_them else [LEAVES_THEM_OUT]
        return DataError(f"{len(self.found)} files cannot be used{left}\n{shown}", hint="\n".join(hints))

    def sentence(self) -> str:
        """What was left out, for a notice."""
        count = len(self.found)
        lines = "\n".join(f"  {line}" for line in self.lines())
        what = "1 file is left out" if count == 1 else f"{count} files are left out"
        return f"{what}, with the {self.rows:,} rows their footers tell of:\n{lines}"

    def summary(self) -> dict[str, Any]:
        """For records and reports; JSON-able. Every file is in it."""
        files = [
            {"file": file.file, "rows": file.rows, "fault": " ".join(file.fault.split())}
            for file in self.found.values()
        ]
        return {"count": len(files), "rows": self.rows, "files": files}
