"""TensorBoard event files in the run directory."""

import json
from pathlib import Path
from typing import Any

from critic_train.observing.trackers.tracker import Tracker


class ToTensorboard(Tracker):
    """Writes event files that `tensorboard --logdir` reads; no server is needed.

    Args:
        folder: where the event files go.
        first_step: the step this start goes on from; what an earlier start logged beyond it is purged from view.
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
