"""Settings of `critic-train eval`."""

import math
from dataclasses import dataclass
from typing import ClassVar

from critic_train.settings.compute import ComputeSettings
from critic_train.settings.fields import seed_faults, setting, too_small
from critic_train.settings.loss import cliprange_faults
from critic_train.settings.ranks import RanksSettings
from critic_train.settings.reading import ReadingSettings
from critic_train.settings.returns import ReturnsSettings


@dataclass(frozen=True, kw_only=True)
class EvalSettings(RanksSettings, ComputeSettings, ReturnsSettings, ReadingSettings):
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
    fail_under: list[str] = setting(
        [],
        "Exit 1 where a figure of the verdict, named as in --json, is below VALUE or does not exist, as in "
        "explained_variance_interval.low=0; repeatable.",
        panel="Judgement",
        metavar="METRIC=VALUE",
    )
    fail_over: list[str] = setting(
        [],
        "The same where a figure is above VALUE, as in expected_calibration_error=0.1; repeatable.",
        panel="Judgement",
        metavar="METRIC=VALUE",
    )
    report: str | None = setting(
        None, "Also write an HTML page about it. [default: none]", panel="Output", metavar="FILE"
    )

    def faults(self) -> list[str]:
        """See Settings."""
        return [
            *cliprange_faults(self.cliprange_value),
            *too_small(self, 1, "resamples"),
            *seed_faults(self.seed),
            *gate_faults("--fail-under", self.fail_under),
            *gate_faults("--fail-over", self.fail_over),
        ]


def gate_faults(flag: str, pairs: list[str]) -> list[str]:
    """What is wrong with the values of --fail-under or --fail-over, one line each."""
    return [
        f"{flag} takes METRIC=VALUE, as in explained_variance=0.2, not {pair!r}"
        for pair in pairs
        if not read_gate(pair)[0] or not math.isfinite(read_gate(pair)[1])
    ]


def read_gate(pair: str) -> tuple[str, float]:
    """`explained_variance=0.2` -> ("explained_variance", 0.2); NaN where it cannot be read."""
    metric, _, value = pair.rpartition("=")  # a critic's path may hold the sign
    try:
        return metric, float(value)
    except ValueError:
        return metric, math.nan
