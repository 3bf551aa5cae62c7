"""What a run leaves behind, and how often."""

from dataclasses import dataclass
from typing import Literal

from critic_train.settings.fields import Settings, setting, too_small

BestBy = Literal["explained_variance", "explained_variance_within_group", "mse", "value_loss"]
LOWER_IS_BETTER = ("mse", "value_loss")


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """Part of `fit`."""

    out: str | None = setting(
        None, "Run directory. [default: runs/ and the data folder's name]", panel="Run", metavar="DIR"
    )
    dry_run: bool = setting(False, "Say what the run would take, and train nothing.", panel="Run")
    eval_every: int | None = setting(
        None, "Steps between evaluations on held-out rollouts. [default: a tenth of the run]", panel="Run"
    )
    best_by: BestBy = setting("explained_variance", "Held-out figure that chooses the best checkpoint.", panel="Run")
    patience: int | None = setting(
        None, "Stop after so many evaluations without a better one. [default: never]", panel="Run"
    )
    checkpoint_every: int = setting(200, "Steps between checkpoints; the last step always writes one.", panel="Run")
    keep: int = setting(2, "Newest checkpoints kept, besides the best.", panel="Run")
    log_every: int = setting(10, "Steps between plain progress lines when not on a terminal.", panel="Run")
    no_report: bool = setting(False, "Write no report.html.", panel="Run")

    def faults(self) -> list[str]:
        """See Settings."""
        return too_small(self, 1, "checkpoint_every", "keep", "log_every", "eval_every", "patience")
