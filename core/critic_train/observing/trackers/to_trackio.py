"""Trackio: a local database under TRACKIO_DIR, shown by `trackio show`."""

import contextlib
import sys
from typing import Any

from critic_train.observing.trackers.tracker import Tracker


class ToTrackio(Tracker):
    """Logs to one Trackio run, which a resumed fit goes on with. Trackio's own environment variables hold.

    Args:
        project: the Trackio project.
        run_name: what the run is called and known by.
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
