"""Settings of `critic-train check`."""

from dataclasses import dataclass
from typing import ClassVar

from critic_train.settings.fields import setting
from critic_train.settings.reading import SourceSettings, address_faults


@dataclass(frozen=True, kw_only=True)
class CheckSettings(SourceSettings):
    """Settings of `critic-train check`."""

    command: ClassVar[str] = "check"

    data: list[str] = setting(
        [],
        "Rollouts: a folder, a Parquet file or a glob.",
        panel="Data",
        metavar="DATA",
        positional=True,
    )
    against: list[str] = setting(
        [],
        "Other rollouts, as held-out ones: prompts that stand in both are counted; repeatable.",
        panel="Data",
        metavar="PATH",
    )
    show: int = setting(10, "Bad rows shown; --json lists up to ten thousand.", panel="Output", metavar="N")

    def faults(self) -> list[str]:
        """See Settings."""
        return address_faults("--against", self.against)
