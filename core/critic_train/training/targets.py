"""How the returns of a run are computed, and when: once on reading, or anew in every epoch."""

from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from typing import Any

from critic_train.data.copying import schema_of
from critic_train.data.reading import Needs
from critic_train.data.returns import ReturnRecipe
from critic_train.data.schema import Columns, resolve_schema
from critic_train.data.shards import Shard
from critic_train.errors import CriticTrainError
from critic_train.events import Event, Notice
from critic_train.rollouts import Rollouts
from critic_train.settings import FitSettings, LossSettings, ReturnsSettings, column_renames

ADVICE = {
    "returns": "with a column `reward`, one number a rollout, fit makes Monte-Carlo returns of it",
    "values": "--old-values epoch takes this critic's own at each epoch's start, and --returns mc needs none",
}
"""What to do where the shards lack a column."""
ANY = Needs(returns="where there", values=False, rewards="where there")


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
            advice=ADVICE,
            every_rename=True,
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


def choices_without_columns(settings: FitSettings, shards: list[Shard]) -> Generator[Event, None, dict[str, str]]:
    """What can be done for --returns and --old-values where the shards have no such column. Rank 0 calls it alone.

    Args:
        settings: as given.
        shards: to train on; the first whose columns can be read decides.

    Yields:
        A notice for each choice.

    Returns:
        Name of a setting -> its value, for those that are chosen.
    """
    columns = _columns_of_first(settings, shards)
    chosen: dict[str, str] = {}
    if columns is None:
        return chosen
    rewards = columns.rewards or columns.reward
    returns = settings.returns.returns
    if returns == "column" and columns.returns is None and rewards is not None:
        chosen["returns"] = returns = "mc"
        yield Notice(
            message=f"there are no returns: Monte-Carlo returns are made of `{rewards}` (--returns mc; --gamma is "
            f"{settings.returns.gamma:g})"
        )
    targets = Targets.of(settings.replace(**chosen).returns, settings.loss)
    if targets.clip_to_stored and not targets.recipe.uses_values and columns.values is None:
        chosen["old_values"] = "none"
        yield Notice(
            message="there are no values of a critic to clip around: the loss is the plain squared error (--old-values "
            "none); --old-values epoch clips around this critic's own, --column values=NAME reads a column"
        )
    return chosen


def _columns_of_first(settings: FitSettings, shards: list[Shard]) -> Columns | None:
    """The columns of the first shard that can be read; reading reports the faults of the others."""
    renames = column_renames(settings.reading.column)
    for shard in shards:
        if shard.num_rows:
            try:
                return resolve_schema(schema_of(shard), shard, renames=renames, labels=(), needs=ANY)
            except CriticTrainError:
                continue
    return None
