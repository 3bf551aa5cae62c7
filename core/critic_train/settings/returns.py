"""What the critic is trained on: where returns come from, and what becomes of rollouts that were cut."""

from dataclasses import dataclass
from typing import Literal

from critic_train.settings.fields import Settings, setting

Returns = Literal["column", "mc", "gae"]
Truncated = Literal["terminal", "bootstrap", "drop"]

AUTO = "auto"
LENGTH_ALPHA = 0.05
"""VAPO's (arXiv 2504.05118)."""


@dataclass(frozen=True, kw_only=True)
class ReturnsSettings(Settings):
    """Part of every command that needs returns."""

    returns: Returns = setting(
        "column",
        "Returns: the shard's own, or computed from rewards: Monte-Carlo sums or GAE's lambda-returns.",
        panel="Returns",
    )
    gamma: float = setting(1.0, "Discount of rewards to come, for mc and gae.", panel="Returns")
    lam: float = setting(1.0, "GAE's lambda for returns; at 1 they are Monte-Carlo's.", panel="Returns")
    lam_policy: str | None = setting(
        None,
        "GAE's lambda for the advantages that predict writes and eval judges: a number, or auto: "
        "1 - 1/(alpha * response length). [default: --lam]",
        panel="Returns",
        metavar="X|auto",
    )
    length_alpha: float = setting(LENGTH_ALPHA, "The alpha of --lam-policy auto.", panel="Returns")
    truncated: Truncated = setting(
        "terminal",
        "Rollouts the `truncated` column marks as cut: take their end as the end, add the last value, or leave out.",
        panel="Returns",
    )

    def faults(self) -> list[str]:
        """See Settings."""
        wrong = [
            f"{flag} must be from 0 to 1, not {number:g}"
            for flag, number in (("--gamma", self.gamma), ("--lam", self.lam))
            if not 0 <= number <= 1
        ]
        if self.lam_policy not in (None, AUTO) and not _is_share(self.lam_policy):
            wrong.append(f"--lam-policy must be a number from 0 to 1 or auto, not {self.lam_policy!r}")
        if not 0 < self.length_alpha < float("inf"):
            wrong.append(f"--length-alpha must be above 0, not {self.length_alpha:g}")
        elif self.length_alpha != LENGTH_ALPHA and self.lam_policy != AUTO:
            wrong.append("--length-alpha belongs to --lam-policy auto")
        return wrong + self._without_effect()

    def _without_effect(self) -> list[str]:
        """Flags that would change nothing, or cannot be done."""
        if self.returns == "column":
            said = {"--gamma": self.gamma != 1, "--lam": self.lam != 1, "--lam-policy": self.lam_policy is not None}
            reason = "needs --returns mc or gae: stored returns are taken as they are"
            wrong = [f"{flag} {reason}" for flag in said if said[flag]]
            if self.truncated == "bootstrap":
                wrong.append("--truncated bootstrap needs --returns mc or gae: to stored returns nothing can be added")
            return wrong
        if self.returns == "mc" and self.lam != 1:
            return ["--lam needs --returns gae: Monte-Carlo returns have lambda 1"]
        return []


def _is_share(text: str | None) -> bool:
    try:
        return 0 <= float(text or "") <= 1
    except ValueError:
        return False
