"""How the loss is made."""

from dataclasses import dataclass
from typing import Literal

from critic_train.settings.fields import Settings, setting

OldValues = Literal["column", "epoch", "none"]
LossAggMode = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


@dataclass(frozen=True, kw_only=True)
class LossSettings(Settings):
    """Part of `fit`."""

    old_values: OldValues = setting(
        "column",
        "V_old for the clip: the shard's values, this critic's own at each epoch's start, or none.",
        panel="Loss",
    )
    cliprange_value: float = setting(0.5, "The clip's half-width eps around V_old.", panel="Loss")
    no_clip: bool = setting(False, "Turn the clip off: plain squared error.", panel="Loss")
    loss_agg_mode: LossAggMode = setting("token-mean", "How token losses become one number.", panel="Loss")
    loss_scale_factor: float | None = setting(
        None, "Divisor of seq-mean-token-sum-norm; that mode needs it.", panel="Loss"
    )

    def faults(self) -> list[str]:
        """See Settings."""
        wrong = cliprange_faults(self.cliprange_value, "; --no-clip turns the clip off")
        norm = self.loss_agg_mode == "seq-mean-token-sum-norm"
        factor = self.loss_scale_factor
        if norm and (factor is None or not 0 < factor < float("inf")):
            wrong.append(
                "--loss-agg-mode seq-mean-token-sum-norm needs --loss-scale-factor above 0 "
                "(verl divides by the padded response length there; a forest has none)"
            )
        if not norm and factor is not None:
            wrong.append("--loss-scale-factor belongs to --loss-agg-mode seq-mean-token-sum-norm only")
        return wrong


def cliprange_faults(cliprange_value: float, advice: str = "") -> list[str]:
    """What is wrong with the clip's half-width."""
    if 0 < cliprange_value < float("inf"):
        return []
    return [f"--cliprange-value must be above 0, not {cliprange_value:g}{advice}"]
