"""Experiment trackers: TensorBoard, Weights & Biases, Trackio.

Metrics have the names that dashboards of RL trainers use, as verl's `critic/vf_loss`. A tracker opens its run at the
first event, logs steps and evaluations, and closes once. The packages are extras, imported when they are used.
"""

import contextlib
import importlib.util
import json
import os
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from critic_train.callbacks.callback import Callback
from critic_train.errors import ConfigError
from critic_train.evaluation.metrics import tracker_name
from critic_train.events import EvaluationEnded, Event, StepEnded
from critic_train.settings import RunSettings

STEP_NAMES = {
    "value_loss": "critic/vf_loss",
    "clipfrac": "critic/vf_clipfrac",
    "saturation": "critic/vf_saturation",
    "vpred_mean": "critic/vpred_mean",
    "lm_loss": "critic/lm_loss",
    "grad_norm": "critic/grad_norm",
    "lr": "critic/lr",
    "response_tokens": "critic/response_tokens",
    "rollouts": "critic/rollouts",
    "skipped_steps": "critic/skipped_steps",
}
"""A name in metrics.jsonl, or `skipped_steps` of a StepEnded -> the tracker's name."""

TIMING_NAMES = {
    "step_seconds": "timing_s/update_critic",
    "rollout_tokens_per_second": "perf/throughput",
    "computed_tokens_per_second": "perf/computed_throughput",
    "memory_bytes": "perf/max_memory_bytes",
    "elapsed_seconds": "perf/elapsed_seconds",
}
"""A name in timings.jsonl -> the tracker's. Throughput counts a shared token once for each rollout that has it."""


def step_metrics(event: StepEnded) -> dict[str, float]:
    """The numbers of a step, as a tracker logs them."""
    metrics = event.metrics | {"skipped_steps": event.skipped_steps}
    named = {STEP_NAMES[name]: value for name, value in metrics.items() if name in STEP_NAMES}
    named |= {TIMING_NAMES[name]: value for name, value in event.timing.items() if name in TIMING_NAMES}
    return _numbers(named | {"training/epoch": event.epoch})


def evaluation_metrics(event: EvaluationEnded) -> dict[str, float]:
    """The numbers of an evaluation on held-out rollouts: the critic's own, and what its baselines explain."""
    named: dict[str, Any] = {}
    for name, value in event.metrics.items():
        logged = tracker_name(name.removesuffix("_interval"))
        if name.endswith("_interval"):
            if isinstance(value, list):  # None over too few prompts
                named |= {f"{logged}_low": value[0], f"{logged}_high": value[1]}
        else:
            named[logged] = value
    for name, metrics in event.metrics.get("baselines", {}).items():
        named[f"val/baselines/{name}/explained_variance"] = metrics.get("explained_variance")
    return _numbers(named)


