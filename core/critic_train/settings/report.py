"""Settings of `critic-train report`."""

from dataclasses import dataclass
from typing import ClassVar

from critic_train.settings.fields import Settings, setting


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Settings):
    """Settings of `critic-train report`."""

    command: ClassVar[str] = "report"

    runs: list[str] = setting(
        [],
        "Run directories, and files that eval --json wrote; several are compared on one page.",
        panel="Data",
        metavar="RUN",
        positional=True,
    )
    tokenizer: str | None = setting(
        None,
        "Show rollouts in the words of this tokenizer: a model's directory or a tokenizer.json. "
        "[default: the one beside the critic]",
        panel="Model",
        metavar="DIR",
    )
    to: str | None = setting(
        None,
        "Where the page goes. [default: report.html in the run; beside the file; here, for several]",
        panel="Output",
        metavar="FILE",
    )

    def faults(self) -> list[str]:
        """See Settings."""
        return [] if self.runs else ["a run is needed: the directory that fit wrote, or a file of eval --json"]
