"""Settings of `critic-train eval`."""

from dataclasses import dataclass
from typing import ClassVar

from critic_train.settings.compute import ComputeSettings
from critic_train.settings.fields import seed_faults, setting, too_small
from critic_train.settings.loss import cliprange_faults
from critic_train.settings.reading import ReadingSettings


@dataclass(frozen=True, kw_only=True)
class EvalSettings(ComputeSettings, ReadingSettings):
    """Settings of `critic-train eval`."""

    command: ClassVar[str] = "eval"

    model: list[str] = setting(
        [],
        "Critic to judge: a run, a checkpoint or a Hugging Face directory; repeat to compare. "
        "Without it, the stored values are judged.",
        panel="Model",
        metavar="DIR",
    )
    by: list[str] = setting([], "Also judge per value of this column; repeatable.", panel="Judgement", metavar="COLUMN")
    cliprange_value: float = setting(
        0.5,
        "The clip's half-width eps around the stored values, for value_loss and clipfrac.",
        panel="Judgement",
    )
    resamples: int = setting(1000, "Bootstrap resamples of the prompt groups.", panel="Judgement")
    seed: int = setting(0, "Seed of the bootstrap.", panel="Judgement")

    def faults(self) -> list[str]:
        """See Settings."""
        return [
            *cliprange_faults(self.cliprange_value),
            *too_small(self, 1, "resamples"),
            *seed_faults(self.seed),
        ]
