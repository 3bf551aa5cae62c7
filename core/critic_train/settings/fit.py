"""Settings of `critic-train fit`."""

from dataclasses import dataclass
from typing import ClassVar

from critic_train.settings.compute import ComputeSettings
from critic_train.settings.fields import setting
from critic_train.settings.loss import LossSettings
from critic_train.settings.memory import MemorySettings
from critic_train.settings.model import ModelSettings
from critic_train.settings.ranks import RanksSettings
from critic_train.settings.reading import ReadingSettings, address_faults
from critic_train.settings.returns import ReturnsSettings
from critic_train.settings.run import RunSettings
from critic_train.settings.tracking import TrackingSettings
from critic_train.settings.training import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class FitSettings(
    ModelSettings,
    TrackingSettings,
    RunSettings,
    RanksSettings,
    MemorySettings,
    ComputeSettings,
    TrainingSettings,
    LossSettings,
    ReturnsSettings,
    ReadingSettings,
):
    """Settings of `critic-train fit`."""

    command: ClassVar[str] = "fit"

    val_data: list[str] = setting(
        [], "Held-out rollouts: a folder, a file or a glob; repeatable.", panel="Data", metavar="PATH"
    )
    val_fraction: float = setting(
        0.1,
        "Share of the prompt groups held out when there is no --val-data; 0 holds out none.",
        panel="Data",
    )

    def faults(self) -> list[str]:
        """See Settings."""
        wrong = address_faults("--val-data", self.val_data)
        if not 0.0 <= self.val_fraction < 1.0:
            wrong.append(f"--val-fraction must be in [0, 1), not {self.val_fraction:g}")
        if self.patience is not None and not self.val_data and self.val_fraction == 0:
            wrong.append("--patience needs held-out rollouts: --val-data, or --val-fraction above 0")
        if self.optimizer != "adamw" and self.offload != "none":
            wrong.append(f"--optimizer {self.optimizer} keeps its moments where it likes: leave --offload at none")
        return wrong
