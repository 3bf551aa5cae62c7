"""What a run's returns are made of, and when: once on reading, or anew in every epoch."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from critic_train.data.reading import Needs
from critic_train.data.returns import ReturnRecipe
from critic_train.rollouts import Rollouts
from critic_train.settings import FitSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The returns of a run.

    Attributes:
        recipe: how they are made.
        moving: whether they are made anew at the start of each epoch, from this critic's own values (`--returns gae
            --old-values epoch`). What the spool holds as `returns` is then the Monte-Carlo sum: a target that does
            not move, which held-out rollouts are judged against.
        clip_to_stored: whether the loss is clipped around the shards' own values.
    """

    recipe: ReturnRecipe
    moving: bool
    clip_to_stored: bool

    @classmethod
    def of(cls, settings: FitSettings) -> "Targets":
        """The targets that the settings describe."""
        recipe = ReturnRecipe.of(settings.returns)
        return cls(
            recipe=recipe,
            moving=recipe.uses_values and settings.loss.old_values == "epoch",
            clip_to_stored=settings.loss.old_values == "column" and not settings.loss.no_clip,
        )

    @property
    def needs(self) -> Needs:
        """What must be read of the shards."""
        return Needs(
            returns=not self.recipe.from_rewards,
            values=self.clip_to_stored or (self.recipe.uses_values and not self.moving),
            rewards="yes" if self.recipe.from_rewards else "no",
            truncated=self.recipe.reads_truncated,
        )

    def on_reading(self, rollouts: Rollouts) -> Rollouts:
        """What the run keeps of rollouts as read."""
        if self.moving:
            fixed = replace(self.recipe, kind="mc", truncated="terminal")
            return fixed.with_returns(rollouts, None)
        made = self.recipe.with_returns(rollouts, rollouts.values) if self.recipe.from_rewards else rollouts
        return replace(made, rewards=None, truncated=None)

    def in_epoch(self, rollouts: Rollouts) -> Rollouts:
        """What an epoch trains on: `values` are this critic's own at its start where targets move."""
        return self.recipe.with_returns(rollouts, rollouts.values) if self.moving else rollouts

    def as_record(self) -> dict[str, Any]:
        """What tells one way of reading from another, JSON-able."""
        return asdict(self)

    def in_words(self) -> str:
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