def _numbers(named: dict[str, Any]) -> dict[str, float]:
    """The entries that are numbers: without None, tables and flags."""
    return {
        name: value for name, value in named.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


class Tracker(ABC):
    """A callback that logs numbers by step.

    Attributes:
        name: of the tracker, for --log-to and warnings.
    """

    name: str

    def __init__(self) -> None:
        self._is_open = False

    def on_event(self, event: Event) -> None:
        """See Callback."""
        if isinstance(event, StepEnded):
            self._log(step_metrics(event), event.step)
        elif isinstance(event, EvaluationEnded):
            self._log(evaluation_metrics(event), event.step)

    def close(self) -> None:
        """See Callback."""
        if self._is_open:
            self._is_open = False
            self.close_run()

    @abstractmethod
    def open_run(self) -> None:
        """Start the tracker's run, or resume it."""

    @abstractmethod
    def log(self, numbers: dict[str, float], step: int) -> None:
        """Log the numbers of a step."""

    @abstractmethod
    def close_run(self) -> None:
        """Write out what is buffered, and end the run."""

    def _log(self, numbers: dict[str, float], step: int) -> None:
        if not self._is_open:
            self.open_run()
            self._is_open = True
        self.log(numbers, step)


class ToTensorboard(Tracker):
    """Writes event files that `tensorboard --logdir` reads; no server is needed.

    Args:
        folder: where the event files go.
        first_step: the step from which the run resumes; what was logged beyond it before is hidden.
        config: shown as text.
    """

    name = "tensorboard"

    def __init__(self, folder: Path, *, first_step: int, config: dict[str, Any]) -> None:
        super().__init__()
        self._folder, self._first_step, self._config = folder, first_step, config
        self._writer: Any = None

    def open_run(self) -> None:
        """See Tracker."""
        from torch.utils.tensorboard import SummaryWriter

        purge = self._first_step + 1 if self._first_step else None
        self._writer = SummaryWriter(str(self._folder), purge_step=purge)
        if not self._first_step:
            # Four spaces make a code block, in which nothing is taken for markup.
            text = "\n".join("    " + line for line in json.dumps(self._config, indent=2).splitlines())
            self._writer.add_text("settings", text, 0)

    def log(self, numbers: dict[str, float], step: int) -> None:
        """See Tracker."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close_run(self) -> None:
        """See Tracker."""
        self._writer.close()


class ToWandb(Tracker):
    """Logs to one W&B run, also where `fit` resumes. W&B's environment variables take precedence.

    Args:
        out: the run directory; W&B's files go to `wandb/` in it.
        project: unless WANDB_PROJECT names one.
        run_name: shown.
        run_id: identifies the run.
        config: shown as the run's configuration.
    """

    name = "wandb"

    def __init__(self, out: Path, *, project: str, run_name: str, run_id: str, config: dict[str, Any]) -> None:
        super().__init__()
        self._out, self._project, self._run_name, self._run_id, self._config = out, project, run_name, run_id, config
        self._run: Any = None

    def open_run(self) -> None:
        """See Tracker."""
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


class ToTrackio(Tracker):
    """Logs to one Trackio run, also where `fit` resumes. Trackio's environment variables take precedence.

    Args:
        project: the Trackio project.
        run_name: identifies the run.
        config: shown as the run's configuration.
    """

    name = "trackio"

    def __init__(self, *, project: str, run_name: str, config: dict[str, Any]) -> None:
        super().__init__()
        self._project, self._run_name, self._config = project, run_name, config
        self._run: Any = None

    def open_run(self) -> None:
        """See Tracker."""
        # Trackio prints hints; stdout is for results.
        with contextlib.redirect_stdout(sys.stderr):
            import trackio

            self._run = trackio.init(
                self._project,
                name=self._run_name,
                config=self._config,
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, numbers: dict[str, float], step: int) -> None:
        """See Tracker."""
        self._run.log(numbers, step=step)

    def close_run(self) -> None:
        """See Tracker."""
        with contextlib.redirect_stdout(sys.stderr):
            import trackio

            # The run's own finish would leave it to be finished once more, on stdout, when the program ends.
            trackio.finish()


def require_packages(settings: RunSettings) -> None:
    """Check that the packages of the trackers are installed, before any data is read.

    Raises:
        ConfigError: one is not, with the command that installs it.
    """
    missing = [name for name in dict.fromkeys(settings.log_to) if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--log-to {missing[0]}: the package {missing[0]} is not installed",
            hint=f"pip install {' '.join(missing)}",
        )


def trackers(
    settings: RunSettings, out: Path, *, run_id: str, first_step: int, config: dict[str, Any]
) -> list[Callback]:
    """The trackers of --log-to. Each opens its run at the first event.

    Args:
        settings: which trackers, and the project.
        out: the run directory; its name is the run's name.
        run_id: identifies the run; the same where it is resumed.
        first_step: the step from which the run resumes, or 0.
        config: shown as the run's configuration.
    """
    made: list[Callback] = []
    name = out.resolve().name
    for tracker in dict.fromkeys(settings.log_to):
        if tracker == "tensorboard":
            made.append(ToTensorboard(out / "tensorboard", first_step=first_step, config=config))
        elif tracker == "wandb":
            made.append(ToWandb(out, project=settings.log_project, run_name=name, run_id=run_id, config=config))
        else:
            made.append(ToTrackio(project=settings.log_project, run_name=f"{name}-{run_id}", config=config))
    return made
