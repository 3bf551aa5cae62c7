"""How long and how fast to train."""

from dataclasses import dataclass
from typing import Literal

from critic_train.settings.fields import Settings, seed_faults, setting, too_small

OptimizerKind = Literal["adamw", "adamw-8bit"]
Schedule = Literal["constant", "linear", "cosine"]
OnNonFinite = Literal["stop", "skip"]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Settings):
    """Part of `fit`."""

    epochs: int | None = setting(
        None, "Passes over the rollouts. [default: 3, or as many as --max-steps needs]", panel="Training"
    )
    max_steps: int | None = setting(None, "Stop after this many steps, whatever --epochs says.", panel="Training")
    batch_size: int = setting(64, "Rollouts a step; prompt groups stay together.", panel="Training")
    lr: float | None = setting(
        None,
        "Peak learning rate of the transformer. "
        "[default: 1e-5 with --model, 1e-4 with --train lora; 2e-3, 1e-3, 3e-4 for tiny, small, base]",
        panel="Training",
    )
    head_lr: float | None = setting(
        None,
        "Peak learning rate of the value head. [default: --lr, and at least 1e-3 for a new head]",
        panel="Training",
    )
    optimizer: OptimizerKind = setting(
        "adamw", "AdamW with float32 moments, or with 8-bit ones (bitsandbytes).", panel="Training"
    )
    weight_decay: float = setting(0.01, "AdamW weight decay, on matrices only.", panel="Training")
    warmup_steps: int | None = setting(
        None, "Steps over which the learning rate rises. [default: 3 % of the run]", panel="Training"
    )
    lr_schedule: Schedule = setting("cosine", "How the learning rate falls after the warm-up.", panel="Training")
    grad_clip: float = setting(1.0, "Largest gradient norm; 0 turns the clip off.", panel="Training")
    on_non_finite: OnNonFinite = setting(
        "stop", "Where a loss or gradient is not finite: end the run, or go on without the step.", panel="Training"
    )
    max_skips: int = setting(10, "Steps that --on-non-finite skip may leave out in a run.", panel="Training")
    seed: int = setting(0, "Seed of the split, the order and the initial weights.", panel="Training")

    def faults(self) -> list[str]:
        """See Settings."""
        return [
            *too_small(self, 1, "batch_size", "epochs", "max_steps"),
            *seed_faults(self.seed),
            *too_small(self, 0, "weight_decay", "grad_clip", "lr", "head_lr", "warmup_steps", "max_skips"),
        ]
