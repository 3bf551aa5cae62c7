"""How the returns of a run are computed, and when: once on reading, or anew in every epoch."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from critic_train.data.reading import Needs
from critic_train.data.returns import ReturnRecipe
from critic_train.rollouts import Rollouts
from critic_train.settings import LossSettings, ReturnsSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The returns of a run.

    Attributes:
        recipe: how they are made.
        moving: whether they are computed anew at the start of each epoch, from this critic's own values (`--returns
            gae --old-values epoch`). What the cache holds as `returns` is then the Monte-Carlo sum: a target that does
            not move, on which held-out rollouts are evaluated.
        clip_to_stored: whether the loss is clipped around the shards' own values.
    """

    recipe: ReturnRecipe
    moving: bool
    clip_to_stored: bool

    @classmethod
    def of(cls, returns: ReturnsSettings, loss: LossSettings) -> "Targets":
        """The targets that the settings describe."""
        recipe = ReturnRecipe.of(returns)
        return cls(
            recipe=recipe,
            moving=recipe.uses_values and loss.old_values == "epoch",
            clip_to_stored=loss.old_values == "column" and not loss.no_clip,
        )

    @property
    def needs(self) -> Needs:
        """Which columns of the shards must be read."""
        return Needs(
            returns=not self.recipe.from_rewards,
            values=self.clip_to_stored or (self.recipe.uses_values and not self.moving),
            rewards="yes" if self.recipe.from_rewards else "no",
            truncated=self.recipe.reads_truncated,
        )

    @property
    def drops_truncated(self) -> bool:
        """Whether rollouts that were cut are left out (--truncated drop)."""
        return self.recipe.truncated == "drop"

    def on_reading(self, rollouts: Rollouts) -> Rollouts:
        """Rollouts as the run caches them, from rollouts as read."""
        if self.moving:
            monte_carlo = replace(self.recipe, kind="mc", truncated="terminal")
            return monte_carlo.with_returns(rollouts, None)
        made = self.recipe.with_returns(rollouts, rollouts.values) if self.recipe.from_rewards else rollouts
        return replace(made, rewards=None, truncated=None)

    def in_epoch(self, rollouts: Rollouts) -> Rollouts:
        """Rollouts as an epoch trains on them; where targets move, `values` must be this critic's at its start."""
        return self.recipe.with_returns(rollouts, rollouts.values) if self.moving else rollouts

    def as_record(self) -> dict[str, Any]:
        """JSON-able; two runs whose records are equal cache the same returns."""
        return asdict(self)

    def describe(self) -> str:
        """For a person: `gae, gamma 1, lambda 0.95, from this critic's values at each epoch's start`."""
        recipe = self.recipe
        parts: list[str] = [recipe.kind]
        if recipe.from_rewards:
            parts.append(f"gamma {recipe.gamma:g}")
        if recipe.kind == "gae":
            parts.append(f"lambda {recipe.lam:g}")
        if recipe.truncated != "terminal":
            parts.append(f"truncated: {recipe.truncated}")
        if self.moving:
            parts.append("from this critic's values at each epoch's start")
        return ", ".join(parts)
