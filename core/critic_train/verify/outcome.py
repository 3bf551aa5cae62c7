"""One thing looked at, and what was found."""

from dataclasses import dataclass
from typing import Literal

State = Literal["sound", "unsound", "unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of a file, a checkpoint or a part of a run.

    Attributes:
        what: its name, as in "step-00000100" or a shard's path.
        state: "sound"; "unsound", which makes the exit code 1; "unknown" where it is not there to be looked at.
        said: what was looked at, or what is wrong, in words.
    """

    what: str
    state: State
    said: str
