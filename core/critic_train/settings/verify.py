"""Settings of `critic-train verify`."""

from dataclasses import dataclass
from typing import ClassVar

from critic_train.settings.fields import Settings, setting
from critic_train.settings.reading import column_faults, column_setting


@dataclass(frozen=True, kw_only=True)
class VerifySettings(Settings):
    """Settings of `critic-train verify`."""

    command: ClassVar[str] = "verify"

    target: list[str] = setting(
        [],
        "Runs, checkpoints, Hugging Face directories, or rollouts: files, folders or globs.",
        panel="Data",
        metavar="TARGET",
        positional=True,
    )
    column: list[str] = column_setting()

    def faults(self) -> list[str]:
        """See Settings."""
        wrong = [] if self.target else ["TARGET is needed: a run, a checkpoint, or rollouts"]
        return wrong + column_faults(self.column)
