"""Experiment trackers."""

from dataclasses import dataclass
from typing import Literal

from critic_train.settings.fields import Settings, setting

Tracker = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True, kw_only=True)
class TrackingSettings(Settings):
    """Part of `fit`."""

    log_to: list[Tracker] = setting(
        [], "Also log to this tracker; repeatable. metrics.jsonl is always written.", panel="Run"
    )
    log_project: str = setting("critic-train", "Project of wandb and trackio.", panel="Run", metavar="NAME")
