"""The result of one check of `critic-train verify`."""

from dataclasses import dataclass
from typing import Literal

State = Literal["sound", "unsound", "unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The state of a file, a checkpoint or a part of a run.

    Attributes:
        what: its name, as in "step-00000100" or a shard's path.
        state: "sound"; "unsound", which makes the exit code 1; "unknown" where it is not there to be compared.
        message: what was compared, or the reason why it is unsound.
    """

    what: str
    state: State
    message: str
