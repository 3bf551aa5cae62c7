"""Experiment trackers, one file each. Their packages are extras, imported when they are asked for."""

import importlib.util
from pathlib import Path
from typing import Any

from critic_train.errors import ConfigError
from critic_train.observing.observer import Observer
from critic_train.settings.tracking import TrackingSettings

PACKAGES = ("tensorboard", "wandb", "trackio")


def require_packages(settings: TrackingSettings) -> None:
    """See that the trackers asked for are installed, before anything is read.

    Raises:
        ConfigError: one is not, with the command that installs it.
    """
    missing = [name for name in dict.fromkeys(settings.log_to) if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--log-to {missing[0]}: the package {missing[0]} is not installed",
            hint=f"pip install 'critic-train[{','.join(missing)}]'",
        )


def trackers(
    settings: TrackingSettings, out: Path, *, run_id: str, first_step: int, config: dict[str, Any]
) -> list[Observer]:
    """The trackers that were asked for. Each opens its run when the first event comes.

    Args:
        settings: which, and under what project.
        out: the run directory; its name is the run's name.
        run_id: the same at every start of this run, another for every other run.
        first_step: the step from which this start goes on.
        config: what the tracker shows as the run's configuration.
    """
    made: list[Observer] = []
    name = out.resolve().name
    for tracker in dict.fromkeys(settings.log_to):
        if tracker == "tensorboard":
            from critic_train.observing.trackers.to_tensorboard import ToTensorboard

            made.append(ToTensorboard(out / "tensorboard", first_step=first_step, config=config))
        elif tracker == "wandb":
            from critic_train.observing.trackers.to_wandb import ToWandb

            made.append(ToWandb(out, project=settings.log_project, run_name=name, run_id=run_id, config=config))
        else:
            from critic_train.observing.trackers.to_trackio import ToTrackio

            made.append(ToTrackio(project=settings.log_project, run_name=f"{name}-{run_id}", config=config))
    return made
