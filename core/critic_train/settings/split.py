"""Settings of `critic-train split`."""

from dataclasses import dataclass
from typing import ClassVar

from critic_train.settings.fields import seed_faults, setting
from critic_train.settings.reading import ReadingSettings


@dataclass(frozen=True, kw_only=True)
class SplitSettings(ReadingSettings):
    """Settings of `critic-train split`."""

    command: ClassVar[str] = "split"

    data: list[str] = setting(
        [],
        "Rollouts: a folder, a Parquet file or a glob.",
        panel="Data",
        metavar="DATA",
        positional=True,
    )
    val_fraction: float = setting(0.1, "Share of the prompt groups to hold out.", panel="Data")
    seed: int = setting(0, "Seed of the split.", panel="Data")
    to: str | None = setting(None, "Folder to write train/ and val/ to.", panel="Output", metavar="DIR")

    def faults(self) -> list[str]:
        """See Settings."""
        wrong = [] if self.to else ["--to is needed: the folder for train/ and val/"]
        if not 0.0 < self.val_fraction < 1.0:
            wrong.append(f"--val-fraction must be between 0 and 1, not {self.val_fraction:g}")
        return wrong + seed_faults(self.seed)
