"""Weights & Biases, online or (WANDB_MODE=offline) to files in the run directory."""

from pathlib import Path
from typing import Any

from critic_train.observing.trackers.tracker import Tracker


class ToWandb(Tracker):
    """Logs to one W&B run, which a resumed fit goes on with. W&B's own environment variables hold.

    Args:
        out: the run directory; W&B's files go to `wandb/` in it.
        project: unless WANDB_PROJECT names one.
        run_name: what the run is called.
        run_id: what the run is known by.
        config: shown as the run's configuration.
    """

    name = "wandb"

    def __init__(self, out: Path, *, project: str, run_name: str, run_id: str, config: dict[str, Any]) -> None:
        super().__init__()
        self._out, self._project, self._run_name, self._run_id, self._config = out, project, run_name, run_id, config
        self._run: Any = None

    def open_run(self) -> None:
        """See Tracker."""
        import os

        import wandb

        # Stdout and stderr are left alone, and nothing of the machine's code or repository is collected.
        quiet = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or self._project,
            name=self._run_name,
            id=self._run_id,
            resume="allow",
            dir=str(self._out),
            config=self._config,
            settings=quiet,
        )
        # W&B counts calls itself; ours count optimizer steps, and a resumed run logs some of them again.
        self._run.define_metric("global_step")
        self._run.define_metric("*", step_metric="global_step")

    def log(self, numbers: dict[str, float], step: int) -> None:
        """See Tracker."""
        self._run.log(numbers | {"global_step": step})

    def close_run(self) -> None:
        """See Tracker."""
        self._run.finish()
